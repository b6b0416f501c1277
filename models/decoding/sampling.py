"""How one token is chosen from the logits, with settings of its own for every row.

In this order, which is that of ``transformers``:

  penalties     l_v <- l_v / r if l_v >= 0 else l_v * r     v in the prompt or the output
                l_v <- l_v - presence - frequency * n_v     n_v times in the output
  temperature   l <- l / t;  t = 0 takes the largest penalised logit instead
  top-k         keeps every v with l_v >= the k-th largest logit
  top-p         drops the least probable tokens while their mass is <= 1 - p
  min-p         keeps every v with p_v >= min_p * max p

Nothing is sorted: a threshold is found bit by bit, with 32 counts over the vocabulary, and
each stage is skipped when no row of the batch asks for it. A stage leaves a row that does not
ask for it bit for bit as it was.

Keskar et al. 2019 (arXiv 1909.05858) repetition penalty, Fan et al. 2018 (1805.04833) top-k,
Holtzman et al. 2020 (1904.09751) top-p, Nguyen et al. 2024 (2407.01082) min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from steppe.models.decoding.settings import Rows

# Up to this k the k largest are selected directly; it is the faster way for few of them.
FEW = 256
# Width of the blocks of the vocabulary of which a sample picks one first.
BLOCK = 128
# Id of no token: scatters drop it, gathers never see it.
NOWHERE = 2**30


class Choice(NamedTuple):
    """What :func:`choose` took.

    Attributes:
      tokens: int32 [B].
      valid: bool [B]; False where no token could be chosen, because the logits are NaN or
        every token is forbidden.
    """

    tokens: jax.Array
    valid: jax.Array


def penalise(
    logits: jax.Array, context: jax.Array, output: jax.Array, rows: Rows, active: jax.Array
) -> jax.Array:
    """Repetition, presence and frequency penalties; each distinct token is met once by the
    first two.

    Args:
      logits: float32 [B, V].
      context: ids of the prompt [B, T]; ``NOWHERE`` at padding.
      output: ids generated so far [B, N]; ``NOWHERE`` where there is none yet.
      rows: the settings.
      active: bool [B], rows that still generate; the others need no penalty.
    """
    index = jnp.arange(logits.shape[0])[:, None]

    def repetition(x: jax.Array) -> jax.Array:
        seen = jnp.concatenate([context, output], axis=1)
        value = x.at[index, seen].get(mode="fill", fill_value=0.0)
        rate = rows.repetition[:, None]
        return x.at[index, seen].set(jnp.where(value < 0, value * rate, value / rate), mode="drop")

    def counted(x: jax.Array) -> jax.Array:
        value = x.at[index, output].get(mode="fill", fill_value=0.0)
        x = x.at[index, output].set(value - rows.presence[:, None], mode="drop")
        rate = jnp.broadcast_to(rows.frequency[:, None], output.shape)
        return x.at[index, output].add(-rate, mode="drop")

    logits = _when(active & (rows.repetition != 1), repetition, logits)
    return _when(active & ((rows.presence != 0) | (rows.frequency != 0)), counted, logits)


def warp(logits: jax.Array, rows: Rows, active: jax.Array | None = None) -> jax.Array:
    """Temperature, top-k, top-p and min-p; dropped tokens become -inf.

    Args:
      logits: float32 [B, V]. Rows of temperature 0 are treated as if it were 1.
      rows: the settings.
      active: bool [B], rows whose result is used; None = all.
    """
    on = jnp.ones(logits.shape[:1], bool) if active is None else active
    x = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    x = _when(on & (rows.top_k > 0), lambda y: _top_k(y, rows.top_k, on), x)
    x = _when(on & (rows.tail > 0), lambda y: _top_p(y, rows.tail), x)
    return _when(on & (rows.min_p > 0), lambda y: _min_p(y, rows.min_p), x)


def choose(logits: jax.Array, rows: Rows, keys: jax.Array, active: jax.Array) -> Choice:
    """One token a row: the best where the temperature is 0, else a sample.

    Args:
      logits: float32 [B, V], after penalties and processors.
      rows: the settings.
      keys: a typed key for each row [B], fresh at every step.
      active: bool [B], rows that still generate.
    """
    best, top = argmax(logits)
    random = active & (rows.temperature > 0)

    def draw(x: jax.Array) -> jax.Array:
        picked = sample(warp(x, rows, random), keys)
        return jnp.where(rows.temperature > 0, picked, best)

    tokens = lax.cond(random.any(), draw, lambda x: best, logits)
    return Choice(tokens, ~(jnp.isnan(top) | jnp.isneginf(top)))


def sample(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One draw a row from softmax(logits) [B, V]; a token at -inf is never taken.

    Inverts the distribution function in two stages, a block of the vocabulary and then a
    token in it, which needs two random numbers a row instead of V.
    """
    count, size = logits.shape
    width = -(-size // BLOCK) * BLOCK
    p = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, width - size))).reshape(count, -1, BLOCK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(p.sum(axis=2), u[:, 0])
    inside = jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _invert(inside, u[:, 1])


def argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index of the first largest entry int32 [B], its value [B]) of [B, V].

    Two reductions that vectorise; ``jnp.argmax`` is one that does not, five times slower on
    a CPU.
    """
    top = x.max(axis=1)
    at = jnp.where(x == top[:, None], lax.broadcasted_iota(jnp.int32, x.shape, 1), x.shape[1])
    return jnp.minimum(at.min(axis=1), x.shape[1] - 1), top


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[tokens], float32 [B], in nats."""
    taken = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return taken - jax.nn.logsumexp(logits, axis=1)


def _when(wanted: jax.Array, fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``fn(x)`` if any row wants it; fn itself leaves the other rows alone."""
    return lax.cond(wanted.any(), fn, lambda y: y, x)


def _invert(p: jax.Array, u: jax.Array) -> jax.Array:
    """First index whose cumulative mass exceeds u * total; never one without mass."""
    mass = jnp.cumsum(p, axis=1)
    found = (mass > (u * mass[:, -1])[:, None]) & (p > 0)
    # A parallel cumulative sum may round past its own total; then the likeliest entry it is.
    return jnp.where(found.any(axis=1), jnp.argmax(found, axis=1), jnp.argmax(p, axis=1)).astype(
        jnp.int32
    )


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 with the order of the float32 x; -0 is 0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest uint32 [B] at which a predicate that can only turn False still holds."""

    def bit(i: jax.Array, low: jax.Array) -> jax.Array:
        higher = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(higher), higher, low)

    return lax.fori_loop(0, 32, bit, jnp.zeros(rows, jnp.uint32))


def _top_k(x: jax.Array, k: jax.Array, on: jax.Array) -> jax.Array:
    size = x.shape[1]
    few = min(FEW, size)
    k = jnp.minimum(k, size)
    order = _ordered(x)

    def direct(_: Any) -> jax.Array:
        at = jnp.clip(k - 1, 0, few - 1)[:, None]
        return _ordered(jnp.take_along_axis(lax.top_k(x, few)[0], at, axis=1)[:, 0])

    def counting(_: Any) -> jax.Array:
        def enough(t: jax.Array) -> jax.Array:
            return (order >= t[:, None]).sum(axis=1) >= k

        return _largest(enough, x.shape[0])

    least = lax.cond((on & (k > few)).any(), counting, direct, None)
    return jnp.where((k > 0)[:, None] & (order < least[:, None]), -jnp.inf, x)


def _top_p(x: jax.Array, tail: jax.Array) -> jax.Array:
    p = jax.nn.softmax(x, axis=1)
    order = _ordered(x)

    def outside(t: jax.Array) -> jax.Array:
        return jnp.where(order < t[:, None], p, 0).sum(axis=1) <= tail

    # The token at which the mass from below first exceeds the tail; the largest one at most,
    # so that one token is always kept.
    last = order.max(axis=1)
    least = jnp.minimum(_largest(outside, x.shape[0]), last)
    equal = order == least[:, None]

    def some(drop: jax.Array) -> jax.Array:
        # Of equal logits those of the lower ids count as the smaller ones.
        below = jnp.where(order < least[:, None], p, 0).sum(axis=1, keepdims=True)
        rank = jnp.cumsum(equal, axis=1)
        final = (least == last)[:, None] & (rank == rank[:, -1:])
        return drop | (equal & ~final & (below + rank * p <= tail[:, None]))

    drop = order < least[:, None]
    drop = lax.cond((equal.sum(axis=1) > 1).any(), some, lambda y: y, drop)
    return jnp.where((tail > 0)[:, None] & drop, -jnp.inf, x)


def _min_p(x: jax.Array, least: jax.Array) -> jax.Array:
    p = jax.nn.softmax(x, axis=1)
    top = p.max(axis=1, keepdims=True)
    keep = (p >= least[:, None] * top) | (p == top)
    return jnp.where((least > 0)[:, None] & ~keep, -jnp.inf, x)
