"""What goes into the dense layers: ranges and magnitudes of their inputs, and how they are kept.

  absmax       smallest and largest value of all batches
  ema          moving average of each batch's smallest and largest, decay 0.99
  percentile   mean over batches of the (100 - p)- and p-percentile of all entries of a layer

Values are read at the sites of the float model and leave the scan over layers as the "gradient"
of a slot, as Gram matrices do (``train.merge.regmean``). Tokens that the attention mask hides
do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import quantized, tree
from steppe.models.model import Model
from steppe.models.overlays.overlay import kernel_paths
from steppe.models.quantized import Quantized, QuantRules
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params
from steppe.train.merge.regmean import collect_grams

Method = Literal["ema", "absmax", "percentile"]
METHODS = ("ema", "absmax", "percentile")
# (input [..., in] in float32, which tokens count [..., 1] or None) -> what is read of it
Statistic = Callable[[jax.Array, jax.Array | None], jax.Array]


def ranges(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    rules: QuantRules,
    *,
    method: Method = "ema",
    decay: float = 0.99,
    percentile: float = 99.9,
) -> Params:
    """``params`` with the ranges of the inputs of all layers whose ``a_mode`` is "static".

    Args:
      model: the float model, or a quantised one, whose base is meant.
      params: float parameters; their ``smooth`` entries count.
      batches: inputs of the model; of a generator's see ``generator.feeding``.
      rules: how the model is to be quantised.
      method: see the module.
      decay: of "ema".
      percentile: of "percentile", above 50 and at most 100.

    Raises:
      ValueError: no batch, an unknown method, a number out of range, NaN or infinity in an
        input (the site and the layer are named), no layer with a static range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must lie in (50, 100], got {percentile}")
    base = base_of(model)
    chosen = quantized.resolve(base, rules)
    sites = {
        quantized.site_of(path): path
        for path, c in chosen.items()
        if c.a_mode == "static" and c.a_bits != fq.BYPASS
    }
    if not sites:
        raise ValueError("rules have no a_mode='static' layer: there is no range to calibrate")

    def extremes(x: jax.Array, live: jax.Array | None) -> jax.Array:
        low, high = fq.bounds(x, range(x.ndim), live)
        return jnp.stack([low.reshape(()), high.reshape(())])

    def quantiles(x: jax.Array, live: jax.Array | None) -> jax.Array:
        hidden = x if live is None else jnp.where(live, x, jnp.nan)
        share = jnp.asarray([1 - percentile / 100, percentile / 100])
        found = jnp.nanquantile(hidden, share)
        whole = jnp.isfinite(x if live is None else jnp.where(live, x, 0.0)).all()
        return jnp.where(whole, found, jnp.nan)

    statistic = quantiles if method == "percentile" else extremes
    kept: dict[str, jax.Array] = {}
    seen = observe(base, params, batches, statistic, list(sites))
    for count, found in enumerate(seen, 1):
        for site, value in found.items():
            check_inputs(value, site)
            old = kept.get(site)
            if old is None:
                kept[site] = value
            elif method == "ema":
                low, high = fq.ema_range((old[:, 0], old[:, 1]), (value[:, 0], value[:, 1]), decay)
                kept[site] = jnp.stack([low, high], axis=1)
            elif method == "absmax":
                low, high = jnp.minimum(old, value)[:, 0], jnp.maximum(old, value)[:, 1]
                kept[site] = jnp.stack([low, high], axis=1)
            else:
                kept[site] = old + (value - old) / count
    made = {site: {"low": value[:, 0], "high": value[:, 1]} for site, value in kept.items()}
    return with_entries(params, made)


def magnitudes(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    sites: list[str] | None = None,
) -> dict[str, jax.Array]:
    """site -> largest magnitude [L, in] of every input of a layer, over all batches.

    Raises:
      ValueError: no batch, NaN or infinity in an input.
    """
    base = base_of(model)
    if sites is None:
        sites = [s for s in kernel_paths(quantized.unquant(params)[0]) if s in base.sites]

    def largest(x: jax.Array, live: jax.Array | None) -> jax.Array:
        size = jnp.abs(x) if live is None else jnp.where(live, jnp.abs(x), 0.0)
        return size.reshape(-1, x.shape[-1]).max(0)

    kept: dict[str, jax.Array] = {}
    for found in observe(base, params, batches, largest, sites):
        for site, value in found.items():
            check_inputs(value, site)
            kept[site] = jnp.maximum(kept[site], value) if site in kept else value
    return kept


def grams(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    sites: list[str] | None = None,
) -> Params:
    """X^T X / n of the inputs of the layers, see ``train.merge.collect_grams``.

    Raises:
      ValueError: as there; NaN or infinity in an input (the site and the layer are named).
    """
    found = collect_grams(base_of(model), quantized.unquant(params)[0], batches, sites=sites)
    for path, gram in tree.flatten(found).items():
        check_inputs(gram, quantized.site_of(path), layered=tree.is_stacked(path))
    return found


def observe(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    statistic: Statistic,
    sites: list[str],
) -> Iterable[dict[str, jax.Array]]:
    """What ``statistic`` reads of the inputs of every layer: site -> [L, ...], batch by batch.

    Raises:
      ValueError: there is no batch.
    """
    own, extra = quantized.unquant(params)
    paths = kernel_paths(own)
    tap = _tap(statistic)

    def attached(slots: Mapping[str, Any]) -> dict[str, Site]:
        def fn(delta: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
            slot, smooth = delta
            wide = x.astype(jnp.float32)
            wide = wide if smooth is None else wide / smooth
            live = quantized.shown(context.mask, x.shape)
            return tap(slot, wide, live, base(x))

        return {site: Site(fn, (slots[site], extra.get(site, {}).get("smooth"))) for site in sites}

    def outputs(slots: Mapping[str, Any], params: Params, batch: Mapping[str, Any]) -> jax.Array:
        out = model.apply(params, batch, sites=attached(slots))
        whole = out.hidden.astype(jnp.float32).sum()
        return whole if out.logits is None else whole + out.logits.astype(jnp.float32).sum()

    slots = {}
    for site in sites:
        layers, width, _ = tree.get(own, paths[site]).shape
        read = jax.eval_shape(
            lambda x: statistic(x, None), jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
        )
        slots[site] = jnp.zeros((layers, *read.shape), jnp.float32)
    run = jax.jit(jax.grad(outputs))
    seen = False
    for batch in batches:
        seen = True
        yield run(slots, own, dict(batch))
    if not seen:
        raise ValueError("batches must not be empty: there is no input to look at")


def with_entries(params: Params, entries: Mapping[str, Mapping[str, Any]]) -> Params:
    """``params`` with entries below ``quant``, beside those that are there."""
    own, extra = quantized.unquant(params)
    sites = {*extra, *entries}
    merged = {s: {**extra.get(s, {}), **entries.get(s, {})} for s in sorted(sites)}
    return quantized.requant(own, merged)


def base_of(model: Model) -> Model:
    """The float model under a quantised one."""
    return model.base if isinstance(model, Quantized) and model.base is not None else model


def check_inputs(found: jax.Array, site: str, *, layered: bool = True) -> None:
    """Raises ValueError for NaN or infinity in what was read at a site, [L, ...] if layered."""
    fine = jnp.isfinite(found).reshape(found.shape[0] if layered else 1, -1).all(1)
    if not bool(fine.all()):
        where = f" in layer {int(jnp.argmin(fine))}" if layered else ""
        raise ValueError(
            f"the input of {site!r} holds NaN or infinity{where}: look at the parameters and the "
            "batch, there is no range to quantize to"
        )


def _tap(statistic: Statistic) -> Callable[..., jax.Array]:
    """``(slot, x, live, y) -> y`` whose gradient for the slot is what is read of x."""

    @jax.custom_vjp
    def tap(slot: jax.Array, x: jax.Array, live: jax.Array | None, y: jax.Array) -> jax.Array:
        return y

    def forward(slot: Any, x: Any, live: Any, y: Any) -> tuple[jax.Array, jax.Array]:
        return y, statistic(x, live)

    def backward(read: jax.Array, grad: jax.Array) -> tuple[Any, Any, Any, Any]:
        return read, None, None, grad

    tap.defvjp(forward, backward)
    return tap
