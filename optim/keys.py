"""Random numbers of optimisers: one key a transform, one draw a tensor, the same everywhere.

The key lies in the state as plain uint32 words, so that a state is saved, compared and
resharded like any other. It never changes: what is drawn is a function of the key, the
number of the update and the path of the leaf, so that a resumed run draws the same, every
device of a mesh draws the same, and freezing one leaf does not change the draws of another.
"""

from __future__ import annotations

import operator
import zlib
from typing import Any

import jax

from steppe.models.tree import path_of
from steppe.optim import check


def key_words(seed: Any) -> jax.Array:
    """The words of a key: of an integer seed, or of a typed key as ``jax.random.key`` makes it.

    Raises:
      TypeError: seed is neither.
      ValueError: seed is an array of a number.
    """
    if isinstance(seed, jax.Array) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(seed)
    if isinstance(seed, jax.Array):
        check.number(seed, "seed", "", check.whole)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(
            f"seed must be an integer or a key from jax.random.key, got {type(seed).__name__}"
        )
    return jax.random.key_data(jax.random.key(operator.index(seed)))


def leaf_key(words: jax.Array, step: Any, path: Any) -> jax.Array:
    """The typed key of one leaf at one update.

    Args:
      words: see :func:`key_words`.
      step: int32 scalar, number of the update.
      path: key path of the leaf, as ``jax.tree_util`` gives it.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(words), step)
    return jax.random.fold_in(key, zlib.crc32(path_of(path).encode()))
