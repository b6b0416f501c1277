"""Relative-position bias of T5: one learnt number a head and a bucket of distances.

Of the buckets for keys before the query, the first half holds exact distances and the rest
grow logarithmically up to a largest distance; a bidirectional stack keeps the second half of
its buckets for keys after the query. Raffel et al. 2020 (arXiv 1910.10683), section 2.1.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def _by_distance(buckets: int, distance: int) -> np.ndarray:
    """Bucket of every distance 0 ... ``distance``; the last one serves all larger distances.

    A table, since the logarithm lands on whole numbers at powers of two: computed anew on
    every backend, its last bit would decide about the bucket.
    """
    exact = buckets // 2
    away = np.arange(distance + 1)
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    return np.where(away < exact, away, far).astype(np.int32)


def relative_buckets(
    relative: jax.Array, *, bidirectional: bool, buckets: int, distance: int
) -> jax.Array:
    """Buckets of key position minus query position, any shape, int32.

    Args:
      bidirectional: whether keys after the query have buckets of their own; else they share
        the one of distance 0 (a causal mask hides them).
      buckets: number of them, both directions together.
      distance: distances from here on share one bucket.
    """
    half = buckets // 2 if bidirectional else buckets
    away = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    bucket = jnp.take(jnp.asarray(_by_distance(half, distance)), jnp.minimum(away, distance))
    return bucket + jnp.where(relative > 0, half, 0) if bidirectional else bucket


def relative_bias(
    table: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    *,
    bidirectional: bool,
    distance: int,
) -> jax.Array:
    """Bias of the attention scores, [1, H, T, S], from a table [buckets, H].

    Args:
      queries, keys: positions [T] and [S].
    """
    ids = relative_buckets(
        keys[None, :] - queries[:, None],
        bidirectional=bidirectional,
        buckets=table.shape[0],
        distance=distance,
    )
    return jnp.take(table, ids, axis=0).transpose(2, 0, 1)[None]
