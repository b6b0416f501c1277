"""The k largest entries of a whole tree, without gathering, concatenating or sorting it.

The bit pattern of a non-negative float32 read as an integer grows with its value, so the k-th
largest value is found by narrowing an interval of integers down to one. A round counts the
entries that reach each of four thresholds, in one pass over every leaf where it lies; what
crosses a mesh is eight integers a round. Two of the thresholds enclose the place where the
counts of the interval's ends say that the value should be, the others halve what is left on
either side, so that a round leaves at most half of the interval (31 rounds) and most often a
small part of it: 5 to 9 rounds on 10^8 gradients.

On one CPU the first interval comes from a sample, and large leaves are counted by a loop that
the compiler vectorises and spreads over the cores; the counts, and so the result, are exact.
Denormal scores, below 1.2e-38, count as 0 where the device flushes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

# Counts as [thresholds, 2] words of 16 bits: without 64-bit integers one int32 overflows at
# 2^31 entries, which a model of seven billion parameters has.
Words: TypeAlias = jax.Array
TOP = 0x7F800001  # just above infinity
UNROLL = 16  # rows that one iteration of a CPU's loop counts; the fields of a word hold 255
LARGE = 1 << 19  # entries from which that is worth its compile time
SAMPLE = 1 << 14


class TopK(NamedTuple):
    """What :func:`top_k` found.

    Attributes:
      mask: bool tree, True on the chosen entries.
      threshold: float32 scalar, the smallest chosen score (infinity for k = 0).
      chosen: float32 scalar, the number of chosen entries: k, or more where entries tie at the
        threshold.
    """

    mask: Any
    threshold: jax.Array
    chosen: jax.Array


class _Interval(NamedTuple):
    """At least k entries reach ``low``, fewer than k reach ``high``; with how many do.

    ``share`` is the half-width of the guess, as a share of the interval.
    """

    low: jax.Array
    high: jax.Array
    reach_low: Words
    reach_high: Words
    share: jax.Array


def top_k(scores: Any, k: int) -> TopK:
    """The k largest scores over all leaves together; all entries that tie with the last count.

    Args:
      scores: tree of non-negative floats; NaN counts as 0.
      k: how many, from 0 to the number of entries.

    Raises:
      ValueError: k is out of range.
    """
    leaves, structure = jax.tree.flatten(scores)
    entries = sum(leaf.size for leaf in leaves)
    if not 0 <= k <= entries:
        raise ValueError(f"k must be between 0 and the {entries} entries of the tree, got {k}")
    if k == 0:
        none = [jnp.zeros(leaf.shape, bool) for leaf in leaves]
        zero = jnp.float32(0)
        return TopK(jax.tree.unflatten(structure, none), jnp.float32(jnp.inf), zero)
    local = _local()
    start = _Interval(
        jnp.int32(0),
        jnp.int32(TOP),
        _words(entries),
        _words(0),
        jnp.float32(0.125),
    )
    sampled = local and entries >= 4 * SAMPLE
    first = _quantiles(leaves, k / entries) if sampled else _guess(start, k)

    def body(carry: tuple[_Interval, jax.Array]) -> tuple[_Interval, jax.Array]:
        # The barrier keeps the slices of the leaves, which never change, from being moved out
        # of the loop and so copied.
        here, (interval, thresholds) = jax.lax.optimization_barrier((leaves, carry))
        interval = _narrow(interval, thresholds, here, k, local)
        return interval, _guess(interval, k)

    found, _ = jax.lax.while_loop(lambda c: c[0].high - c[0].low > 1, body, (start, first))
    mask = jax.tree.unflatten(structure, [bits(leaf) >= found.low for leaf in leaves])
    threshold = jax.lax.bitcast_convert_type(found.low, jnp.float32)
    return TopK(mask, threshold, _float(found.reach_low))


def bits(leaf: jax.Array) -> jax.Array:
    """The bit patterns as int32, which grow with the values; NaN and values below 0 count as 0."""
    value = leaf.astype(jnp.float32)
    value = jnp.where(value > 0, value, 0.0)  # NaN and -0 too
    return jax.lax.bitcast_convert_type(value, jnp.int32)


def _narrow(
    interval: _Interval, thresholds: jax.Array, leaves: list[jax.Array], k: int, local: bool
) -> _Interval:
    """The interval after one pass that counts what reaches each of four thresholds."""
    thresholds = jnp.clip(thresholds, interval.low + 1, interval.high - 1)
    words = _reaching(leaves, thresholds, local)
    target = _words(k)
    enough = (words[:, 0] > target[0]) | ((words[:, 0] == target[0]) & (words[:, 1] >= target[1]))
    lows = jnp.append(jnp.where(enough, thresholds, interval.low), interval.low)
    highs = jnp.append(jnp.where(enough, interval.high, thresholds), interval.high)
    best, worst = jnp.argmax(lows), jnp.argmin(highs)
    low, high = lows[best], highs[worst]
    # A guess that held was careful enough: the next one is narrower. One that did not was not.
    held = (low == thresholds[1]) & (high == thresholds[2])
    share = jnp.where(held, interval.share / 4, jnp.minimum(interval.share * 4, 0.125))
    reach_low = jnp.concatenate([words, interval.reach_low[None]])[best]
    reach_high = jnp.concatenate([words, interval.reach_high[None]])[worst]
    reach_low = jnp.where(low == interval.low, interval.reach_low, reach_low)
    reach_high = jnp.where(high == interval.high, interval.reach_high, reach_high)
    return _Interval(low, high, reach_low, reach_high, share)


def _guess(interval: _Interval, k: int) -> jax.Array:
    """Four thresholds: two around the interpolated place, two that halve the rest."""
    low, high = interval.low, interval.high
    span = (high - low).astype(jnp.float32)
    inside = _float(interval.reach_low - interval.reach_high)
    place = jnp.clip(_float(interval.reach_low - _words(k)) / inside, 0.0, 1.0)
    # Entries spread evenly by chance lie off their place by a standard deviation of this.
    chance = jnp.sqrt(place * (1 - place) / inside)
    # A quarter at most: with few entries left chance alone says nothing, and a round must halve.
    width = jnp.minimum(jnp.maximum(interval.share, 3 * chance), 0.25)
    near = jnp.clip(jnp.stack([place - width, place + width]), 0.0, 1.0)
    shares = jnp.stack([near[0] / 2, near[0], near[1], (near[1] + 1) / 2])
    # At least the interpolated entry itself lies between the inner two.
    rounding = jnp.array([0, 0, 1, 1])
    spread = low + (shares * span).astype(jnp.int32) + rounding
    return jnp.where(high - low <= 5, low + 1 + jnp.arange(4), spread)


def _quantiles(leaves: list[jax.Array], share: float) -> jax.Array:
    """Four thresholds around the place of the ``share`` largest in a sample of the entries."""
    entries = sum(leaf.size for leaf in leaves)
    stride = max(entries // SAMPLE, 1)
    # An odd stride does not stay in one column of a matrix.
    parts = [bits(leaf.reshape(-1)[:: stride | 1]) for leaf in leaves]
    sample = jnp.sort(jnp.concatenate(parts))
    place = (1 - share) * sample.size
    chance = (share * (1 - share) * sample.size) ** 0.5
    ranks = [int(place + off * chance) for off in (-8, -3, 3, 8)]
    return sample[jnp.clip(jnp.array(ranks), 0, sample.size - 1)] + jnp.array([0, 0, 1, 1])


def _reaching(leaves: list[jax.Array], thresholds: jax.Array, local: bool) -> Words:
    """How many entries of all leaves reach each threshold, [4, 2]."""
    total = jnp.zeros((4, 2), jnp.int32)
    for leaf in leaves:
        if not leaf.size:
            continue
        if local and LARGE <= leaf.size < 1 << 31:
            counts, leaf = _unrolled(leaf.reshape(-1), thresholds)
            total = _add(total, _split(counts))
        total = _add(total, _rows(leaf, thresholds))
    return total


def _rows(leaf: jax.Array, thresholds: jax.Array) -> Words:
    """Counts of one leaf by plain sums, which a partitioner splits like the leaf."""
    pattern = bits(leaf)
    found = []
    for number in range(4):
        hits = pattern >= thresholds[number]
        rows = hits.reshape(pattern.shape[0], -1) if pattern.ndim > 1 else hits.reshape(1, -1)
        words = _split(rows.sum(axis=1, dtype=jnp.int32)).sum(axis=0)
        found.append(jnp.stack([words[0] + (words[1] >> 16), words[1] & 0xFFFF]))
    return jnp.stack(found)


def _unrolled(flat: jax.Array, thresholds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts [4] of a vector by adding up 16 slices of it, twice; and the few entries left over.

    The CPU compiler makes a fused reduction a scalar loop on one core; a sum of slices is
    elementwise work, and becomes vector code on all of them at the speed of memory. Four
    counters share a word.
    """
    length = flat.size // (UNROLL * UNROLL) * UNROLL
    packed = jnp.zeros(length, jnp.int32)
    for row in range(UNROLL):
        pattern = bits(flat[row * length : (row + 1) * length])
        for number in range(4):
            packed += (pattern >= thresholds[number]).astype(jnp.int32) << (8 * number)
    short = length // UNROLL
    even = jnp.zeros(short, jnp.int32)
    odd = jnp.zeros(short, jnp.int32)
    for row in range(UNROLL):
        words = packed[row * short : (row + 1) * short]
        even += words & 0x00FF00FF
        odd += (words >> 8) & 0x00FF00FF
    fields = (even & 0xFFFF, odd & 0xFFFF, even >> 16, odd >> 16)
    counts = jnp.stack([field.sum(dtype=jnp.int32) for field in fields])
    return counts, flat[UNROLL * length :]


def _local() -> bool:
    """Whether leaves lie whole on one CPU, so that slicing them moves nothing."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def _words(count: int) -> Words:
    return jnp.array(divmod(count, 1 << 16), jnp.int32)


def _split(counts: jax.Array) -> Words:
    """Counts below 2^31 as words, [..., 2]."""
    return jnp.stack([counts >> 16, counts & 0xFFFF], axis=-1)


def _add(left: Words, right: Words) -> Words:
    low = left[:, 1] + right[:, 1]
    return jnp.stack([left[:, 0] + right[:, 0] + (low >> 16), low & 0xFFFF], axis=1)


def _float(words: Words) -> jax.Array:
    return words[..., 0].astype(jnp.float32) * 65536.0 + words[..., 1].astype(jnp.float32)
