"""(IA)^3: learned vectors that scale keys, values and the inner activation of the feed-forward.

  K <- l_k * (x W_k + b_k),   V <- l_v * (x W_v + b_v),   y = W_2 (l_ff * act(x W_1 + b_1)) + b_2

All of them are 1 at the start. Keys are scaled before they are rotated. In a gated feed-forward
``act(gate) * in`` the linear branch is scaled, which is the same product. Merged, l_k and l_v go
into the columns of W_k and W_v and their biases, l_ff into the rows of W_2.

Liu et al., NeurIPS 2022, arXiv 2205.05638.

Deviation: l_ff is folded into the rows of W_2, not the columns of W_1 as the paper's gated network
allows: with ``act`` in between only the first is exact for every network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.model import Rules
from steppe.models.overlays.overlay import WHOLE, Overlay, site_kernel, site_path
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

SITES = ("attn.k", "attn.v", "ffn.out")
RULES: Rules = ((r"layers/.*", (None, "model")), WHOLE)


def overlay(*, sites: Sequence[str] = SITES) -> Overlay:
    """The (IA)^3 overlay.

    Args:
      sites: dense layers whose output is scaled; of ``ffn.out`` the input. An encoder-decoder's
        begin with the stack, such as ``decoder.cross.k``.

    Returns:
      An overlay whose delta is ``{"layers": {site: [L, d]}}``, d being the outputs of the layer
      (of ``ffn.out`` the inputs). Give it no weight decay, which would pull the ones to 0.

    Raises:
      ValueError: no site, one given twice, or from ``init`` one that the model lacks.
    """
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites must name at least one site, each once, got {tuple(sites)}")
    names = tuple(sites)

    def init(key: jax.Array, params: Params) -> Params:
        shapes = {name: site_kernel(params, name).shape for name in names}
        return {
            tree.STACK: {n: jnp.ones((s[0], s[1 if _inner(n) else 2])) for n, s in shapes.items()}
        }

    def attach(delta: Params) -> dict[str, Site]:
        return {
            name: Site(_before if _inner(name) else _after, delta[tree.STACK][name], tokenwise=True)
            for name in names
        }

    def merge(params: Params, delta: Params) -> Params:
        folded = {}
        for name in names:
            scale = delta[tree.STACK][name].astype(jnp.float32)
            path = site_path(params, name)
            kernel = tree.get(params, path)
            wide = scale[:, :, None] if _inner(name) else scale[:, None, :]
            folded[path] = (kernel.astype(jnp.float32) * wide).astype(kernel.dtype)
            bias_path = path.removesuffix("kernel") + "bias"
            if not _inner(name) and bias_path in tree.paths(params):
                bias = tree.get(params, bias_path)
                folded[bias_path] = (bias.astype(jnp.float32) * scale).astype(bias.dtype)
        return tree.replace(params, folded)

    return Overlay("ia3", init, attach, merge, RULES, settings=(("sites", names),))


def _inner(site: str) -> bool:
    """Whether the vector scales the input of this layer."""
    return site.split(".")[-2:] == ["ffn", "out"]


def _after(scale: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
    y = base(x)
    return y * scale.astype(y.dtype)


def _before(scale: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
    y: jax.Array = base(x * scale.astype(x.dtype))
    return y
