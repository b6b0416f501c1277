"""PHM layers and Compacter: adapters whose maps are sums of Kronecker products.

  y = x H + b,   H = sum_{i=1..n} A_i (x) B_i,   A_i in R^{n x n},  B_i in R^{d_in/n x d_out/n}
  H[p K + k, q O + o] = sum_i A_i[p, q] B_i[k, o],   K = d_in / n,  O = d_out / n

Compacter: bottleneck adapters after attention and feed-forward (Compacter++: feed-forward only)
whose two maps are PHM layers with B_i = s_i t_i^T of rank 1, and one A for all of them. H is never
formed: x is read as [n, K], contracted with s first.

Karimi Mahabadi, Henderson, Ruder, NeurIPS 2021, arXiv 2106.04647; PHM: Zhang et al., ICLR 2021,
arXiv 2102.08597.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.layers import activation
from steppe.models.overlays.adapter import NORMS, sites_of
from steppe.models.overlays.overlay import Overlay, site_kernel
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params


def overlay(
    *,
    n: int = 4,
    reduction: int = 32,
    plus: bool = False,
    act: str = "gelu_tanh",
    train_norms: bool = True,
) -> Overlay:
    """The Compacter overlay.

    Args:
      n: terms of the sum; it divides the model's width and the bottleneck's.
      reduction: the bottleneck is the model's width divided by it.
      plus: Compacter++: no adapter after attention.
      act: activation between the two maps.
      train_norms: whether norms of the base train too.

    Returns:
      An overlay whose delta is ``{"shared": {"a": [n, n, n]}, "layers": {site: {"down", "up"}}}``,
      each map with ``s`` [L, n, d_in/n], ``t`` [L, n, d_out/n], ``bias`` [L, d_out]. It has no
      merged form.

    Raises:
      ValueError: n < 1 or reduction < 1; from ``init``, n does not divide one of the widths.
    """
    if n < 1 or reduction < 1:
        raise ValueError(f"n and reduction must be >= 1, got {n} and {reduction}")
    run = activation(act)
    ends = ("ffn.out",) if plus else ("attn.o", "cross.o", "ffn.out")

    def init(key: jax.Array, params: Params) -> Params:
        names = sites_of(params, ends)
        shared, *keys = jax.random.split(key, len(names) + 1)
        made = {}
        for name, own in zip(names, keys, strict=True):
            layers, _, width = site_kernel(params, name).shape
            inner = width // reduction
            for what, size in (("width", width), ("bottleneck", inner)):
                if size < 1 or size % n:
                    raise ValueError(
                        f"n={n} must divide the model's {what} {size} (reduction={reduction})"
                    )
            down, up = jax.random.split(own)
            made[name] = {
                "down": _map(down, layers, n, width, inner),
                "up": _map(up, layers, n, inner, width),
            }
        return {"shared": {"a": 0.01 * jax.random.normal(shared, (n, n, n))}, tree.STACK: made}

    def attach(delta: Params) -> dict[str, Site]:
        a = delta["shared"]["a"]

        def fn(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
            y: jax.Array = base(x)
            inside = run(phm_low_rank(y, a, **own["down"]))
            return y + phm_low_rank(inside, a, **own["up"])

        return {name: Site(fn, own, tokenwise=True) for name, own in delta[tree.STACK].items()}

    settings = {"n": n, "reduction": reduction, "plus": plus, "act": act}
    settings["train_norms"] = train_norms
    return Overlay(
        "compacter++" if plus else "compacter",
        init,
        attach,
        None,
        trainable=NORMS if train_norms else (),
        settings=tuple(settings.items()),
    )


def phm(x: jax.Array, a: jax.Array, b: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """y = x H + bias without forming H.

    Args:
      x: [..., d_in].
      a: [n, n, n], A_i on axis 0.
      b: [n, d_in / n, d_out / n].
      bias: [d_out].
    """
    n, k, o = b.shape
    parts = x.reshape(*x.shape[:-1], n, k)
    y = jnp.einsum("...pk,ipq,iko->...qo", parts, a.astype(x.dtype), b.astype(x.dtype))
    y = y.reshape(*x.shape[:-1], n * o)
    return y if bias is None else y + bias.astype(x.dtype)


def phm_low_rank(
    x: jax.Array, a: jax.Array, s: jax.Array, t: jax.Array, bias: jax.Array
) -> jax.Array:
    """:func:`phm` with B_i = s_i t_i^T: s [n, d_in / n], t [n, d_out / n]."""
    n, k = s.shape
    a, s, t = (leaf.astype(x.dtype) for leaf in (a, s, t))
    inner = jnp.einsum("...pk,ik->...ip", x.reshape(*x.shape[:-1], n, k), s)
    y = jnp.einsum("...ip,ipq,io->...qo", inner, a, t)
    return y.reshape(*x.shape[:-1], -1) + bias.astype(x.dtype)


def _map(key: jax.Array, layers: int, n: int, d_in: int, d_out: int) -> Params:
    """Glorot-uniform for each i, as B_i = s_i t_i^T with s [K, 1] and t [1, O]."""
    s_key, t_key = jax.random.split(key)

    def glorot(key: jax.Array, size: int) -> jax.Array:
        bound = (6.0 / (size + 1)) ** 0.5
        return jax.random.uniform(key, (layers, n, size), minval=-bound, maxval=bound)

    return {
        "s": glorot(s_key, d_in // n),
        "t": glorot(t_key, d_out // n),
        "bias": jnp.zeros((layers, d_out)),
    }
