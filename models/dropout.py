"""Dropout on 16 random bits an entry."""

from __future__ import annotations

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
