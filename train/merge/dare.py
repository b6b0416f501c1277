"""DARE: drop entries of the task vectors at random and rescale the others.

  b ~ Bernoulli(1 - p) of every entry and task,    tau_i <- tau_i b / (1 - p)

E tau' = tau, so any merge can follow: task arithmetic (``dare`` then ``task_arithmetic``) or
TIES. The paper drops 0.9 to 0.99 of the deltas of fine-tuned language models.

Yu et al., ICML 2024 (arXiv 2311.03099).

Deviations: a draw has 16 bits, two entries share one word. p is therefore rounded to a
multiple of 2^-16, and the rescaling uses the rounded value: it stays unbiased. A leaf's mask
depends on the key and on its path, not on the other leaves. Words come from a mixing function
of the entry's place, keyed by ``jax.random``: drawing them all from threefry takes ten times as
long as the merge itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.tree import Params
from steppe.train.merge import leafwise

STEPS = 1 << 16


def linear_kernels(path: str, leaf: Any) -> bool:
    """A ``predicate``: whether the stacked leaf is the kernel of a linear layer."""
    return path.split(tree.SEPARATOR)[-1] == "kernel" and leaf.ndim >= 3


def dare(
    key: jax.Array,
    taus: Mapping[str, Any],
    p: float,
    rescale: bool = True,
    predicate: Callable[[str, Any], bool] | None = None,
) -> Params:
    """Task vectors with a share ``p`` of their entries dropped.

    Args:
      key: of the draws.
      taus: stacked task vectors, leaves [N, ...].
      p: probability of dropping an entry, in [0, 1).
      rescale: divide what is kept by 1 - p.
      predicate: ``(path, leaf) -> bool``: which leaves to drop from; default all.

    Raises:
      ValueError: ``p`` is not in [0, 1), or the leaves disagree about N.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    leafwise.tasks(taus)
    drop = min(round(p * STEPS), STEPS - 1)
    if drop == 0:
        return tree.unflatten(tree.flatten(taus))
    scale = STEPS / (STEPS - drop) if rescale else 1.0

    def one(path: str, tau: jax.Array) -> jax.Array:
        if not leafwise.mergeable(tau) or not (predicate is None or predicate(path, tau)):
            return tau
        kept = [
            jnp.where(keep, part.astype(jnp.float32) * scale, 0.0).astype(tau.dtype)
            for part, keep in zip(leafwise.rows(tau), draws(key, path, tau.shape, drop))
        ]
        return jnp.stack(kept)

    return tree.map_with_path(one, taus)


def draws(key: jax.Array, path: str, shape: tuple[int, ...], drop: int) -> list[jax.Array]:
    """Of each of N tasks the entries that are kept, bool; ``shape`` is [N, ...]."""
    own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
    number, inner = shape[0], shape[1:]
    out = []
    for pair in range((number + 1) // 2):
        word = _words(jax.random.fold_in(own, pair), inner)
        out += [(word & 0xFFFF) >= drop, (word >> 16) >= drop]
    return out[:number]


def _words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 of every place; the same wherever the array lies."""
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    size = 1
    for axis in range(len(shape) - 1, -1, -1):
        step = jnp.uint32(size % 2**32)
        place = place + step * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        size *= shape[axis]
    # Two rounds with a key each: with one, the masks of two keys would be shifted copies.
    return _mix(_mix(place + first) ^ second)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every input bit reaches every output bit ("lowbias32",
    Wellons 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
