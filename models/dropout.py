"""Dropout on 16 random bits an entry, and the keys that it draws from."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def dropout(
    x: jax.Array, rate: float, rng: jax.Array | None, *, whole: tuple[int, ...] | None = None
) -> jax.Array:
    """Zeroes entries with probability ``rate`` and scales the others by 1 / (1 - rate).

    The identity when ``rng`` is None or ``rate`` is 0. One entry takes 16 random bits, so the
    rate is met to 2^-17.

    Args:
      whole: shape of the array of which ``x`` is the leading part along every axis; the mask
        is then the leading part of that array's mask.

    Raises:
      ValueError: rate outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
    if rng is None or rate == 0.0:
        return x
    cut = round(rate * 2**16)
    bits = jax.random.bits(rng, whole or x.shape, jnp.uint16)
    keep = bits[tuple(slice(0, n) for n in x.shape)] >= cut
    return jnp.where(keep, x / (1.0 - cut / 2**16), jnp.zeros((), x.dtype))


def stream_key(
    rng: jax.Array | None, train: bool, stream: int, rates: Sequence[float]
) -> jax.Array | None:
    """The key of one stage of a forward pass; None where nothing is random.

    Args:
      stream: number of the stage: each has its own random numbers.
      rates: dropout rates of the network.

    Raises:
      ValueError: in training, a rate is not 0 and there is no key.
    """
    if not train:
        return None
    if rng is None:
        if any(rates):
            raise ValueError("train=True with dropout needs rng; pass a key, or set drop=0")
        return None
    return jax.random.fold_in(rng, stream)
