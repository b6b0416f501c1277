"""From pixels to tokens: normalisation, patches, and positions for any grid of patches.

  tokens    = [class; patches W + b] + positions
  positions = learnt on a square grid; for a grid of h x w patches  R_h P R_w^T,  R bicubic

Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3; the interpolation is that of PyTorch
(``align_corners=False``, the scale taken from the two sizes), which published code calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# PyTorch's cubic kernel without antialiasing has a = -3/4, with it a = -1/2.
PLAIN, ANTIALIASED = -0.75, -0.5


def grid_of(pixels: jax.Array, channels: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a batch of images, after checking its shape.

    Args:
      pixels: [B, H, W, C].
      channels: C that the model reads.
      patch: side of a patch in pixels.

    Raises:
      ValueError: not four axes, channels in front, another number of channels, an empty
        batch, or a side that is not a multiple of the patch (the nearest ones are named).
    """
    shape = tuple(pixels.shape)
    if len(shape) != 4:
        raise ValueError(
            f"pixel_values must be [B, H, W, {channels}], got shape {shape}; "
            "one image needs an axis in front (pixel_values[None])"
        )
    batch, height, width, last = shape
    if last != channels:
        if shape[1] == channels:
            raise ValueError(
                f"pixel_values must have the channels last, [B, H, W, {channels}], got {shape}; "
                "transpose them with pixel_values.transpose(0, 2, 3, 1)"
            )
        raise ValueError(
            f"pixel_values has {last} channels (shape {shape}), the model reads {channels}"
            + ("; repeat the grey channel" if last == 1 else "")
        )
    if batch == 0:
        raise ValueError(f"the batch is empty: pixel_values has shape {shape}")
    if height % patch or width % patch or not height or not width:
        near = [
            " or ".join(
                str(n) for n in sorted({max(n // patch, 1) * patch, -(-n // patch) * patch})
            )
            for n in (max(height, 1), max(width, 1))
        ]
        raise ValueError(
            f"images of {height} x {width} pixels do not divide into patches of {patch}; resize "
            f"the height to {near[0]} and the width to {near[1]}"
        )
    return height // patch, width // patch


def normalised(pixels: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 images as floats, ``(x / 255 - mean) / std`` by channel; floats are left alone.

    Raises:
      ValueError: integers other than uint8, whose scale is not known.
    """
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels
    if pixels.dtype != jnp.uint8:
        raise ValueError(
            f"pixel_values must be uint8 (0 to 255) or floats that are normalised, "
            f"got {pixels.dtype}"
        )
    scale = 1.0 / (255.0 * np.asarray(std, np.float64))
    shift = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    return pixels.astype(jnp.float32) * scale.astype(np.float32) + shift.astype(np.float32)


def patches(pixels: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N P"]:
    """Images cut into patches, row by row; a patch holds its pixels as (row, column, channel)."""
    b, height, width, c = pixels.shape
    h, w = height // patch, width // patch
    x = pixels.reshape(b, h, patch, w, patch, c).swapaxes(2, 3)
    return x.reshape(b, h * w, patch * patch * c)


def square(count: int) -> int:
    """Side of a square grid of ``count`` patches.

    Raises:
      ValueError: no square has so many.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} patches are not a square grid; give pixel_values, not embeds")
    return side


def interpolated(
    table: Float[Array, "N D"], grid: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "M D"]:
    """Positions learnt on a square grid, for a grid of h x w patches.

    Args:
      table: one row a patch, row by row of the image.
      grid: (h, w).
      antialias: widen the kernel when the new grid is coarser.

    The grid that they were learnt on gives them back as they are. Computed in float32.
    """
    side = square(table.shape[0])
    if grid == (side, side):
        return table
    down, across = (bicubic(side, n, antialias) for n in grid)
    rows = table.astype(jnp.float32).reshape(side, -1)
    rows = (jnp.asarray(down) @ rows).reshape(grid[0], side, -1)
    out = jnp.einsum("wk,hkd->hwd", jnp.asarray(across), rows)
    return out.reshape(grid[0] * grid[1], -1).astype(table.dtype)


@functools.cache
def bicubic(size: int, new: int, antialias: bool = False) -> np.ndarray:
    """The matrix [new, size] that resamples ``size`` points to ``new``, float32.

    Keys 1981, "Cubic convolution interpolation", with the borders of PyTorch: the edge is
    repeated without antialiasing, weights are renormalised inside it with.
    """
    scale = size / new
    out = np.zeros((new, size))
    for i in range(new):
        if antialias:
            stretch = max(scale, 1.0)
            centre, support = scale * (i + 0.5), 2.0 * stretch
            first = max(int(centre - support + 0.5), 0)
            last = min(int(centre + support + 0.5), size)
            points = np.arange(first, last)
            weights = _kernel((points - centre + 0.5) / stretch, ANTIALIASED)
            out[i, points] = weights / weights.sum()
        else:
            source = scale * (i + 0.5) - 0.5
            start = math.floor(source)
            for point in range(start - 1, start + 3):
                weight = _kernel(np.asarray(point - source), PLAIN)
                out[i, min(max(point, 0), size - 1)] += weight
    return out.astype(np.float32)


def _kernel(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
