"""The objective of zero-shot quantization: how far a student is from its teacher on what a
generator makes, as a game (``optim.minimax.Game``).

  f(x, y) = D(P(h), Q_x(h)) + alpha sum_l d_l + beta mean |last features of P(h)| + gamma I(P(h)),
            h = G_y(z)

  D      kl    KL(softmax P || softmax Q), or another divergence of ``train.distill``; nats
         l1    mean |P - Q| over all logits           mse   mean (P - Q)^2
         a mean over the visible positions of the batch
  d_l    mean absolute difference of the L2-normalised hidden states after layer l

  I      nats that a batch's answers tell of its inputs, H(mean P) - mean H(P), see ``generator``

The generator raises f. The last two terms do not depend on x: beta keeps the generator from inputs
on which the teacher's features die, gamma (classifiers) sends it to inputs that the teacher tells
apart. alpha = beta = gamma = 0 by default (ZAQ has alpha = 1 and beta = 0.1).

Zhu et al., EMNLP 2023 (arXiv 2310.13315); Liu et al., CVPR 2021 (ZAQ) for d and beta; the two
halves of I are the entropy and the one-hot loss of Chen et al., ICCV 2019 (DAFL, arXiv 1904.01186).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.model import Model, ModelOut
from steppe.optim.minimax import Game
from steppe.train.distill import divergences
from steppe.train.quantize.generator import Generator, Synthetic, information
from steppe.train.types import Params

KINDS = ("kl", "l1", "mse", *divergences.KINDS)


class Terms(NamedTuple):
    """What f is made of.

    Attributes:
      divergence: D, of ``KINDS``.
      inter_layer: alpha.
      act_bonus: beta.
      info_bonus: gamma; of a classifier alone.
    """

    divergence: str = "kl"
    inter_layer: float = 0.0
    act_bonus: float = 0.0
    info_bonus: float = 0.0


class Made(NamedTuple):
    """What does not depend on the student: inputs, the teacher's answers, the bonus."""

    inputs: Synthetic
    logits: jax.Array
    features: jax.Array | None
    bonus: jax.Array


def discrepancy(
    kind: str,
    z_p: Float[Array, "*n V"],
    z_q: Float[Array, "*n V"],
    valid: Any = None,
) -> Float[Array, ""]:
    """D of the teacher's logits and the student's; gradients reach both.

    Args:
      kind: one of ``KINDS``; "kl" is "forward_kl".
      valid: [*n], which positions count; None = all.

    Raises:
      ValueError: an unknown kind, logits of different shapes, a divergence of distributions for
        logits that are none (a regression's).
    """
    check_kind(kind)
    if z_p.shape != z_q.shape:
        raise ValueError(f"logits of shape {z_p.shape} (teacher) and {z_q.shape} (student) differ")
    z_p, z_q = z_p.astype(jnp.float32), z_q.astype(jnp.float32)
    if kind in ("l1", "mse"):
        gap = jnp.abs(z_p - z_q) if kind == "l1" else jnp.square(z_p - z_q)
        values = gap if gap.ndim < 2 else gap.mean(-1)
    else:
        if z_p.ndim < 2 or z_p.shape[-1] < 2:
            raise ValueError(
                f"divergence {kind!r} compares distributions, logits of shape {z_p.shape} are "
                "none: use 'l1' or 'mse'"
            )
        name = "forward_kl" if kind == "kl" else kind
        log_p, log_q = divergences.log_softmax(z_p), divergences.log_softmax(z_q)
        values = divergences.between(name, log_p, log_q)
    ones = jnp.ones(values.shape, jnp.float32)
    return divergences.masked_token_mean(values, ones if valid is None else valid)


def feature_distance(p: Float[Array, "L B T D"], q: Float[Array, "L B T D"]) -> Float[Array, ""]:
    """sum_l of the mean absolute difference of L2-normalised features."""

    def unit(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-12)

    return jnp.abs(unit(p) - unit(q)).mean((1, 2, 3)).sum()


def game(
    student: Model,
    teacher: Model,
    generator: Generator,
    teacher_params: Params,
    rest: Params | None = None,
    terms: Terms | None = None,
    *,
    compute_dtype: Any = None,
) -> Game:
    """f of the module as a game between the student's x and the generator's y.

    Args:
      student: quantised, of the teacher's outputs.
      teacher_params: frozen.
      rest: the student's parameters that do not train, merged with x.
      compute_dtype: of all three networks; x and y stay as they are.

    Raises:
      ValueError: from a step, models without logits or with logits of different shapes,
        ``info_bonus`` of what is no classifier.
    """
    terms = Terms() if terms is None else terms
    still = _cast(teacher_params, compute_dtype)
    layers = terms.inter_layer != 0

    def prepare(y: Params, key: jax.Array) -> Made:
        made = generator.apply(_cast(y, compute_dtype), still, key)
        out = _run(teacher, still, made, layers, "teacher")
        hidden = out.hidden[-1] if layers else out.hidden
        bonus = jnp.float32(0)
        if terms.act_bonus:
            bonus = terms.act_bonus * jnp.abs(hidden.astype(jnp.float32)).mean()
        if terms.info_bonus:
            bonus += terms.info_bonus * information(_classes(_logits(out)))
        return Made(made, _logits(out), out.hidden[1:] if layers else None, bonus)

    def value(x: Params, made: Made) -> tuple[jax.Array, dict[str, jax.Array]]:
        full = _cast(x if not rest else tree.merge(x, rest), compute_dtype)
        out = _run(student, full, made.inputs, layers, "student")
        z = _logits(out)
        mask = made.inputs.batch.get("attention_mask")
        if mask is not None and tuple(mask.shape) != tuple(z.shape[:-1]):
            mask = None  # of tokens, where the logits are of whole texts
        divergence = discrepancy(terms.divergence, made.logits, z, mask)
        total, aux = divergence, {"divergence": divergence}
        if made.features is not None:
            inner = feature_distance(made.features, out.hidden[1:])
            total, aux["inter_layer"] = total + terms.inter_layer * inner, inner
        return total + made.bonus, aux

    return Game(prepare, value)


def _classes(logits: jax.Array) -> jax.Array:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            "info_bonus is of a classifier's answers [B, C] with C >= 2, got logits of shape "
            f"{logits.shape}: leave it at 0"
        )
    return logits


def check_kind(kind: Any) -> None:
    """Raises ValueError for an unknown divergence."""
    if kind not in KINDS:
        raise ValueError(f"divergence must be one of {', '.join(KINDS)}, got {kind!r}")


def _run(model: Model, params: Params, made: Synthetic, layers: bool, name: str) -> ModelOut:
    out = model.apply(params, made.batch, embeds=made.embeds, all_hidden=layers)
    if out.logits is None:
        raise ValueError(f"the {name} has no head, so it returns no logits: load it with head=...")
    return out


def _logits(out: ModelOut) -> jax.Array:
    assert out.logits is not None
    return out.logits


def _cast(params: Params, dtype: Any) -> Params:
    if dtype is None:
        return params
    cast: Callable[[Any, Any], Params] = tree.cast
    return cast(params, dtype)
