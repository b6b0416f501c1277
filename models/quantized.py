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
which its input is divided and its kernel multiplied before rounding. None of it trains.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import tree
from steppe.models.model import Batch, Decode, Model, ModelOut, Parts, Rules
from steppe.models.overlays.overlay import kernel_paths
from steppe.models.sites import Site, SiteContext, stack_sites
from steppe.models.tree import Params

QUANT = "quant"
STACKED = r"(.*/)?layers/(.*/)?kernel"
MODES = ("token", "tensor", "static")


@dataclass(frozen=True)
class QuantConfig:
    """How one dense layer is rounded.

    Attributes:
      w_bits, a_bits: bits of its kernel and of its input, 2 to 8; 32 = as it is.
      group: so many inputs of a kernel share a step; None = all of an output channel.
      a_mode: range of the input: "token" = of each token, "tensor" = of all real tokens of the
        (global) batch, "static" = as ``params["quant"]`` has it, see ``train.quantize.calibrate``.
      ste_clip: no gradient for inputs outside of a static range.
      smooth: whether the layer has an entry ``smooth``, see the module.
      fit: step of a kernel: "absmax" or "mse", see ``fake_quant.steps``.
    """

    w_bits: int = 8
    a_bits: int = 8
    group: int | None = None
    a_mode: Literal["token", "tensor", "static"] = "token"
    ste_clip: bool = False
    smooth: bool = False
    fit: Literal["absmax", "mse"] = "absmax"

    def __post_init__(self) -> None:
        fq.check_bits(self.w_bits, "w_bits")
        fq.check_bits(self.a_bits, "a_bits")
        fq.check_fit(self.fit)
        if self.a_mode not in MODES:
            raise ValueError(f"a_mode must be one of {', '.join(MODES)}, got {self.a_mode!r}")
        whole = isinstance(self.group, int) and not isinstance(self.group, bool)
        if self.group is not None and not (whole and self.group >= 1):
            raise ValueError(f"group must be a whole number >= 1, or None, got {self.group!r}")


# (regular expression on the whole path of a kernel, how it is rounded or None = not at all); the
# first match counts. A QuantConfig alone stands for all kernels of dense layers in the stack.
QuantRules: TypeAlias = QuantConfig | Sequence[tuple[str, QuantConfig | None]]


def parse(text: str, **more: Any) -> QuantConfig:
    """A scheme from its usual name: "w8a8", "w4a16" (inputs as they are), "w3a8-g64".

    Args:
      more: further fields of :class:`QuantConfig`.

    Raises:
      ValueError: an unknown scheme, or bits outside 2 to 8.

    Example:
      >>> parse("w4a8-g64").w_bits
      4
    """
    found = re.fullmatch(r"w(\d+)a(\d+)(?:-?g(\d+))?", text.strip().lower())
    if found is None:
        raise ValueError(f"scheme must look like w8a8, w4a16 or w4a8-g64, got {text!r}")
    w, a = (fq.BYPASS if int(n) in (16, 32) else int(n) for n in found.groups()[:2])
    group = None if found[3] is None else int(found[3])
    return QuantConfig(w, a, group, **more)


def rules(
    config: QuantConfig, *, quantize_embed: bool = False, quantize_head: bool = False
) -> tuple[tuple[str, QuantConfig | None], ...]:
    """The rules for a whole model: its stack, and where wanted the matrices around it.

    Those have no site at their inputs, so that their weights alone are rounded. Embeddings have a
    step for every column and no groups, whose sizes are of inputs and not of words, positions or
    types; a tied language-model head is rounded with them.
    """
    alone = dataclasses.replace(config, a_bits=fq.BYPASS, smooth=False)
    chosen: list[tuple[str, QuantConfig | None]] = [(STACKED, config)]
    if quantize_head:
        chosen.append((r"(head|pooler|projection)/(.*/)?kernel", alone))
    if quantize_embed:
        whole = dataclasses.replace(alone, group=None)
        chosen.append((r"(.*/)?embed/(.*/)?(table|kernel)", whole))
    return tuple(chosen)


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
    needs = {
        site: (path, chosen[path])
        for site, path in _sites(model, chosen).items()
        if chosen[path].smooth or _static(chosen[path])
    }

    def init(key: jax.Array) -> Params:
        params = dict(model.init(key))
        if needs:
            made = {site: _fresh(c, shapes[path].shape) for site, (path, c) in needs.items()}
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
    Kernels of 32 bits stay as they are; an entry ``smooth`` of ``quant`` is multiplied in.

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
            made = fq.quantize(w, config.w_bits, group=config.group, fit=config.fit)
            found[path] = made._asdict()
        elif config.smooth:
            found[path] = smoothed(own, path, config, extra)
    return requant(tree.replace(own, found), extra)


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
        if config.fit != "absmax" and config.w_bits != fq.BYPASS:
            fixed = jax.lax.stop_gradient(w)
            scale = fq.steps(fixed, config.w_bits, group=config.group, fit=config.fit)
        return fq.fake_quant(w, config.w_bits, axes, group=config.group, scale=scale)

    live = {path: c for path, c in chosen.items() if c.w_bits != fq.BYPASS or c.smooth}
    return tree.replace(params, {path: one(path, c) for path, c in live.items()})


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


def unquant(params: Params) -> tuple[Params, dict[str, Any]]:
    """(the network's parameters, ``quant``'s entries by site)."""
    own = {name: part for name, part in params.items() if name != QUANT}
    return own, dict(params.get(QUANT, {}).get(tree.STACK, {}))


def requant(params: Params, extra: Mapping[str, Any]) -> Params:
    """The reverse of :func:`unquant`."""
    return {**params, QUANT: {tree.STACK: dict(extra)}} if extra else params


# Rules ---------------------------------------------------------------------------------------


def with_entries(student: Quantized, params: Params) -> Params:
    """``params`` with fresh ``quant`` entries where the student has such and they lack them."""
    if QUANT in params or QUANT not in student.abstract():
        return params
    return {**params, QUANT: student.init(jax.random.key(0))[QUANT]}


def as_pairs(rules: QuantRules) -> tuple[tuple[str, QuantConfig | None], ...]:
    """Rules as pairs.

    Raises:
      ValueError: they are none, or a pattern is no regular expression.
    """
    if isinstance(rules, QuantConfig):
        return ((STACKED, rules),)
    if isinstance(rules, str):
        raise ValueError(f"rules must be a QuantConfig or pairs, got text: use parse({rules!r})")
    pairs = tuple((pattern, config) for pattern, config in rules)
    for pattern, _ in pairs:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {pattern!r} is no regular expression ({error})") from error
    if not pairs:
        raise ValueError("rules must hold at least one (pattern, QuantConfig or None), got none")
    return pairs


def resolve(model: Model | Params, rules: QuantRules) -> dict[str, QuantConfig]:
    """The path of every kernel that a rule rounds, and how.

    Args:
      model: a model, or parameters (arrays or shapes).

    Raises:
      ValueError: a pattern matches no kernel; a leaf that is no matrix or holds integers; a
        group that does not divide its inputs; inputs to be rounded where no site is.
    """
    sites = model.sites if isinstance(model, Model) else None
    params = model.abstract() if isinstance(model, Model) else unquant(model)[0]
    pairs, flat = as_pairs(rules), tree.flatten(params)
    for pattern, _ in pairs:
        if not any(re.fullmatch(pattern, path) for path in flat):
            done = any(re.fullmatch(pattern, path.removesuffix("/q")) for path in flat)
            if done:
                raise ValueError(f"the kernels of rule {pattern!r} are quantized already")
            kernels = [path for path in flat if path.endswith("/kernel")]
            raise ValueError(
                f"rule {pattern!r} matches no kernel; there are {', '.join(kernels[:4])}, ..."
            )
    known = set(kernel_paths(params).values())
    chosen = {}
    for path, leaf in flat.items():
        config = next((c for p, c in pairs if re.fullmatch(p, path)), None)
        if config is None:
            continue
        lead = int(tree.is_stacked(path))
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(f"{path!r} holds integers: it is quantized already")
        if leaf.ndim - lead != 2:
            raise ValueError(
                f"a rule matches {path!r} of shape {tuple(leaf.shape)}, which is no matrix"
            )
        if config.group is not None:
            fq.check_group(config.group, leaf.shape[-2], f"{path!r} {tuple(leaf.shape)}")
        inputs = config.a_bits != fq.BYPASS or config.smooth
        hooked = path in known and (sites is None or site_of(path) in sites)
        if inputs and not hooked:
            raise ValueError(
                f"the model has no site at the input of {path!r}: give it a rule with a_bits=32 "
                "and smooth=False, which rounds its weights alone"
            )
        chosen[path] = config
    return chosen


def site_of(path: str) -> str:
    """Site of the dense layer whose kernel stands at ``path``."""
    parts = path.split(tree.SEPARATOR)[:-1]
    return ".".join(part for part in parts if part != tree.STACK)


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


def _fresh(config: QuantConfig, shape: tuple[int, ...]) -> Params:
    made: Params = {}
    if _static(config):
        # NaN is seen; a made-up range would be a made-up model.
        made = {name: jnp.full(shape[0], jnp.nan, jnp.float32) for name in ("low", "high")}
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
