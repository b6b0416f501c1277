"""Images nobody took, with the statistics of those that somebody did: no data needed.

  texture     normal noise whose amplitude falls with spatial frequency f as f^-a, a drawn for
              every image: photographs have a of about 1, white noise 0
  dead leaves a texture, and over it ``layers`` others, each seen where a smooth texture (a from 2
              to 3) is above a level drawn for the image: regions with edges, which hide each other

Every texture has a contrast, a brightness and a hue of its own, and every image mean 0 and variance
1, as normalised ones have on average (one that came out without contrast keeps one colour: 1 up to
the EPSILON of ``adapters.standard``). A vision model answers noise without structure all alike;
these it tells apart (``generator.information``: RESULTS, Quantization).

Field, JOSA A 1987, for the spectrum; Lee, Mumford, Huang, IJCV 2001, for dead leaves; Baradad et
al., NeurIPS 2021 (arXiv 2106.05963), learn to see from both. The ranges are ours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steppe.models.layout import rows as by_rows
from steppe.train.quantize.adapters import standard

EXPONENTS = (0.5, 3.0)
SMOOTH = (2.0, 3.0)
STEEPEST = 8  # f^-a stays in float32
IMAGE = (1, 2, 3)


def texture(
    key: jax.Array, shape: tuple[int, int, int, int], exponents: tuple[float, float] = EXPONENTS
) -> Float[Array, "N H W C"]:
    """Noise of amplitude f^-a, a uniform between ``exponents`` for every image; mean 0, variance 1.

    Channels share a part of their noise, drawn for every image too: from grey to three colours.

    Args:
      shape: N, H, W, C.

    Raises:
      ValueError: a size below 1 (below 2 for H and W), exponents that are not in order or above
        8.
    """
    _check(shape, exponents)
    count, height, width, channels = shape
    a, b, c, d = jax.random.split(key, 4)
    slope = jax.random.uniform(a, (count, 1, 1, 1), minval=exponents[0], maxval=exponents[1])
    share = jax.random.uniform(b, (count, 1, 1, 1))
    common = by_rows(jax.random.normal(c, (count, height, width, 1)))
    own = by_rows(jax.random.normal(d, (count, height, width, channels)))
    mixed = jnp.sqrt(share) * common + jnp.sqrt(1 - share) * own
    down = np.fft.fftfreq(height)[:, None]
    across = np.fft.rfftfreq(width)[None, :]
    frequency = np.hypot(down, across)
    frequency[0, 0] = min(1 / height, 1 / width)  # a channel's mean, as its slowest wave
    gain = jnp.float32(frequency)[None, :, :, None] ** -slope
    waves = jnp.fft.rfft2(mixed, axes=(1, 2)) * gain
    return standard(jnp.fft.irfft2(waves, s=(height, width), axes=(1, 2)), IMAGE)


def dead_leaves(
    key: jax.Array,
    shape: tuple[int, int, int, int],
    layers: int = 2,
    exponents: tuple[float, float] = EXPONENTS,
) -> Float[Array, "N H W C"]:
    """See the module; float32, every image of mean 0 and variance 1.

    Args:
      shape: N, H, W, C.
      layers: textures over the first; 0 = one texture.
      exponents: range of a, see :func:`texture`.

    Raises:
      ValueError: as :func:`texture`; layers < 0.
    """
    _check(shape, exponents)
    check_layers(layers)
    first, *others = jax.random.split(key, 1 + layers)
    image = _surface(first, shape, exponents)
    for key in others:
        a, b, c = jax.random.split(key, 3)
        level = jax.random.uniform(a, (shape[0], 1, 1, 1), maxval=1.5)
        leaf = texture(b, (*shape[:3], 1), SMOOTH) > level
        image = jnp.where(leaf, _surface(c, shape, exponents), image)
    return standard(image, IMAGE)


def check_layers(layers: Any) -> None:
    """Raises ValueError for what is no whole number >= 0."""
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
        raise ValueError(f"layers must be a whole number >= 0, got {layers!r}")


def _surface(key: jax.Array, shape: Any, exponents: tuple[float, float]) -> jax.Array:
    """A texture of some contrast on some colour."""
    a, b, c, d = jax.random.split(key, 4)
    contrast = jax.random.uniform(a, (shape[0], 1, 1, 1), maxval=0.7)
    brightness = jax.random.normal(b, (shape[0], 1, 1, 1))
    hue = 0.5 * jax.random.normal(c, (shape[0], 1, 1, shape[3]))
    return contrast * texture(d, shape, exponents) + brightness + hue


def _check(shape: Any, exponents: Any) -> None:
    least = (1, 2, 2, 1)
    sizes = tuple(shape)
    whole = len(sizes) == 4 and all(isinstance(n, int) for n in sizes)
    if not whole or any(n < low for n, low in zip(sizes, least, strict=True)):
        raise ValueError(
            f"shape must be (N, H, W, C) of whole numbers, N, C >= 1, H, W >= 2, got {sizes}"
        )
    pair = tuple(exponents)
    if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= STEEPEST:
        raise ValueError(
            f"exponents must be two finite numbers 0 <= low <= high <= {STEEPEST}, got {exponents}"
        )
