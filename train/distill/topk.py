"""Divergences over a teacher's k most probable tokens and the remainder.

  p' = (p_{i_1}, ..., p_{i_k}, 1 - sum_j p_{i_j}),     q' likewise, at the TEACHER's tokens i_j

and D(p', q') for any divergence of ``divergences``. Reducing outcomes makes no f-divergence (all
of them are) larger; k = V changes nothing. It is what a store of teacher logits can keep:
k + 1 numbers a position in place of V.

Both forms never subtract: the remainder is a log-sum-exp over the other tokens.

Deviations: stores that keep the k logits alone and renormalise them teach the student that no
other token exists; here it learns how much they weigh together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.train.distill import chunked
from steppe.train.distill.divergences import between, check, check_logits, log_softmax
from steppe.train.distill.readout import Readout


class TopK(NamedTuple):
    """A distribution by its k most probable outcomes.

    Attributes:
      ids: int32 [..., k], tokens by falling probability.
      log_p: float32 [..., k], their log probabilities in nats, at the temperature used.
      log_rest: float32 [...], log probability of all other tokens together; -inf if none.
    """

    ids: Any
    log_p: Any
    log_rest: Any


def top_k(z_t: Float[Array, "*n V"], k: int, *, temperature: float = 1.0) -> TopK:
    """The teacher's distribution reduced to its k most probable tokens and the rest.

    Raises:
      ValueError: k is not in 1..V.
    """
    check_k(k, z_t.shape[-1])
    log_p = jax.lax.stop_gradient(log_softmax(z_t, temperature))
    top, ids = jax.lax.top_k(log_p, k)
    return TopK(ids, top, _rest(log_p, ids))


def stored_divergence(
    kind: str,
    z_s: Float[Array, "*n V"],
    teacher: TopK,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Float[Array, "*n"]:
    """The divergence over k + 1 outcomes, the teacher's top k tokens and the remainder.

    Args:
      teacher: from :func:`top_k` at the same temperature.
      kind, z_s, temperature, beta, alpha: as in ``token_divergence``.

    Raises:
      ValueError: as ``token_divergence``; positions or k that do not fit the logits.
    """
    kind = check(kind, temperature, beta, alpha)
    ids = _ids(teacher, z_s.shape)
    log_q = log_softmax(z_s, temperature)
    top = jnp.take_along_axis(log_q, ids, axis=-1)
    return _between(kind, teacher, top, _rest(log_q, ids), beta, alpha)


def topk_divergence(
    kind: str,
    z_s: Float[Array, "*n V"],
    z_t: Float[Array, "*n V"],
    *,
    k: int,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Float[Array, "*n"]:
    """``token_divergence`` of the distributions reduced to k + 1 outcomes."""
    check_logits(z_s, z_t)
    found = top_k(z_t, k, temperature=temperature)
    return stored_divergence(kind, z_s, found, temperature=temperature, beta=beta, alpha=alpha)


# Without the logits --------------------------------------------------------------------------


def chunked_top_k(
    h_t: Float[Array, "*n E"],
    readout_t: Readout,
    k: int,
    *,
    temperature: float = 1.0,
    vocab_chunk: int = 2048,
    shards: int = 1,
) -> TopK:
    """:func:`top_k` from hidden states, a piece of the vocabulary at a time; no gradient.

    Where logits are equal, the order of their tokens may differ from :func:`top_k`'s.

    Raises:
      ValueError: k is not in 1..V; vocab_chunk or shards out of range.
    """
    check_k(k, readout_t.size)
    readout_t.check(h_t, "teacher")
    lead = h_t.shape[:-1]
    h, readout = jax.lax.stop_gradient((h_t.reshape(-1, h_t.shape[-1]), readout_t))
    z, ids = chunked.largest(h, readout, k, vocab_chunk=vocab_chunk, shards=shards)
    more: dict[str, Any] = {
        "temperature": temperature,
        "vocab_chunk": vocab_chunk,
        "shards": shards,
    }
    log_z = chunked.terms(None, h, readout, **more).log_z_s
    others = chunked.terms(None, h, readout, exclude=ids, **more).log_z_s
    found = TopK(ids, z / temperature - log_z[:, None], others - log_z)
    return TopK(*(jax.lax.stop_gradient(x.reshape(*lead, *x.shape[1:])) for x in found))


def chunked_stored_divergence(
    kind: str,
    h_s: Float[Array, "*n D"],
    readout_s: Readout,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    vocab_chunk: int = 2048,
    shards: int = 1,
) -> Float[Array, "*n"]:
    """:func:`stored_divergence` without the logits; gathers N * k * D numbers instead.

    Raises:
      ValueError: as :func:`stored_divergence`, and as ``chunked_divergence``.
    """
    kind = check(kind, temperature, beta, alpha)
    ids = _ids(teacher, (*h_s.shape[:-1], readout_s.size))
    z = readout_s.of(h_s, ids) / temperature
    rest = chunked.terms(
        None,
        h_s,
        readout_s,
        exclude=ids,
        temperature=temperature,
        vocab_chunk=vocab_chunk,
        shards=shards,
    ).log_z_s
    some = rest > -jnp.inf
    both = jnp.concatenate([z, jnp.where(some, rest, 0.0)[..., None]], axis=-1)
    # Of k = V tokens there is no remainder, and its -inf has no derivative.
    both = both.at[..., -1].set(jnp.where(some, both[..., -1], -jnp.inf))
    log_q = jax.nn.log_softmax(both, axis=-1)
    return _between(kind, teacher, log_q[..., :-1], log_q[..., -1], beta, alpha)


# Shared --------------------------------------------------------------------------------------


def _between(
    kind: str, teacher: TopK, top: jax.Array, rest: jax.Array, beta: float, alpha: float
) -> jax.Array:
    log_p = jax.lax.stop_gradient(_outcomes(teacher.log_p, teacher.log_rest))
    return between(kind, log_p, _outcomes(top, rest), beta=beta, alpha=alpha)


def _outcomes(top: Any, rest: Any) -> jax.Array:
    """Log probabilities of the k + 1 outcomes, [..., k + 1] float32."""
    parts = (jnp.asarray(top), jnp.asarray(rest)[..., None])
    return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=-1)


def _rest(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    """Log probability of the tokens that ``ids`` do not name."""
    others = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    some = (others > -jnp.inf).any(-1)
    # A log-sum-exp of nothing has no derivative; a constant has.
    safe = jnp.where(some[..., None], others, 0.0)
    return jnp.where(some, jax.nn.logsumexp(safe, axis=-1), -jnp.inf)


def _ids(teacher: TopK, shape: tuple[int, ...]) -> jax.Array:
    ids = jnp.asarray(teacher.ids)
    check_k(ids.shape[-1], shape[-1])
    if ids.shape[:-1] != shape[:-1]:
        raise ValueError(
            f"the stored top-k is of positions {ids.shape[:-1]}, the student's are {shape[:-1]}: "
            "give the rows that the teacher saw"
        )
    return ids


def check_k(k: int, classes: int, name: str = "k") -> None:
    """Raises ValueError unless k is a number of the classes, or tokens, that there are."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= classes:
        raise ValueError(
            f"{name} must be a whole number in 1..{classes} (what there is to choose from), got "
            f"{k!r}"
        )
