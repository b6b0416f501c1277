"""MiniLLM: the reverse KL of whole sequences, by policy gradient.

Sequences are drawn from pi = (1 - a) q_old + a p, token by token. With y_t a drawn token:

  r_t = clip((log p(y_t) - log q_old(y_t)) / scale, +-limit)
  R_t = sum_{s >= t} gamma^(s - t) r_s / (number of tokens from t on)
  A_t = R_t, whitened over the valid tokens of the batch
  w_t = q_old(y_t) / pi(y_t),         rho_t = q(y_t) / q_old(y_t)
  L   = mean_t max(-A_t w_t rho_t, -A_t clip(w_t rho_t, 1 - eps, 1 + eps))
        + c mean_t KL(q || p)(t)                     exact, over the whole vocabulary

A, w and q_old are constants that :func:`minillm_scored` puts into the batch of drawn sequences,
once for all updates made on it; the language-modelling term of the paper is ``kd(ratio=0.5)``
on other texts, taken in a step of its own.

Gu et al., ICLR 2024 (arXiv 2306.08543).

Deviations: as in the published code the reward of step t itself is in R_t. Its mean-centring
of the teacher's logits is left out, for it cancels in the log-softmax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models.model import Model
from steppe.train.distill.divergences import fraction, masked_token_sum, positive, token_divergence
from steppe.train.distill.pairs import Pair, TeacherLike
from steppe.train.types import Batch, LossOut, Objective, Params

OLD, WEIGHT, ADVANTAGE = "minillm_old_logp", "minillm_weight", "minillm_advantage"


def returns(
    rewards: Float[Array, "B T"],
    valid: Any,
    *,
    gamma: float = 0.95,
    length_norm: bool = True,
) -> Float[Array, "B T"]:
    """R_t of rewards at valid positions; 0 elsewhere.

    Args:
      valid: 1 where a drawn token stands; they need not begin at 0.
      gamma: discount, in [0, 1].
      length_norm: divide by the number of valid positions from t on.
    """
    fraction(gamma, "gamma")
    valid = jnp.asarray(valid).astype(jnp.float32)

    def back(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reward, there = now
        # A gap between valid positions passes what is behind it on, undiscounted.
        total = jnp.where(there > 0, reward + gamma * later, later)
        return total, total

    pair = jnp.where(valid > 0, rewards, 0.0).T, valid.T
    _, found = jax.lax.scan(back, jnp.zeros(rewards.shape[0]), pair, reverse=True)
    found = found.T
    if length_norm:
        left = jnp.cumsum(valid[:, ::-1], axis=1)[:, ::-1]
        found = found / jnp.maximum(left, 1.0)
    return found * valid


def whiten(values: Float[Array, "B T"], valid: Any) -> Float[Array, "B T"]:
    """Mean 0 and variance 1 over the valid positions; 0 elsewhere."""
    total, count = masked_token_sum(values, valid)
    count = jnp.maximum(count, 1.0)
    mean = total / count
    variance = masked_token_sum((values - mean) ** 2, valid)[0] / count
    scaled = (values - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(jnp.asarray(valid) > 0, scaled, 0.0)


def minillm_scored(
    student: Model,
    teacher: TeacherLike,
    params: Params,
    batch: Batch,
    *,
    mixing: float = 0.2,
    gamma: float = 0.95,
    scale: float = 0.5,
    limit: float = 100.0,
    length_norm: bool = True,
    whitened: bool = True,
    vocab: int | None = None,
) -> dict[str, Any]:
    """The batch with old log probabilities, importance weights and advantages, [B, T] each.

    Meant to be compiled, on the parameters that drew the sequences.

    Args:
      batch: drawn sequences, ``label_mask`` 1 on the tokens that were drawn.
      mixing: a, the teacher's share in the distribution that they were drawn from.
      gamma, length_norm: see :func:`returns`.
      scale, limit: of the rewards.
      whitened: whether the advantages are :func:`whiten`-ed.
      vocab: as in ``kd``.

    Raises:
      ValueError: a number out of range; as ``kd``.
    """
    fraction(mixing, "mixing")
    positive(scale, "scale")
    positive(limit, "limit")
    z_s, z_t, labels, mask = Pair(student, teacher, True, vocab).dense(params, batch, None)
    log_q, log_p = _taken(z_s, labels), _taken(z_t, labels)
    log_pi = log_q
    if mixing == 1:
        log_pi = log_p
    elif mixing > 0:
        log_pi = jnp.logaddexp(log_q + jnp.log1p(-mixing), log_p + jnp.log(mixing))
    rewards = jnp.clip((log_p - log_q) / scale, -limit, limit)
    advantages = returns(rewards, mask, gamma=gamma, length_norm=length_norm)
    if whitened:
        advantages = whiten(advantages, mask)
    new = {OLD: log_q, WEIGHT: jnp.exp(log_q - log_pi), ADVANTAGE: advantages}
    return {**batch, **jax.lax.stop_gradient(new)}


def minillm(
    student: Model,
    teacher: TeacherLike,
    *,
    clip: float = 0.2,
    single_step: float = 1.0,
    vocab: int | None = None,
) -> Objective:
    """MiniLLM's loss on sequences from :func:`minillm_scored`; weight = number of drawn tokens.

    aux: ``policy`` and ``reverse_kl``, the two terms.

    Args:
      clip: eps, in [0, 1].
      single_step: c, >= 0.
      student, teacher, vocab: as in ``kd``; causal language models.

    Raises:
      ValueError: a number out of range; a batch that is not scored; as ``kd``.
    """
    fraction(clip, "clip")
    if not 0 <= single_step < float("inf"):
        raise ValueError(f"single_step must be a finite number >= 0, got {single_step!r}")
    pair = Pair(student, teacher, True, vocab)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if ADVANTAGE not in batch:
            raise ValueError(
                f"batch has no {ADVANTAGE!r}: draw sequences by a policy, and give them to "
                "minillm_scored first"
            )
        z_s, z_t, labels, mask = pair.dense(params, batch, key)
        ratio = jnp.exp(_taken(z_s, labels) - batch[OLD]) * batch[WEIGHT]
        gain = batch[ADVANTAGE]
        loss = jnp.maximum(-gain * ratio, -gain * jnp.clip(ratio, 1 - clip, 1 + clip))
        total, weight = masked_token_sum(loss, mask)
        aux = {"policy": (jax.lax.stop_gradient(total), weight)}
        if single_step:
            exact = masked_token_sum(token_divergence("reverse_kl", z_s, z_t), mask)[0]
            aux["reverse_kl"] = (jax.lax.stop_gradient(exact), weight)
            total = total + single_step * exact
        return LossOut(total, weight, aux)

    return objective


def _taken(z: jax.Array, labels: jax.Array) -> jax.Array:
    """log softmax(z)[labels], nats."""
    picked = jnp.take_along_axis(z, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(z, axis=-1)
