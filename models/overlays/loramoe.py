"""LoRAMoE: several LoRA experts beside every matrix of the feed-forward, mixed by a soft router.

  w = softmax(x W_g) over E experts, in float32
  y = x W + b + s * sum_i w_i drop(x) A_i B_i,     s = alpha / r

Every projection has a router of its own. No token is dropped and no expert left out. A_i and W_g
are drawn uniformly from +-1 / sqrt(d_in), B_i = 0, so that the bound model starts as the base. What
the experts do depends on the input: there is no merged form.

While training, a localised balancing constraint sends the samples of two types to two halves of
the experts; see ``train.objectives.balance``, which listens for the routers' mass

  Q_{n, i} = sum over the tokens of sample n of w_i          [N, E] a layer and site

Dou et al., LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style
Plugin, ACL 2024, arXiv 2312.09979.

Deviations: one dropout mask for all experts, so that they are two matrix products together (the
published code draws one an expert, which would copy the input E times); padding counts in Q only
with ``padding=True``, as it does there.
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
from steppe.models.overlays.adapter import sites_of
from steppe.models.overlays.overlay import WHOLE, Overlay, site_kernel
from steppe.models.sites import Site, SiteContext, heard, tell
from steppe.models.tree import Params

# What a site tells: ``router_mass/ffn.in``.
ROUTER_MASS = "router_mass"
PROJECTIONS = ("ffn.in", "ffn.gate", "ffn.out")
_IN, _OUT = r"layers/(\w+\.)?ffn\.(in|gate)", r"layers/(\w+\.)?ffn\.out"
RULES: Rules = (
    (_IN + r"/a", (None, None, "fsdp", None)),
    (_IN + r"/b", (None, None, None, "model")),
    (_OUT + r"/a", (None, None, "model", None)),
    (_OUT + r"/b", (None, None, None, "fsdp")),
    WHOLE,
)


def overlay(
    *,
    experts: int = 6,
    rank: int = 4,
    alpha: float = 32.0,
    drop: float = 0.05,
    sites: Sequence[str] = PROJECTIONS,
    padding: bool = False,
) -> Overlay:
    """The LoRAMoE overlay.

    Args:
      experts: E of every projection; the balancing constraint needs an even number.
      rank: r of an expert; 0 is the base itself.
      alpha: numerator of the scale alpha / r.
      drop: dropout rate on the input of the experts; the router sees the input itself.
      sites: dense layers to adapt, of every stack, by the ends of their names. All three of the
        default are those of them that a model has (a gated feed-forward has three, others two);
        of any others it must have each.
      padding: count padded positions in the routers' mass, as the published code does.

    Returns:
      An overlay whose delta is ``{"layers": {site: {"a": [L, E, d_in, r], "b": [L, E, r, d_out],
      "router": [L, d_in, E]}}}``.

    Raises:
      ValueError: experts < 1, rank < 0, alpha not finite, no site, a bad dropout rate; from
        ``init``, a model without one of these sites, or a rank above a dimension of its matrices.
    """
    if experts < 1:
        raise ValueError(f"experts must be >= 1, got {experts}")
    if rank < 0:
        raise ValueError(f"rank must be >= 0, got {rank}")
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites must name at least one site, each once, got {tuple(sites)}")
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    scale = alpha / rank if rank else 0.0

    def init(key: jax.Array, params: Params) -> Params:
        names = sites_of(params, sites, each=set(sites) != set(PROJECTIONS))
        made = {}
        for name, own in zip(names, jax.random.split(key, len(names)), strict=True):
            layers, d_in, d_out = site_kernel(params, name).shape
            if rank > min(d_in, d_out):
                raise ValueError(
                    f"rank must be <= {min(d_in, d_out)} at site {name!r} "
                    f"(a {d_in} x {d_out} matrix), got {rank}"
                )
            a_key, router_key = jax.random.split(own)
            bound = d_in**-0.5

            def uniform(key: jax.Array, *shape: int, bound: float = bound) -> jax.Array:
                return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

            made[name] = {
                "a": uniform(a_key, layers, experts, d_in, rank),
                "b": jnp.zeros((layers, experts, rank, d_out)),
                "router": uniform(router_key, layers, d_in, experts),
            }
        return {tree.STACK: made}

    def branch(name: str) -> Callable[..., jax.Array]:
        def fn(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
            y: jax.Array = base(x)
            weights = routing(own["router"], x)
            if heard():
                shown = None if padding else context.mask
                tell(f"{ROUTER_MASS}/{name}", mass(weights, shown))
            x = dropout(x, drop, context.rng if context.train else None)
            a, b = (own[n].astype(y.dtype) for n in "ab")
            flat = x.astype(y.dtype).reshape(-1, x.shape[-1])
            inner = jnp.einsum("md,edr->mer", flat, a)
            inner = inner * weights.reshape(-1, experts, 1).astype(y.dtype)
            return y + scale * jnp.einsum("mer,ero->mo", inner, b).reshape(y.shape)

        return fn

    def attach(delta: Params) -> dict[str, Site]:
        # Who listens wants the mass of all tokens of the last layer too.
        alone = drop == 0.0 and not heard()
        if not rank and not heard():  # adding zeros is another program, and may round otherwise
            return {}
        return {
            name: Site(branch(name), own, tokenwise=alone)
            for name, own in delta[tree.STACK].items()
        }

    settings = {"experts": experts, "rank": rank, "alpha": alpha, "drop": drop}
    more = (("sites", tuple(sites)), ("padding", padding))
    return Overlay("loramoe", init, attach, None, RULES, settings=(*settings.items(), *more))


def routing(router: jax.Array, x: jax.Array) -> jax.Array:
    """Weights of the experts, float32 [..., E], for inputs [..., d_in]."""
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1)


def mass(weights: jax.Array, mask: Any = None) -> jax.Array:
    """Q: weights [N, T, E] summed over the tokens of each sample, [N, E].

    Args:
      mask: [N, T] non-zero = a token, or [N, T, S], or None = all positions.
    """
    if mask is None:
        return weights.sum(1)
    shown = jnp.asarray(mask) != 0
    shown = shown if shown.ndim == 2 else shown.any(1)
    return (weights * shown[..., None]).sum(1)
