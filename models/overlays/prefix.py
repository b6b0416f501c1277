"""Prefix tuning: learned keys and values in front of those of every attention layer.

  K = [P_K ; x W_K],   V = [P_V ; x W_V],   P in R^{P x E} a layer

A prefix is visible to every query, has no queries and no positions of its own: the tokens of the
text stay where they were. Where attention has a bias by distance, it is 0 for the prefix. While
it is learnt it may be the output of a small network,

  P = tanh(E W_1 + b_1) W_2 + b_2,   E in R^{P x D},  W_1: D -> ``hidden``,  W_2 -> 2 L E

of which ``fold`` keeps the P alone. W_2's output is keys, values, keys, ... by layer.

Li and Liang, ACL 2021, arXiv 2101.00190; without the network: P-tuning v2, Liu et al., ACL 2022,
arXiv 2110.07602.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.model import Rules
from steppe.models.overlays.overlay import WHOLE, Overlay, kernel_paths, site_kernel
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

SITE = "kv_prefix"
# Keys and values are split over heads as the projections are.
RULES: Rules = ((r"layers/.*/[kv]", (None, None, "model")), WHOLE)


def overlay(
    *,
    length: int = 10,
    attentions: Sequence[str] = ("attn",),
    hidden: int = 0,
    std: float = 0.02,
) -> Overlay:
    """The prefix overlay.

    Args:
      length: P, rows in front.
      attentions: ``attn``; of an encoder-decoder any of ``encoder.attn``, ``decoder.attn``,
        ``decoder.cross``.
      hidden: width of the network that makes the prefix; 0 = the prefix itself is learnt.
      std: of the normal initial values, of the prefix itself without a network.

    Returns:
      An overlay whose delta is ``{"layers": {"attn.kv_prefix": {"k", "v"}}}``, each
      [L, P, Hkv Dh]; with a network ``{"attn": {"embedding", "in", "out"}}``, the kernel of
      ``out`` being [hidden, 2 L, Hkv Dh]. It has no merged
      form: a prefix is no change of weights.

    Raises:
      ValueError: length < 1, hidden < 0, std < 0 or not finite, no attention or one that the
        model lacks.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    if hidden < 0:
        raise ValueError(f"hidden must be >= 0, got {hidden}")
    if not 0 <= std < math.inf:
        raise ValueError(f"std must be >= 0 and finite, got {std}")
    if not attentions or len(set(attentions)) != len(attentions):
        raise ValueError(f"attentions must be given, each once, got {tuple(attentions)}")
    names = tuple(attentions)

    def init(key: jax.Array, params: Params) -> Params:
        made: Params = {}
        for name, own in zip(names, jax.random.split(key, len(names)), strict=True):
            layers, width, inner = _key_shape(params, name)
            if not hidden:
                k, v = jax.random.normal(own, (2, layers, length, inner)) * std
                made.setdefault(tree.STACK, {})[f"{name}.{SITE}"] = {"k": k, "v": v}
                continue
            keys = jax.random.split(own, 3)
            made[name] = {
                "embedding": jax.random.normal(keys[0], (length, width)),
                "in": _dense(keys[1], width, hidden),
                "out": _dense(keys[2], hidden, 2 * layers, inner),
            }
        return made

    def attach(delta: Params) -> dict[str, Site]:
        layers = fold(delta)[tree.STACK] if hidden else delta[tree.STACK]
        return {name: Site(in_front, layers[name]) for name in (f"{n}.{SITE}" for n in names)}

    settings = (("length", length), ("attentions", names), ("hidden", hidden), ("std", std))
    return Overlay("prefix", init, attach, None, RULES, settings=settings)


def fold(delta: Params) -> Params:
    """The prefix that a network makes, as the delta of ``overlay(hidden=0)``.

    Args:
      delta: of an overlay with a network.
    """
    found = {}
    for name, made in delta.items():
        rows = jnp.tanh(made["embedding"] @ made["in"]["kernel"] + made["in"]["bias"])
        each = jnp.einsum("ph,hle->lpe", rows, made["out"]["kernel"]) + made["out"]["bias"][:, None]
        # [2 L, P, E]: keys of layer 0, values of layer 0, keys of layer 1, ...
        found[f"{name}.{SITE}"] = {"k": each[0::2], "v": each[1::2]}
    return {tree.STACK: found}


def in_front(
    delta: Any,
    x: Any,
    base: Callable[[Any], Any],
    context: SiteContext,
    scale: Any = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The site function: delta ``{"k", "v"}`` [P, Hkv Dh] of one layer -> [B, P, Hkv, Dh] each.

    ``scale`` is 1, or [B, 1, 1], by which the rows of an example are multiplied.

    Raises:
      ValueError: a prefix of another width, or one that has not as many keys as values.
    """
    keys, values = base(x)
    if context.step:  # it stands in the cache already
        return keys, values
    batch, _, heads, dim = keys.shape
    if delta["k"].shape[-1] != heads * dim or delta["v"].shape != delta["k"].shape:
        raise ValueError(
            f"a prefix for {heads} heads of {dim} has rows of {heads * dim}, got keys "
            f"{tuple(delta['k'].shape)} and values {tuple(delta['v'].shape)}"
        )

    def rows(leaf: jax.Array, behind: jax.Array) -> jax.Array:
        own = leaf.astype(behind.dtype).reshape(1, -1, heads, dim)
        if not isinstance(scale, float):
            own = own * scale[..., None].astype(own.dtype)
        return jnp.concatenate([jnp.broadcast_to(own, (batch, *own.shape[1:])), behind], axis=1)

    return rows(delta["k"], keys), rows(delta["v"], values)


def _key_shape(params: Params, attention: str) -> tuple[int, int, int]:
    """(L, D, Hkv Dh) of an attention's key projection.

    Raises:
      ValueError: the model has no such attention.
    """
    known = sorted(s.removesuffix(".k") for s in kernel_paths(params) if s.endswith(".k"))
    if attention not in known:
        raise ValueError(f"no attention {attention!r} in this model; there are {', '.join(known)}")
    layers, width, inner = site_kernel(params, f"{attention}.k").shape
    return layers, width, inner


def _dense(key: jax.Array, d_in: int, *d_out: int) -> Params:
    bound = d_in**-0.5
    kernel, bias = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel, (d_in, *d_out), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, d_out, minval=-bound, maxval=bound),
    }
