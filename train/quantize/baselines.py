"""What a quantizer has to beat: rounding to nearest, better clipping, scaled inputs, QAT.

  rtn         s = max|w| / q_max, round to nearest (absmax); clip="mse": s shrunk, channel by
              channel, to the factor of least squared error
  token-wise  ZeroQuant's inputs: the default of ``QuantConfig`` (a range a token, dynamic), with
              ``group`` for its group-wise kernels
  smooth      SmoothQuant: s_i = max|X_i|^a / max|W_i|^(1-a); x_i / s_i and s_i W_i are rounded
  awq         s_i = rms(X_i)^a with the a in 0, 1/n, ..., 1 of the least output error
              tr((W^ - W)^T G (W^ - W)), G = X^T X / n
  qat         any objective on the fake-quantised model, for the ordinary step

``gptq`` has its own file. Static ranges (absmax, percentile, moving average) come from
``calibrate``; the game without SAM or without a learning generator from ``zsaq.players``.

All take float parameters and give parameters with integers in place of kernels, for
``models.packed.save`` and ``quantized.dequantize``.

Xiao et al., ICML 2023 (SmoothQuant, arXiv 2211.10438); Lin et al., MLSys 2024 (AWQ, 2306.00978);
Yao et al., NeurIPS 2022 (ZeroQuant, 2206.01861).

Deviations: inputs are divided at the layer, not folded into the norm before it, so that every
layer of every family can be scaled, each by its own s (q, k and v differ). AWQ has the root mean
square in place of the mean magnitude, because Gram matrices hold it. ZeroQuant's layer-wise
distillation is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import quantized, tree
from steppe.models.model import Model
from steppe.models.quantized import QuantConfig, QuantRules
from steppe.models.tree import Params
from steppe.train.quantize.calibrate import check_inputs, with_entries
from steppe.train.types import Objective

TINY = 1e-5


def rtn(params: Params, rules: QuantRules, *, clip: Literal["absmax", "mse"] = "absmax") -> Params:
    """Round to nearest.

    Args:
      params: float parameters; ``smooth`` entries are multiplied in.
      clip: see the module; "absmax" = as the rules have it (``QuantConfig.fit``).

    Raises:
      ValueError: an unknown clip; as ``quantized.quantize``.
    """
    if clip not in ("absmax", "mse"):
        raise ValueError(f"clip must be 'absmax' or 'mse', got {clip!r}")
    if clip == "absmax":
        return quantized.quantize(params, rules)

    def one(w: jax.Array, path: str, config: QuantConfig) -> fq.Grid:
        return fq.quantize(w, config.w_bits, group=config.group, fit="mse")

    return each_kernel(params, rules, one)


def each_kernel(
    params: Params,
    rules: QuantRules,
    fn: Callable[[jax.Array, str, QuantConfig], fq.Grid],
) -> Params:
    """``params`` with ``fn(kernel, path, config)`` in place of every kernel that is rounded."""
    own, extra = quantized.unquant(params)
    made: dict[str, Any] = {}
    for path, config in quantized.resolve(own, rules).items():
        if config.w_bits != fq.BYPASS:
            w = quantized.smoothed(own, path, config, extra).astype(jnp.float32)
            quantized.check_finite(w, path)
            made[path] = fn(w, path, config)._asdict()
        elif config.smooth:
            made[path] = quantized.smoothed(own, path, config, extra)
    return quantized.requant(tree.replace(own, made), extra)


def smooth(
    params: Params, magnitudes: Mapping[str, jax.Array], rules: QuantRules, alpha: float = 0.5
) -> Params:
    """``params`` with SmoothQuant's factors for every layer whose rule has ``smooth=True``.

    Args:
      magnitudes: site -> [L, in], of ``calibrate.magnitudes``.
      alpha: share of the difficulty that moves from the inputs to the kernel, in [0, 1].

    Raises:
      ValueError: alpha, no layer that is to be smoothed, a layer without magnitudes, or with
        some that are not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    own, _ = quantized.unquant(params)
    made = {}
    for path, _config in _to_smooth(own, rules).items():
        site = quantized.site_of(path)
        if site not in magnitudes:
            raise ValueError(f"magnitudes lack the site {site!r}: collect them with calibrate")
        check_inputs(magnitudes[site], site)
        x = magnitudes[site].astype(jnp.float32)
        w = jnp.abs(tree.get(own, path).astype(jnp.float32)).max(-1)
        s = jnp.maximum(x, TINY) ** alpha / jnp.maximum(w, TINY) ** (1 - alpha)
        # An input that is always 0, or a row of zeros, has no difficulty to move.
        made[site] = {"smooth": jnp.where((x == 0) | (w == 0), 1.0, jnp.maximum(s, TINY))}
    return with_entries(params, made)


def awq(params: Params, grams: Mapping[str, Any], rules: QuantRules, *, points: int = 20) -> Params:
    """``params`` with AWQ-like factors for every layer whose rule has ``smooth=True``.

    The search includes a = 0, plain rounding, so that no layer's output error on the data of the
    Gram matrices is larger than that.

    Args:
      grams: of ``calibrate.grams``, [L, in, in] at the kernels' paths.
      points: n of the grid.

    Raises:
      ValueError: points < 1, no layer to be scaled, a layer without Gram matrix, or with one
        that is not finite.
    """
    if points < 1:
        raise ValueError(f"points must be >= 1, got {points}")
    own, _ = quantized.unquant(params)
    flat = tree.flatten(grams)
    made = {}
    for path, config in _to_smooth(own, rules).items():
        if path not in flat:
            raise ValueError(f"grams lack the kernel {path!r}: collect them with calibrate")
        check_inputs(flat[path], quantized.site_of(path), layered=tree.is_stacked(path))
        w = tree.get(own, path).astype(jnp.float32)
        s = _awq(w, flat[path].astype(jnp.float32), config, points)
        made[quantized.site_of(path)] = {"smooth": s}
    return with_entries(params, made)


def output_error(w: jax.Array, rounded: jax.Array, gram: jax.Array) -> jax.Array:
    """Mean squared error of a layer's output: tr(E^T G E) / out, E = rounded - w; [...]."""
    e = rounded - w
    return jnp.einsum("...io,...ij,...jo->...", e, gram, e) / w.shape[-1]


class Error(NamedTuple):
    """How far a kernel moved.

    Attributes:
      mse: mean squared error of its entries.
      sqnr: 10 log10(sum w^2 / sum (w^ - w)^2), decibels.
    """

    mse: float
    sqnr: float


def errors(params: Params, rounded: Params) -> dict[str, Error]:
    """Error of every rounded kernel, layer by layer (``layers.0/attn/q/kernel``).

    Args:
      params: the float parameters.
      rounded: parameters with integers, of a method of this room.
    """
    own, _ = quantized.unquant(params)
    integers, extra = quantized.unquant(rounded)
    known = set(tree.paths(integers))
    paths = [p.removesuffix("/scale") for p in known if p.endswith("/scale")]
    paths = sorted(p for p in paths if f"{p}/q" in known)
    found = {}
    for path in paths:
        grid = tree.get(integers, path)
        made = fq.dequantize(grid["q"], grid["scale"])
        factor = extra.get(quantized.site_of(path), {}).get("smooth")
        made = made if factor is None else made / factor[..., None]
        names = [name for name, _ in tree.tensors(tree.unflatten({path: made}))]
        w, e = tree.get(own, path), made
        layers = w.shape[0] if tree.is_stacked(path) else 1
        w, e = (x.astype(jnp.float32).reshape(layers, -1) for x in (w, e))
        power, noise = jnp.square(w).sum(1), jnp.square(e - w).sum(1)
        ratio = 10 * jnp.log10(power / jnp.maximum(noise, jnp.finfo(jnp.float32).tiny))
        for number, name in enumerate(names):
            found[name] = Error(float(noise[number] / w.shape[1]), float(ratio[number]))
    return found


def qat(model: Model, rules: QuantRules, loss: Callable[[Model], Objective]) -> Objective:
    """Quantization-aware fine-tuning: an objective of the ordinary step, on float parameters.

    Args:
      loss: objective of a model, such as ``objectives.classification_ce``.
    """
    return loss(quantized.wrap(model, rules))


def _to_smooth(own: Params, rules: QuantRules) -> dict[str, QuantConfig]:
    chosen = {p: c for p, c in quantized.resolve(own, rules).items() if c.smooth}
    if not chosen:
        raise ValueError("rules have no layer with smooth=True: there is nothing to scale")
    return chosen


def _awq(w: jax.Array, gram: jax.Array, config: QuantConfig, points: int) -> jax.Array:
    bits, group = config.w_bits, config.group
    if bits == fq.BYPASS:
        return jnp.ones(w.shape[:-1], jnp.float32)
    rms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram, axis1=-2, axis2=-1), 0.0))
    safe = jnp.where(rms > 0, rms, 1.0)
    axes = tuple(a for a in range(w.ndim) if a != w.ndim - 2)

    def look(best: tuple[jax.Array, jax.Array], a: jax.Array) -> tuple[Any, None]:
        s = safe**a
        s = s / jnp.sqrt(s.max(-1, keepdims=True) * s.min(-1, keepdims=True))
        moved = w * s[..., None]
        scale = fq.steps(moved, bits, group=group, fit=config.own_fit)
        made = fq.fake_quant(moved, bits, axes, group=group, scale=scale) / s[..., None]
        error = output_error(w, made, gram)
        better = error < best[0]
        return (
            jnp.where(better, error, best[0]),
            jnp.where(better[..., None], s, best[1]),
        ), None

    start = (jnp.full(w.shape[:-2], jnp.inf), jnp.ones(w.shape[:-1], jnp.float32))
    (_, s), _ = jax.lax.scan(look, start, jnp.linspace(0.0, 1.0, points + 1))
    return s
