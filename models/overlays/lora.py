"""LoRA: a low-rank update beside a frozen dense layer.

  y = x W + b + s * drop(x) A B,     A in R^{d_in x r}, B in R^{r x d_out},   s = alpha / r

A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, so the bound model starts as the base. Merged:
W' = W + s A B. With ``rank_stabilised``, s = alpha / sqrt(r) (Kalajdzievski 2023, 2312.03732).

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685.

Deviations: our kernels are (in, out), so A and B here are the transposes of the paper's; the
published code initialises A with Kaiming-uniform(a = sqrt 5), which is the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.dropout import dropout
from steppe.models.model import Rules
from steppe.models.overlays.overlay import Overlay, site_kernel, site_path
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

# A is split like its matrix's inputs, B like its outputs; the rank never is.
_IN = r"layers/(\w+\.)?((attn|cross)\.[qkv]|ffn\.(in|gate)|ssru\.(in|forget))"
_OUT = r"layers/(\w+\.)?((attn|cross)\.o|ffn\.out)"
RULES: Rules = (
    (_IN + r"/a", (None, "fsdp", None)),
    (_IN + r"/b", (None, None, "model")),
    (_OUT + r"/a", (None, "model", None)),
    (_OUT + r"/b", (None, None, "fsdp")),
)


def overlay(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    sites: Sequence[str] = ("attn.q", "attn.v"),
    drop: float = 0.0,
    rank_stabilised: bool = False,
) -> Overlay:
    """The LoRA overlay.

    Args:
      rank: r; 0 is the base itself.
      alpha: numerator of the scale.
      sites: dense layers to adapt, of ``attn.q|k|v|o`` and ``ffn.in|gate|out``; those of an
        encoder-decoder begin with the stack (``encoder.attn.q``, ``decoder.cross.v``).
      drop: dropout rate on the branch's input.
      rank_stabilised: scale by alpha / sqrt(r) instead of alpha / r.

    Returns:
      An overlay whose delta is ``{"layers": {site: {"a": [L, d_in, r], "b": [L, r, d_out]}}}``.

    Raises:
      ValueError: a negative rank, no site, a site given twice, a bad dropout rate, alpha that is
        not finite; and from ``init``, a site that the model lacks or a rank above a dimension of
        its matrix.

    Example:
      >>> from steppe.models import EncoderConfig, tree
      >>> config = EncoderConfig("bert", 50, 16, 2, heads=2, ffn_width=32, positions=20)
      >>> params = config.build().init(jax.random.key(0))
      >>> delta = overlay(rank=4).init(jax.random.key(1), params)
      >>> tree.count(delta)  # 2 layers x 2 sites x (16 x 4 + 4 x 16)
      512
    """
    if rank < 0:
        raise ValueError(f"rank must be >= 0, got {rank}")
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites must name at least one site, each once, got {tuple(sites)}")
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    names = tuple(sites)
    scale = 0.0 if rank == 0 else alpha / (math.sqrt(rank) if rank_stabilised else rank)

    def init(key: jax.Array, params: Params) -> Params:
        delta = {}
        for name, site_key in zip(names, jax.random.split(key, len(names)), strict=True):
            layers, d_in, d_out = site_kernel(params, name).shape
            if rank > min(d_in, d_out):
                raise ValueError(
                    f"rank must be <= {min(d_in, d_out)} at site {name!r} "
                    f"(a {d_in} x {d_out} matrix), got {rank}"
                )
            bound = 1.0 / math.sqrt(d_in)
            a = jax.random.uniform(site_key, (layers, d_in, rank), minval=-bound, maxval=bound)
            delta[name] = {"a": a, "b": jnp.zeros((layers, rank, d_out))}
        return {tree.STACK: delta}

    def branch(delta: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        y = base(x)
        x = dropout(x, drop, context.rng if context.train else None)
        a, b = (delta[n].astype(y.dtype) for n in "ab")
        flat = x.astype(y.dtype).reshape(-1, x.shape[-1])
        return y + scale * ((flat @ a) @ b).reshape(y.shape)

    def attach(delta: Params) -> dict[str, Site]:
        return {
            name: Site(branch, delta[tree.STACK][name], tokenwise=drop == 0.0) for name in names
        }

    def rows(deltas: Params, ids: jax.Array) -> dict[str, Site]:
        # Low-rank products of every example with its own A and B: no matrix an example is made.
        def fn(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
            y: jax.Array = base(x)
            x = dropout(x, drop, context.rng if context.train else None)
            a, b = (own[n].astype(y.dtype) for n in "ab")
            inner = jnp.einsum("btd,bdr->btr", x.astype(y.dtype), a)
            return y + scale * jnp.einsum("btr,bro->bto", inner, b)

        chosen = tree.rows(deltas[tree.STACK], ids, axis=1)
        return {name: Site(fn, chosen[name], tokenwise=drop == 0.0) for name in names}

    def merge(params: Params, delta: Params) -> Params:
        folded = {}
        for name in names:
            kernel = site_kernel(params, name)
            low = {n: delta[tree.STACK][name][n].astype(jnp.float32) for n in "ab"}
            update = scale * jnp.einsum("lir,lro->lio", low["a"], low["b"])
            new = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
            folded[site_path(params, name)] = new
        return tree.replace(params, folded)

    settings = {"rank": rank, "alpha": alpha, "sites": names, "drop": drop}
    settings["rank_stabilised"] = rank_stabilised
    return Overlay("lora", init, attach, merge, RULES, settings=tuple(settings.items()), rows=rows)
