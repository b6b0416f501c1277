"""UniPELT: LoRA, prefix and adapter in one layer, each behind a gate of its own.

  G = mean over tokens of sigmoid(x_t . w + b)    one number an example and layer
  LoRA     Q = x W_Q + G_L (drop(x) A) B          the gate stands in place of alpha / r; V alike
  prefix   K = [G_P P_K ; x W_K],  V = [G_P P_V ; x W_V]
  adapter  h = f + G_A a(u),  u = LN(f + x),  f = feed_forward(x): Pfeiffer's

The gates of LoRA and prefix read the layer's input, that of the adapter reads u. Tokens are those
that ``attention_mask`` shows (``pool="all"``: padding too, as in the published code).

Mao et al., ACL 2022, arXiv 2110.07577.

Deviations: gates pool real tokens only; a prefix whose gate is shut still takes part in the
softmax with keys and values of 0, in the paper as here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.dropout import dropout
from steppe.models.layers import activation
from steppe.models.model import Rules
from steppe.models.overlays import adapter, lora, prefix
from steppe.models.overlays.overlay import WHOLE, Overlay, site_kernel
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

PARTS = ("adapter", "prefix", "lora")
PROJECTIONS = ("attn.q", "attn.v")


def overlay(
    *,
    parts: Sequence[str] = PARTS,
    gated: bool = True,
    rank: int = 8,
    alpha: float = 16.0,
    drop: float = 0.0,
    length: int = 10,
    reduction: int = 16,
    shared: bool = False,
    pool: Literal["mask", "all"] = "mask",
) -> Overlay:
    """The UniPELT overlay of an encoder: in a language model a gate, being a mean over the whole
    text, would see what is to be predicted.

    Args:
      parts: of ``adapter``, ``prefix``, ``lora``: (adapter, prefix) is the paper's AP.
      gated: False: all gates are 1, and LoRA is scaled by alpha / r.
      rank, alpha, drop: of LoRA on queries and values.
      length: of the prefix.
      reduction: the adapter's bottleneck is the model's width divided by it.
      shared: one gate for LoRA's two projections, as in the paper; its code has one each.
      pool: tokens that a gate is the mean over.

    Returns:
      An overlay whose delta is ``{"layers": {site: ...}}``; gates are ``{"w": [L, D], "b": [L]}``.
      Without gates and with LoRA alone it would merge: use ``lora`` for that.

    Raises:
      ValueError: no part or an unknown one, and what the parts themselves refuse.
    """
    if not parts or set(parts) - set(PARTS) or len(set(parts)) != len(parts):
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, each once, got {tuple(parts)}")
    if pool not in ("mask", "all"):
        raise ValueError(f"pool must be 'mask' or 'all', got {pool!r}")
    chosen = {}
    if "lora" in parts:
        chosen["lora"] = lora.overlay(rank=rank, alpha=alpha, drop=drop, sites=PROJECTIONS)
    if "prefix" in parts:
        chosen["prefix"] = prefix.overlay(length=length)
    if "adapter" in parts:
        chosen["adapter"] = adapter.overlay(kind="pfeiffer", reduction=reduction)
    relu = activation("relu")

    def init(key: jax.Array, params: Params) -> Params:
        layers, width, _ = site_kernel(params, "attn.q").shape
        made: Params = {}
        for name, own in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
            part_key, gate_key = jax.random.split(own)
            for site, delta in chosen[name].init(part_key, params)[tree.STACK].items():
                made[site] = delta
            if not gated:
                continue
            gates = _gate_sites(name, shared)
            for site, one in zip(gates, jax.random.split(gate_key, len(gates)), strict=True):
                w = 0.02 * jax.random.normal(one, (layers, width))
                made[site] = {**made[site], "gate": {"w": w, "b": jnp.zeros(layers)}}
        return {tree.STACK: made}

    def gate(own: Params, x: jax.Array, context: SiteContext) -> jax.Array | float:
        if not gated:
            return 1.0
        if context.step:
            raise ValueError(
                "unipelt's gates are means over the whole text, which is not known while it is "
                "written; use gated=False, or lora and prefix, in a model that generates"
            )
        return gate_of(own["gate"], x, context.mask if pool == "mask" else None)

    def low_rank(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        y = base(x)
        factor = gate(own, x, context) if gated else alpha / max(rank, 1)
        x = dropout(x, drop, context.rng if context.train else None)
        a, b = (own[n].astype(y.dtype) for n in "ab")
        return y + factor * ((x.astype(y.dtype) @ a) @ b)

    def in_front(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
        return prefix.in_front(own, x, base, context, scale=gate(own, x, context))

    def behind(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        y: jax.Array = base(x)
        u = adapter.normed_sum(y, context)
        return y + gate(own, u, context) * adapter.bottleneck(own, u, relu)

    def attach(delta: Params) -> dict[str, Site]:
        layers = delta[tree.STACK]
        fns = {
            "attn.q": low_rank,
            "attn.v": low_rank,
            "attn.kv_prefix": in_front,
            "ffn.out": behind,
        }
        if gated and shared and "attn.v" in layers:
            layers = {**layers, "attn.v": {**layers["attn.v"], "gate": layers["attn.q"]["gate"]}}
        # A gate is a mean over all tokens.
        return {name: Site(fns[name], own, tokenwise=not gated) for name, own in layers.items()}

    each = (rule for one in chosen.values() for rule in one.axes if rule != WHOLE)
    axes: Rules = (*each, WHOLE)
    settings = {"parts": tuple(parts), "gated": gated, "rank": rank, "alpha": alpha, "drop": drop}
    settings |= {"length": length, "reduction": reduction, "shared": shared, "pool": pool}
    return Overlay("unipelt", init, attach, None, axes, settings=tuple(settings.items()))


def gate_of(gate: Params, x: jax.Array, mask: Any) -> jax.Array:
    """G of one layer, [B, 1, 1] in the dtype of x.

    Args:
      gate: ``{"w": [D], "b": scalar}``.
      x: [B, T, D].
      mask: [B, T] non-zero = a token, or [B, T, S], or None.
    """
    score = jax.nn.sigmoid(
        x.astype(jnp.float32) @ gate["w"].astype(jnp.float32) + gate["b"].astype(jnp.float32)
    )
    if mask is None or x.shape[1] != jnp.shape(mask)[1]:
        return score.mean(1)[:, None, None].astype(x.dtype)
    shown = jnp.asarray(mask) != 0
    weight = (shown if shown.ndim == 2 else shown.any(1)).astype(jnp.float32)
    mean = (score * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
    return mean[:, None, None].astype(x.dtype)


def _gate_sites(part: str, shared: bool) -> tuple[str, ...]:
    sites = {
        "lora": PROJECTIONS[:1] if shared else PROJECTIONS,
        "prefix": ("attn.kv_prefix",),
        "adapter": ("ffn.out",),
    }
    return sites[part]
