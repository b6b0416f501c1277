"""Dense layers that multiply integers: int8 kernels at rest, int32 sums, one rescaling.

With the input x = (q_x + Z) / S (affine, token by token) and the kernel w = s q_w of
``fake_quant``, for every group g of inputs (one group without groups)

  y_j = sum_g s_gj / S * (sum_i q_x,i q_w,ij + Z sum_i q_w,ij)

The inner sum is exact in int32 (``preferred_element_type``). A layer whose input is not rounded
multiplies floats by the kernel that is made from its integers layer by layer, inside the scan.
Numbers of a layer are those of the fake-quantised model up to the rounding of float32 sums; an
input at the border of two integers may then fall to the other side in the next layer (logits of
MiniLM-L6: 1e-3 apart, ``steppe bench quantize``).

The parameters are ``quantized.quantize``'s: a dict ``{"q", "scale"}`` in place of a kernel. The
layers are replaced at their sites; kernels outside the stack are made from their integers first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import quantized, tree
from steppe.models.model import Model, Rules
from steppe.models.quantized import QuantConfig, Quantized, QuantRules
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params


def wrap(model: Model, rules: QuantRules) -> Quantized:
    """``model`` on the parameters of ``quantized.quantize(params, rules)``.

    Raises:
      ValueError: as ``quantized.wrap``; from ``apply``, a kernel that is not in integers.
    """
    quantized.check_plain(model)
    pairs = quantized.as_pairs(rules)
    chosen = quantized.resolve(model, pairs)
    whole = {path: c for path, c in chosen.items() if c.w_bits != fq.BYPASS}

    def prepare(params: Params) -> tuple[Params, dict[str, Site]]:
        own, extra = quantized.unquant(params)
        flat = tree.flatten(own)
        sites = {}
        for path, config in chosen.items():
            site = quantized.site_of(path)
            grid = None
            if path in whole:
                grid = {name: flat.pop(f"{path}/{name}", None) for name in ("q", "scale")}
                if None in grid.values():
                    raise ValueError(
                        f"the kernel at {path!r} is not in integers: give the parameters of "
                        "quantized.quantize, or wrap the model with quantized.wrap"
                    )
            if site not in model.sites:
                if grid is not None:
                    flat[path] = fq.dequantize(grid["q"], grid["scale"])
                continue
            delta = quantized.site_delta(config, extra.get(site))
            if grid is not None:
                delta = {**delta, **grid}
                bias = flat.get(f"{path.removesuffix('/kernel')}/bias")
                if bias is not None:
                    delta["bias"] = bias
            sites[site] = Site(_layer(config), delta, tokenwise=config.a_mode != "tensor")
        return tree.unflatten(flat), sites

    made = quantized.attach(model, pairs, chosen, prepare, "integer")
    return dataclasses.replace(
        made,
        init=lambda key: quantized.quantize(made.init(key), quantized.without_steps(pairs)),
        axes=axes(made.axes, whole),
    )


def axes(rules: Rules, chosen: Mapping[str, Any]) -> Rules:
    """The rules, and those of integers and steps: as their kernels, groups on every device."""
    more: list[Any] = []
    for pattern, dims in rules:
        if dims and any(tree.matches(path, (pattern,)) for path in chosen):
            more.append((rf"(?:{pattern})/q", dims))
            more.append((rf"(?:{pattern})/scale", (*dims[:-2], None, dims[-1])))
        elif any(tree.matches(path, (pattern,)) for path in chosen):
            more.append((rf"(?:{pattern})/(q|scale)", ()))
    return (*more, *rules)


def dense(
    x: jax.Array, q: jax.Array, scale: jax.Array, a_bits: int, limits: fq.Range | None = None
) -> jax.Array:
    """x [..., in] times the kernel s q [in, out], in the dtype of x.

    Args:
      q, scale: of ``fake_quant.quantize``.
      a_bits: 2 to 8 = the input is rounded too and integers are multiplied; 32 = it is not.
      limits: range of the input, broadcastable to it; by default of every token.
    """
    flat = x.reshape(-1, x.shape[-1])
    if a_bits == fq.BYPASS:
        y = flat @ fq.dequantize(q, scale).astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)
    made = fq.affine(x, a_bits, fq.bounds(x, (-1,)) if limits is None else limits)

    def rows(value: jax.Array) -> jax.Array:
        spread = jnp.broadcast_to(value, (*x.shape[:-1], 1)) if value.ndim else value
        return spread.reshape(-1, 1) if value.ndim else spread

    groups = scale.shape[-2]
    inputs = made.q.reshape(flat.shape)
    if groups == 1:
        sums = _matmul(inputs, q, (((1,), (0,)), ((), ())))[None]
    else:
        split = inputs.reshape(len(flat), groups, -1)
        sums = _matmul(split, fq.grouped(q, q.shape[0] // groups), (((2,), (1,)), ((1,), (0,))))
    columns = fq.grouped(q, q.shape[0] // groups).sum(1, dtype=jnp.int32).astype(jnp.float32)
    shifted = sums.astype(jnp.float32) + rows(made.zero) * columns[:, None]
    y = (shifted * scale.astype(jnp.float32)[:, None]).sum(0) / rows(made.scale)
    # NaN has no integer; a token that holds one must not come out as a number.
    y = jnp.where(jnp.isfinite(flat).all(-1, keepdims=True), y, jnp.nan)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _matmul(left: jax.Array, right: jax.Array, dims: Any) -> jax.Array:
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.int32)


def _layer(
    config: QuantConfig,
) -> Callable[[Any, Any, Callable[[Any], Any], SiteContext], jax.Array]:
    """The site that stands for a dense layer."""

    def fn(delta: Any, x: jax.Array, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        if "q" not in delta:
            return base(quantized.rounded_input(x, config, delta, context))
        x = quantized.divided(x, config, delta)
        limits = None
        if config.a_bits != fq.BYPASS:
            limits = quantized.input_limits(x, config, delta, context)
        y = dense(x, delta["q"], delta["scale"], config.a_bits, limits)
        return y if "bias" not in delta else y + delta["bias"].astype(y.dtype)

    return fn
