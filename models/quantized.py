"""A model whose chosen kernels, and the inputs of their layers, are rounded to few bits.

Kernels are a pure function of the parameters, applied before the network; inputs are rounded at
the sites of the dense layers (``models.sites``), inside the scan over layers. The network itself
knows nothing of it, and without a rule nothing is left in the program.

  rules = quantized.parse("w4a8-g64")                       or QuantConfig(...), or pairs
  student = quantized.wrap(model, rules)                    fake-quantised: float parameters train
  grids = quantized.quantize(params, rules)                 integers and steps
  params, still = quantized.dequantize(grids), quantized.wrap(model, rules, weights=False)

LayerNorms, softmax and biases are never rounded; embeddings and everything outside the stack
(head, pooler, patches) only where a rule says so, see :func:`rules`.

What a layer needs beside its kernel stands in ``params["quant"]["layers"][site]``, stacked over
layers: ``low`` and ``high`` [L] of a fixed range (``a_mode="static"``), ``smooth`` [L, in], by
which its input is divided and its kernel multiplied before rounding, and while kernels are float
``step`` [L, n, out] of fixed steps (``fit="fixed"``). None of it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import tree
from steppe.models.model import Batch, Decode, Model, ModelOut, Parts, Rules
from steppe.models.quant_rules import (
    QUANT,
    QuantConfig,
    QuantRules,
    as_pairs,
    requant,
    resolve,
    site_of,
    unquant,
)
from steppe.models.quant_rules import STACKED as STACKED
from steppe.models.quant_rules import parse as parse
from steppe.models.quant_rules import rules as rules
from steppe.models.quant_rules import without_steps as without_steps
from steppe.models.sites import Site, SiteContext, stack_sites
from steppe.models.tree import Params


@dataclass(frozen=True)
class Quantized(Model):
    """A model that rounds; see :func:`wrap`.

    Attributes:
      rules: what is rounded.
      base: the model that does not round.
      stored: "float" (kernels are rounded at every call), "rounded" (they are on their grids
        already) or "integer" (see ``models.integer``).
    """

    rules: tuple[tuple[str, QuantConfig | None], ...] = ()
    base: Model | None = field(default=None, compare=False, repr=False)
    stored: str = "float"

    @property
    def chosen(self) -> dict[str, QuantConfig]:
        """The path of every rounded kernel, and how."""
        assert self.base is not None
        return resolve(self.base, self.rules)


def wrap(model: Model, rules: QuantRules, *, weights: bool = True) -> Quantized:
    """``model`` with chosen kernels and their inputs rounded.

    Its parameters are the model's, and below ``quant`` what the module names (ranges are NaN and
    ``smooth`` is 1 until they are given). Overlays that are bound to the result see inputs that
    are not rounded.

    Args:
      rules: see ``QuantRules``.
      weights: False where the parameters hold rounded kernels already: inputs only.

    Raises:
      ValueError: the model rounds already or is bound to an overlay; a rule that matches no
        kernel or does not fit one.
    """
    check_plain(model)
    pairs = as_pairs(rules)
    chosen = resolve(model, pairs)
    at = _sites(model, chosen)

    def prepare(params: Params) -> tuple[Params, dict[str, Site]]:
        own, extra = unquant(params)
        if weights:
            own = rounded_kernels(own, chosen, extra)
        return own, {site: _input_site(chosen[path], extra.get(site)) for site, path in at.items()}

    stored = "float" if weights else "rounded"
    return attach(model, pairs, chosen, prepare, stored)


def attach(
    model: Model,
    pairs: tuple[tuple[str, QuantConfig | None], ...],
    chosen: Mapping[str, QuantConfig],
    prepare: Callable[[Params], tuple[Params, dict[str, Site]]],
    stored: str,
) -> Quantized:
    """A model that sees ``prepare(params)``: other parameters, and sites inside all others."""
    shapes = tree.flatten(model.abstract())
    live = stored == "float"  # grids say their steps themselves
    needs = {
        site_of(path): (path, c)
        for path, c in chosen.items()
        if (c.smooth or _static(c) or (live and c.fixed)) and site_of(path) in model.sites
    }

    def init(key: jax.Array) -> Params:
        params = dict(model.init(key))
        if needs:
            made = {site: _fresh(c, shapes[path].shape, live) for site, (path, c) in needs.items()}
            params[QUANT] = {tree.STACK: made}
        return params

    def inside(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Params, *args: Any, sites: Any = None, **options: Any) -> Any:
            own, ours = prepare(params)
            return fn(own, *args, sites=stack_sites(ours, sites or {}), **options)

        return call

    def apply(params: Params, batch: Batch, **options: Any) -> ModelOut:
        out: ModelOut = inside(model.apply)(params, batch, **options)
        return out

    axes: Rules = model.axes
    trainable = model.trainable
    if needs:
        axes = (*axes, (rf"{QUANT}/.*", ()))
        trainable = tuple(rf"(?!{QUANT}/)(?:{pattern})" for pattern in trainable)
    return Quantized(
        config=model.config,
        init=init,
        apply=apply,
        axes=axes,
        sites=model.sites,
        trainable=trainable,
        parts=None if model.parts is None else Parts(*(inside(fn) for fn in model.parts)),
        decode=None if model.decode is None else Decode(*(inside(fn) for fn in model.decode)),
        rules=pairs,
        base=model,
        stored=stored,
    )


# Kernels -------------------------------------------------------------------------------------


def quantize(params: Params, rules: QuantRules) -> Params:
    """The parameters with a dict ``{"q": int8, "scale": float32}`` for every chosen kernel.

    Round to nearest; by default the largest magnitude of a channel or group is the largest integer.
    Kernels of 32 bits stay as they are; an entry ``smooth`` of ``quant`` is multiplied in, and an
    entry ``step`` becomes the scale.

    Raises:
      ValueError: as :func:`wrap`; NaN or infinity in a kernel (outside jit).
    """
    own, extra = unquant(params)
    chosen = resolve(own, rules)
    found: dict[str, Any] = {}
    for path, config in chosen.items():
        if config.w_bits != fq.BYPASS:
            w = smoothed(own, path, config, extra)
            check_finite(w, path)
            scale = _steps(w, path, config, extra)
            found[path] = fq.quantize(w, config.w_bits, group=config.group, scale=scale)._asdict()
        elif config.smooth:
            found[path] = smoothed(own, path, config, extra)
    return requant(tree.replace(own, found), _without_steps(extra))


def dequantize(params: Params) -> Params:
    """The float32 parameters of :func:`quantize`'s, each kernel on its grid."""

    def walk(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if is_grid(node):
            return fq.dequantize(node["q"], node["scale"])
        return {key: walk(value) for key, value in node.items()}

    out: Params = walk(params)
    return out


def rounded_kernels(
    params: Params, chosen: Mapping[str, QuantConfig], extra: Mapping[str, Any]
) -> Params:
    """``params`` with the chosen kernels rounded, straight through for the gradient."""

    def one(path: str, config: QuantConfig) -> jax.Array:
        w = smoothed(params, path, config, extra)
        axes = tuple(a for a in range(w.ndim) if a != w.ndim - 2)
        scale = None
        if config.w_bits != fq.BYPASS:
            scale = _steps(jax.lax.stop_gradient(w), path, config, extra)
        return fq.fake_quant(w, config.w_bits, axes, group=config.group, scale=scale)

    live = {path: c for path, c in chosen.items() if c.w_bits != fq.BYPASS or c.smooth}
    return tree.replace(params, {path: one(path, c) for path, c in live.items()})


def _steps(
    w: jax.Array, path: str, config: QuantConfig, extra: Mapping[str, Any]
) -> jax.Array | None:
    """The steps [..., n, out] of the kernel w at ``path``; None = from its largest magnitudes."""
    if config.fit == "fixed":
        return _entry(extra, site_of(path), "step")
    if config.fit == "absmax":
        return None
    return fq.steps(w, config.w_bits, group=config.group, fit=config.fit)


def _without_steps(extra: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        site: {name: leaf for name, leaf in entry.items() if name != "step"}
        for site, entry in extra.items()
    }
    return {site: entry for site, entry in kept.items() if entry}


def smoothed(params: Params, path: str, config: QuantConfig, extra: Mapping[str, Any]) -> jax.Array:
    """The kernel at ``path``, times its ``smooth`` where it has one."""
    w: jax.Array = tree.get(params, path)
    if not config.smooth:
        return w
    s = _entry(extra, site_of(path), "smooth")
    return (w.astype(jnp.float32) * s[..., None]).astype(w.dtype)


def is_grid(node: Any) -> bool:
    """Whether a node of a tree is a kernel in integers."""
    return isinstance(node, Mapping) and set(node) == {"q", "scale"}


# Checks --------------------------------------------------------------------------------------


def with_entries(student: Quantized, params: Params) -> Params:
    """``params`` with fresh ``quant`` entries where the student has such and they lack them."""
    if QUANT in params or QUANT not in student.abstract():
        return params
    return {**params, QUANT: student.init(jax.random.key(0))[QUANT]}


def check_plain(model: Model) -> None:
    """Raises ValueError for a model that rounds already, or is bound to an overlay."""
    if isinstance(model, Quantized):
        raise ValueError("the model is quantized already: wrap its base (model.base) instead")
    if model.given is not None:
        raise ValueError("the model is bound to an overlay: quantize its base, then bind")


def check_finite(w: Any, where: str) -> None:
    """Raises ValueError for NaN or infinity; what is traced is only known later."""
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        raise ValueError(f"{where!r} holds NaN or infinity, which no grid has: check its training")


# Inputs --------------------------------------------------------------------------------------


def _sites(model: Model, chosen: Mapping[str, QuantConfig]) -> dict[str, str]:
    """site -> path of the kernels whose inputs are changed."""
    return {
        site_of(path): path
        for path, c in chosen.items()
        if (c.a_bits != fq.BYPASS or c.smooth) and site_of(path) in model.sites
    }


def _static(config: QuantConfig) -> bool:
    return config.a_mode == "static" and config.a_bits != fq.BYPASS


def _fresh(config: QuantConfig, shape: tuple[int, ...], live: bool) -> Params:
    made: Params = {}
    # NaN is seen; a made-up range would be a made-up model.
    if live and config.fixed:
        groups = 1 if config.group is None else shape[1] // config.group
        made["step"] = jnp.full((shape[0], groups, shape[2]), jnp.nan, jnp.float32)
    if _static(config):
        made |= {name: jnp.full(shape[0], jnp.nan, jnp.float32) for name in ("low", "high")}
    if config.smooth:
        made["smooth"] = jnp.ones(shape[:2], jnp.float32)
    return made


def _entry(extra: Mapping[str, Any], site: str, name: str) -> jax.Array:
    if name not in extra.get(site, {}):
        raise ValueError(
            f"params hold no {QUANT}/{tree.STACK}/{site}/{name}: calibrate first "
            "(train.quantize), or start from the wrapped model's init"
        )
    return jax.lax.stop_gradient(extra[site][name])


def _input_site(config: QuantConfig, extra: Mapping[str, Any] | None) -> Site:
    """The site that rounds the input of a layer."""

    def fn(delta: Any, x: jax.Array, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        return base(rounded_input(x, config, delta, context))

    return Site(fn, site_delta(config, extra), tokenwise=config.a_mode != "tensor")


def site_delta(config: QuantConfig, extra: Mapping[str, Any] | None) -> Params:
    """What the site of a layer needs of its entry below ``quant``."""
    names = (("low", "high") if _static(config) else ()) + (("smooth",) if config.smooth else ())
    return {name: _entry({"": extra or {}}, "", name) for name in names}


def rounded_input(
    x: jax.Array, config: QuantConfig, delta: Mapping[str, Any], context: SiteContext
) -> jax.Array:
    """The input [..., in] of a layer as its matmul sees it."""
    x = divided(x, config, delta)
    if config.a_bits == fq.BYPASS:
        return x
    limits = input_limits(x, config, delta, context)
    clip = config.ste_clip and config.a_mode == "static"
    return fq.fake_quant(x, config.a_bits, symmetric=False, ste_clip=clip, limits=limits)


def divided(x: jax.Array, config: QuantConfig, delta: Mapping[str, Any]) -> jax.Array:
    """x / smooth."""
    if not config.smooth:
        return x
    return (x.astype(jnp.float32) / delta["smooth"].astype(jnp.float32)).astype(x.dtype)


def input_limits(
    x: jax.Array, config: QuantConfig, delta: Mapping[str, Any], context: SiteContext
) -> fq.Range:
    """(low, high) that broadcast to x."""
    if config.a_mode == "static":
        low, high = (delta[name].astype(jnp.float32) for name in ("low", "high"))
        return low, high
    if config.a_mode == "token":
        return fq.bounds(x, (-1,))
    return fq.bounds(x, range(x.ndim), shown(context.mask, x.shape))


def shown(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Which tokens of [B, T, ...] the attention mask shows, [B, T, 1]; None = all."""
    if mask is None or mask.ndim != 2 or tuple(mask.shape) != tuple(shape[:2]):
        return None
    return (mask != 0)[..., None]
