"""The rank of every entry of a tree among all entries of all its leaves, in [0, 1].

  exact      sorts all entries together: one gathered vector
  histogram  two passes of counts in about 4096 bins, nothing gathered; the first has bins of
             equal width in the logarithm, the second splits every one of them into as many as
             its share of the entries asks for, so that a bin ends up with 1/4096 of them or a tie

Bins are cut on the bit pattern of a non-negative float32, which grows with its logarithm; all
arithmetic is on integers, so that the ranks are the same to the last bit on any mesh.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from steppe.optim.topk import bits

Method: TypeAlias = Literal["exact", "histogram"]
BINS = 4096


def relative_rank(tree: Any, method: Method = "exact") -> Any:
    """rank / (n - 1) of every entry: 0 = smallest, 1 = largest; equal entries share their mean.

    Args:
      tree: non-negative floats; NaN and values below 0 count as 0.
      method: "exact", or "histogram": off by less than 1e-3, for trees that lie on a mesh or
        are too large to sort.

    Returns:
      float32 tree of the shapes of ``tree``; a single entry has rank 0.

    Raises:
      ValueError: an unknown method, or a tree of 2^31 entries or more.
    """
    if method not in ("exact", "histogram"):
        raise ValueError(f"method must be 'exact' or 'histogram', got {method!r}")
    leaves, structure = jax.tree.flatten(tree)
    entries = sum(leaf.size for leaf in leaves)
    if entries >= 1 << 31:
        raise ValueError(f"a tree of at most 2^31 - 1 entries can be ranked, got {entries}")
    patterns = [bits(leaf) for leaf in leaves]
    ranks = _exact(patterns) if method == "exact" else _histogram(patterns)
    scale = jnp.float32(max(entries - 1, 1))
    return jax.tree.unflatten(structure, [rank / scale for rank in ranks])


@jax.jit
def _exact(patterns: list[jax.Array]) -> list[jax.Array]:
    ordered = jnp.sort(jnp.concatenate([pattern.reshape(-1) for pattern in patterns]))

    def rank(pattern: jax.Array) -> jax.Array:
        flat = pattern.reshape(-1)
        first = jnp.searchsorted(ordered, flat, side="left", method="sort")
        after = jnp.searchsorted(ordered, flat, side="right", method="sort")
        return _middle(first, after - first).reshape(pattern.shape)

    return [rank(pattern) for pattern in patterns]


@jax.jit
def _histogram(patterns: list[jax.Array]) -> list[jax.Array]:
    lowest = jnp.min(jnp.stack([_least_positive(pattern) for pattern in patterns]))
    highest = jnp.max(jnp.stack([pattern.max() for pattern in patterns]))
    width = jnp.maximum((highest - lowest) // BINS + 1, 1)  # at most 2^19

    # Bin 0 holds the zeros alone, which are many in unused rows and have no logarithm.
    def coarse(pattern: jax.Array) -> jax.Array:
        return jnp.where(pattern == 0, 0, 1 + jnp.clip((pattern - lowest) // width, 0, BINS - 1))

    counts = _count([coarse(pattern) for pattern in patterns], BINS + 1)
    share = counts.astype(jnp.float32) / counts.sum().astype(jnp.float32)
    split = jnp.maximum(jnp.floor(share * BINS).astype(jnp.int32), 1).at[0].set(1)
    offset = jnp.cumsum(split) - split

    def fine(pattern: jax.Array) -> jax.Array:
        at = coarse(pattern)
        rest = jnp.where(at == 0, 0, (pattern - lowest) % width)
        return offset[at] + rest * split[at] // width  # below 2^19 * 2^12

    bins = [fine(pattern) for pattern in patterns]
    counts = _count(bins, 2 * BINS + 1)
    middle = _middle(jnp.cumsum(counts) - counts, counts)
    return [middle[bin_] for bin_ in bins]


def _least_positive(pattern: jax.Array) -> jax.Array:
    return jnp.where(pattern > 0, pattern, jnp.int32(0x7F800000)).min()


def _count(bins: list[jax.Array], number: int) -> jax.Array:
    """How many entries of all leaves lie in each bin, int32 [number]."""
    total = jnp.zeros(number, jnp.int32)
    for bin_ in bins:
        total = total.at[bin_].add(1)
    return total


def _middle(first: jax.Array, count: jax.Array) -> jax.Array:
    """Mean of the ranks first .. first + count - 1, float32."""
    return first.astype(jnp.float32) + (count.astype(jnp.float32) - 1) / 2
