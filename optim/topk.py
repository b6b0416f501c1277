"""The k largest entries of a whole tree, without gathering, concatenating or sorting it.

The bit pattern of a non-negative float32 read as an integer grows with its value, so the k-th
largest value is found by bisection on that integer: 31 rounds, each one count of the entries
that reach the middle. A round is a reduction over every leaf where it lies; what crosses a
mesh is one integer a round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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


def top_k(scores: Any, k: int) -> TopK:
    """The k largest scores over all leaves together; all entries that tie with the last count.

    Args:
      scores: tree of non-negative floats; NaN counts as 0.
      k: how many, from 0 to the number of entries.

    Raises:
      ValueError: k is out of range.
    """
    leaves = jax.tree.leaves(scores)
    entries = sum(leaf.size for leaf in leaves)
    if not 0 <= k <= entries:
        raise ValueError(f"k must be between 0 and the {entries} entries of the tree, got {k}")

    def bits(leaf: jax.Array) -> jax.Array:
        value = leaf.astype(jnp.float32)
        value = jnp.where(value > 0, value, 0.0)  # NaN and -0 too
        return jax.lax.bitcast_convert_type(value, jnp.int32)

    patterns = [bits(leaf) for leaf in leaves]

    def reaching(threshold: jax.Array) -> jax.Array:
        # Two words of 16 bits: without 64-bit integers one int32 overflows at 2^31 entries,
        # which a model of seven billion parameters has.
        high, low = jnp.int32(0), jnp.int32(0)
        for pattern in patterns:
            hits = pattern >= threshold
            rows = hits.reshape(pattern.shape[0], -1) if pattern.ndim > 1 else hits[None]
            per_row = rows.sum(axis=1, dtype=jnp.int32)
            high += (per_row >> 16).sum(dtype=jnp.int32)
            low_sum = (per_row & 0xFFFF).sum(dtype=jnp.int32)
            high += (low + low_sum) >> 16
            low = (low + low_sum) & 0xFFFF
        return jnp.stack([high, low])

    target_high, target_low = divmod(k, 1 << 16)

    def enough(count: jax.Array) -> jax.Array:
        high, low = count[0], count[1]
        return (high > target_high) | ((high == target_high) & (low >= target_low))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Invariant: at least k entries reach ``low``, fewer than k reach ``high``.
        low, high = bounds
        middle = low + (high - low) // 2
        keep = enough(reaching(middle))
        return jnp.where(keep, middle, low), jnp.where(keep, high, middle)

    top = jnp.int32(0x7F800001)  # just above infinity
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), top))
    threshold = jnp.where(k == 0, top, low)
    mask = jax.tree.unflatten(
        jax.tree.structure(scores), [pattern >= threshold for pattern in patterns]
    )
    count = reaching(threshold)
    total = count[0].astype(jnp.float32) * 65536.0 + count[1].astype(jnp.float32)
    value = jax.lax.bitcast_convert_type(jnp.minimum(threshold, 0x7F800000), jnp.float32)
    return TopK(mask, value, total)
