"""Quantisers: numbers on a grid of 2^k values, with gradients that pass through the rounding.

  symmetric   q_max = 2^(k-1) - 1;  s = max|w| / q_max;  q = clip(round(w / s), -q_max, q_max)
              w^ = s q;  or s shrunk, range by range, to the factor of least squared error
  affine      n = 2^k - 1;  S = n / max(max - min, 1e-8);  Z = round(S min) + 2^(k-1)
              q = clip(round(S x - Z), -2^(k-1), 2^(k-1) - 1);  x^ = (q + Z) / S
  backwards   dx^/dx = 1 (straight through), or 1 inside the range and 0 outside (clipped)

Ranges are constants for the gradient. round is half to even. Everything is computed in float32,
whatever the dtype of the input, and returned in that dtype. k = 32 stands for no quantisation:
the input comes back as it is. NaN and infinity become NaN in every entry that shares their range:
inside a program nothing can be raised, and a number would hide them.

ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281) and ZAQ (Liu et al., CVPR 2021) for the affine
form; Bengio et al. 2013 (1308.3432) for the straight-through gradient.

Deviations: a channel of zeros has the step 1 instead of 0 / 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BYPASS = 32
TINIEST = 1e-8
SHRINK = 20  # factors 1, ..., 0.5 of a search for the step of least error
Fit: TypeAlias = Literal["absmax", "mse"]
# (low, high); scalars, or arrays that broadcast to the input.
Range = tuple[Any, Any]


class Grid(NamedTuple):
    """A symmetric quantisation of a kernel.

    Attributes:
      q: int8, of the kernel's shape.
      scale: the steps s, float32 [..., n, out], n groups along the inputs (1 without groups).
    """

    q: Int[Array, "*stack in out"]
    scale: Float[Array, "*stack n out"]


class Affine(NamedTuple):
    """An affine quantisation: x^ = (q + zero) / scale.

    Attributes:
      q: int8, of the input's shape.
      scale, zero: S and Z, float32, broadcastable to q.
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array


def fake_quant(
    x: Float[Array, "*shape"],
    bits: int,
    axis: int | Sequence[int] | None = None,
    symmetric: bool = True,
    ste_clip: bool = False,
    *,
    group: int | None = None,
    limits: Range | None = None,
    scale: Any = None,
) -> Float[Array, "*shape"]:
    """x^ forwards, x backwards.

    Args:
      bits: 2 to 8, or 32 = x itself.
      axis: the axes whose entries have ranges of their own (of a kernel [in, out]: -1, of
        stacked ones [L, in, out]: (0, -1), of tokens [B, T, D]: (0, 1)); None = one range.
      symmetric: see the module.
      ste_clip: no gradient for entries outside of the range. Ranges that are taken from x clip
        nothing.
      group: so many neighbouring entries of axis -2 (a kernel's inputs) have a range of their
        own; symmetric only.
      limits: (low, high) in place of the minimum and maximum of x; symmetric quantisation takes
        the larger magnitude of both.
      scale: steps [..., n, out] of a kernel in place of a range, as :func:`steps` gives; symmetric
        only.

    Raises:
      ValueError: bits, a group that does not divide axis -2, groups of an affine quantiser.

    Example:
      >>> fake_quant(jnp.array([[0.9, 2.0], [0.2, -2.0]]), bits=2, axis=-1).tolist()
      [[0.8999999761581421, 2.0], [0.0, -2.0]]
    """
    check_bits(bits, "bits")
    if group is not None and not symmetric:
        raise ValueError(f"group={group} needs symmetric=True: affine ranges have no groups")
    if bits == BYPASS:
        return x
    wide = jax.lax.stop_gradient(x.astype(jnp.float32))
    limits = jax.lax.stop_gradient(limits)  # ranges are constants, also those made of x
    split = wide if group is None else grouped(wide, group)
    kept = _kept(axis, x.ndim, group is not None)
    over = tuple(a for a in range(split.ndim) if a not in kept)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        if scale is not None:
            step = jax.lax.stop_gradient(scale if group is None else scale[..., None, :])
            largest = top * step
        else:
            if limits is None:
                largest = jnp.abs(split).max(over, keepdims=True)
            else:
                largest = _magnitude(limits)
            step = _steps(largest, top)
        rounded = (jnp.clip(jnp.round(split / step), -top, top) * step).reshape(x.shape)
        inside = jnp.abs(split) <= largest
    else:
        low, high = bounds(split, over) if limits is None else limits
        made = affine(split, bits, (low, high), integers=False)
        rounded = (made.q + made.zero) / made.scale
        inside = (split >= low) & (split <= high)
    live = x
    if ste_clip and limits is not None:
        live = jnp.where(inside.reshape(x.shape), x, jax.lax.stop_gradient(x))
    # The difference is exactly 0 forwards, so that x^ stays on its grid to the last bit.
    return rounded.astype(x.dtype) + (live - jax.lax.stop_gradient(x))


def quantize(
    w: Float[Array, "*stack in out"],
    bits: int,
    *,
    group: int | None = None,
    scale: Float[Array, "*stack n out"] | None = None,
    fit: Fit = "absmax",
) -> Grid:
    """The integers of a kernel, one step an output channel (and group of inputs).

    Args:
      w: [in, out], or stacked [..., in, out].
      bits: 2 to 8.
      group: see :func:`fake_quant`.
      scale: steps to use; by default those of :func:`steps`.
      fit: see :func:`steps`.

    Raises:
      ValueError: bits (32 has no integers), or a group that does not divide the inputs.
    """
    check_bits(bits, "bits", bypass=False)
    split = grouped(w.astype(jnp.float32), w.shape[-2] if group is None else group)
    top = 2 ** (bits - 1) - 1
    scale = steps(w, bits, group=group, fit=fit) if scale is None else scale
    q = jnp.clip(jnp.round(split / scale[..., None, :]), -top, top)
    return Grid(q.reshape(w.shape).astype(jnp.int8), scale)


def steps(
    w: Float[Array, "*stack in out"], bits: int, *, group: int | None = None, fit: Fit = "absmax"
) -> Float[Array, "*stack n out"]:
    """s of every output channel and group.

    Args:
      fit: "absmax" = from the largest magnitude; "mse" = that times the factor of 1, ..., 0.5 with
        the least squared error, so that the largest weights are clipped where it pays.

    Raises:
      ValueError: an unknown fit.
    """
    check_fit(fit)
    split = grouped(w.astype(jnp.float32), w.shape[-2] if group is None else group)
    top = 2 ** (bits - 1) - 1
    whole = _steps(jnp.abs(split).max(-2), top)
    if fit == "absmax":
        return whole

    def look(best: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[Any, None]:
        s = (whole * factor)[..., None, :]
        error = jnp.square(jnp.clip(jnp.round(split / s), -top, top) * s - split).sum(-2)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, whole * factor, best[1])), None

    start = (jnp.full(whole.shape, jnp.inf), whole)
    (_, found), _ = jax.lax.scan(look, start, jnp.linspace(1.0, 0.5, SHRINK))
    return jax.lax.stop_gradient(found)


def dequantize(q: Int[Array, "*stack in out"], scale: Any) -> Float[Array, "*stack in out"]:
    """w^ = s q, float32; the number of groups is the size of the scale's axis -2."""
    split = grouped(q.astype(jnp.float32), q.shape[-2] // scale.shape[-2])
    return (split * scale.astype(jnp.float32)[..., None, :]).reshape(q.shape)


def affine(x: Float[Array, "*shape"], bits: int, limits: Range, *, integers: bool = True) -> Affine:
    """q, S and Z of x for the range ``limits``, broadcastable to x.

    Args:
      bits: 2 to 8.
      integers: q as int8; False leaves it float32, where NaN stays NaN.

    Raises:
      ValueError: bits.
    """
    check_bits(bits, "bits", bypass=False)
    low, high = (jnp.asarray(v, jnp.float32) for v in limits)
    half = 2 ** (bits - 1)
    scale = (2**bits - 1) / jnp.maximum(high - low, TINIEST)
    zero = jnp.round(scale * low) + half
    q = jnp.clip(jnp.round(scale * x.astype(jnp.float32) - zero), -half, half - 1)
    return Affine(q.astype(jnp.int8) if integers else q, scale, zero)


def bounds(x: Float[Array, "*shape"], over: Sequence[int], live: jax.Array | None = None) -> Range:
    """(min, max) over the axes ``over``, which stay as axes of size 1; float32.

    Args:
      live: broadcastable to x; entries where it is False do not count.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    low = x if live is None else jnp.where(live, x, jnp.inf)
    high = x if live is None else jnp.where(live, x, -jnp.inf)
    axes = tuple(over)
    return low.min(axes, keepdims=True), high.max(axes, keepdims=True)


def ema_range(old: Range | None, new: Range, decay: float = 0.99) -> Range:
    """The moving average of a range; the first one is taken as it is.

    Raises:
      ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    if old is None:
        return new
    low, high = (decay * o + (1 - decay) * n for o, n in zip(old, new, strict=True))
    return low, high


def grouped(w: jax.Array, group: int) -> jax.Array:
    """[..., in, out] -> [..., in / group, group, out].

    Raises:
      ValueError: the group does not divide the inputs.
    """
    inputs = w.shape[-2]
    check_group(group, inputs, f"a kernel of shape {tuple(w.shape)}")
    return w.reshape(*w.shape[:-2], inputs // group, group, w.shape[-1])


# Checks --------------------------------------------------------------------------------------


def check_bits(bits: Any, name: str, *, bypass: bool = True) -> None:
    """Raises ValueError unless ``bits`` is a whole number from 2 to 8, or 32 where allowed."""
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not whole or not (2 <= bits <= 8 or (bypass and bits == BYPASS)):
        also = f", or {BYPASS} for no quantisation" if bypass else ""
        raise ValueError(f"{name} must be 2 to 8{also}, got {bits!r}")


def check_fit(fit: Any) -> None:
    """Raises ValueError unless ``fit`` is "absmax" or "mse"."""
    if fit not in ("absmax", "mse"):
        raise ValueError(f"fit must be 'absmax' or 'mse', got {fit!r}")


def check_group(group: Any, inputs: int, where: str) -> None:
    """Raises ValueError unless ``group`` is a whole number that divides ``inputs``."""
    whole = isinstance(group, int) and not isinstance(group, bool)
    if not whole or group < 1 or inputs % group:
        fits = [n for n in (32, 64, 128) if inputs % n == 0]
        cure = f"use {' or '.join(map(str, fits))}, or none" if fits else "use none"
        raise ValueError(
            f"group must divide the {inputs} inputs (axis -2) of {where}, got {group!r}: {cure}"
        )


def _kept(axis: int | Sequence[int] | None, ndim: int, groups: bool) -> set[int]:
    """The axes that are not reduced; with groups, of the array that has one more axis."""
    given = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    kept = set()
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis must lie within the {ndim} axes of x, got {a}")
        kept.add(a % ndim)
    if not groups:
        return kept
    if ndim - 2 in kept:
        raise ValueError("axis must not hold the axis -2 that group divides: leave one of them out")
    return {a if a < ndim - 2 else a + 1 for a in kept} | {ndim - 2}


def _steps(largest: jax.Array, top: int) -> jax.Array:
    step = largest / top
    # Also where a subnormal magnitude divides to 0.
    return jnp.where(step == 0, 1.0, step)


def _magnitude(limits: Range) -> jax.Array:
    low, high = (jnp.asarray(v, jnp.float32) for v in limits)
    return jnp.maximum(jnp.abs(low), jnp.abs(high))
