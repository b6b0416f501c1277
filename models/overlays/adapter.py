"""Bottleneck adapters: a small network beside or behind a frozen sublayer.

  a(u) = W_up act(W_down u + b_d) + b_u,   W_down: D -> m,   W_up: m -> D

  houlsby    h = sublayer(x) + a(sublayer(x)), after attention and after the feed-forward; norms
             of the base train
  pfeiffer   h = f + a(LN(f + x)), f = feed_forward(x), LN being the norm that follows the sum
             (in a pre-norm layer, that before the feed-forward)
  parallel   h = f + s a(x), x being what the feed-forward reads

In each the residual and the norm of the base come after h.

Houlsby et al., ICML 2019, arXiv 1902.00751; Pfeiffer et al., EACL 2021, 2005.00247; parallel: He
et al., ICLR 2022, 2110.04366.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.layers import activation
from steppe.models.model import Rules
from steppe.models.overlays.overlay import WHOLE, Overlay, kernel_paths, site_kernel
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

Kind = Literal["houlsby", "pfeiffer", "parallel"]
KINDS: tuple[str, ...] = Kind.__args__  # type: ignore[attr-defined]
RULES: Rules = (
    (r"layers/.*/down/kernel", (None, "fsdp", None)),
    (r"layers/.*/up/kernel", (None, None, "fsdp")),
    WHOLE,
)
NORMS = (r"(?:.*/)?\w*norm/(?:scale|bias)",)


def overlay(
    *,
    kind: Kind = "pfeiffer",
    width: int = 0,
    reduction: int = 16,
    act: str = "relu",
    scale: float | None = None,
    std: float | None = None,
    train_norms: bool | None = None,
) -> Overlay:
    """An adapter in every layer of every stack.

    Args:
      kind: where it stands, see the module.
      width: m; 0 = the model's width divided by ``reduction``.
      act: activation between its two maps.
      scale: s; default 4 for parallel adapters, 1 for the others.
      std: of the normal initial values of both kernels, cut off at 2 std; default 0.01 for
        houlsby, 0.02 for pfeiffer. A parallel adapter draws W_down uniformly in
        +-sqrt(1 / D) and begins with W_up = 0, so that it is the base.
      train_norms: whether norms of the base train too; default: with houlsby.

    Returns:
      An overlay whose delta is ``{"layers": {site: {"down": {"kernel" [L, D, m], "bias"}, "up":
      {"kernel" [L, m, D], "bias"}}}}``; it has no merged form.

    Raises:
      ValueError: an unknown kind or activation, width < 0, reduction < 1, a width of nothing,
        a scale or std that is not finite, std < 0.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if width < 0 or reduction < 1:
        raise ValueError(f"width must be >= 0 and reduction >= 1, got {width} and {reduction}")
    run = activation(act)
    factor = (4.0 if kind == "parallel" else 1.0) if scale is None else scale
    spread = (0.01 if kind == "houlsby" else 0.02) if std is None else std
    if not math.isfinite(factor):
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 <= spread < math.inf:
        raise ValueError(f"std must be >= 0 and finite, got {std}")
    ends = ("attn.o", "cross.o", "ffn.out") if kind == "houlsby" else ("ffn.out",)

    def init(key: jax.Array, params: Params) -> Params:
        names = sites_of(params, ends)
        made = {}
        for name, own in zip(names, jax.random.split(key, len(names)), strict=True):
            layers, _, features = site_kernel(params, name).shape
            inner = width or features // reduction
            if inner < 1:
                raise ValueError(
                    f"reduction={reduction} leaves nothing of the width {features}; take a smaller "
                    "one, or give width"
                )
            made[name] = start(own, layers, features, inner, spread, kind == "parallel")
        return {tree.STACK: made}

    def attach(delta: Params) -> dict[str, Site]:
        def fn(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
            y: jax.Array = base(x)
            return y + factor * bottleneck(own, read(y, context), run)

        return {name: Site(fn, own, tokenwise=True) for name, own in delta[tree.STACK].items()}

    read = {"houlsby": output, "pfeiffer": normed_sum, "parallel": inputs}[kind]
    norms = kind == "houlsby" if train_norms is None else train_norms
    settings: dict[str, Any] = {"kind": kind, "width": width, "reduction": reduction, "act": act}
    settings |= {"scale": factor, "std": spread, "train_norms": norms}
    return Overlay(
        f"adapter-{kind}",
        init,
        attach,
        None,
        RULES,
        NORMS if norms else (),
        tuple(settings.items()),
    )


def bottleneck(own: Params, u: jax.Array, act: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """a(u) of one layer, [B, T, D] -> [B, T, D], in the dtype of u."""
    down, up = (jax.tree.map(lambda leaf: leaf.astype(u.dtype), own[n]) for n in ("down", "up"))
    flat = act(u.reshape(-1, u.shape[-1]) @ down["kernel"] + down["bias"])
    return (flat @ up["kernel"] + up["bias"]).reshape(u.shape)


def output(y: jax.Array, context: SiteContext) -> jax.Array:
    """What the sublayer gives."""
    return y


def normed_sum(y: jax.Array, context: SiteContext) -> jax.Array:
    """Output and residual through the norm of the sublayer."""
    assert context.residual is not None
    assert context.norm is not None
    return context.norm(y + context.residual)


def inputs(y: jax.Array, context: SiteContext) -> jax.Array:
    """What the feed-forward reads."""
    assert context.inputs is not None
    return context.inputs


def sites_of(params: Params, ends: Sequence[str], *, each: bool = False) -> list[str]:
    """Dense layers of all stacks whose names end so, by whole parts: ``ffn.in`` is one of ``in``
    and of ``ffn.in``, not of ``n``.

    Args:
      each: every one of ``ends`` must be an end of some layer, as those that a user has named.

    Raises:
      ValueError: there is none; with ``each``, none of one of them.
    """
    dense = kernel_paths(params)
    by_end = {end: [n for n in dense if f".{n}".endswith(f".{end}")] for end in ends}
    void = [end for end, names in by_end.items() if not names]
    if len(void) == len(by_end) or (each and void):
        raise ValueError(
            f"this model has no dense layer {' or '.join(void)}; there are "
            f"{', '.join(sorted(dense))}"
        )
    return [name for name in dense if any(name in names for names in by_end.values())]


def start(key: jax.Array, layers: int, width: int, inner: int, std: float, zero: bool) -> Params:
    """Initial values; see :func:`overlay`."""
    down_key, up_key = jax.random.split(key)

    def cut_normal(key: jax.Array, *shape: int) -> jax.Array:
        return std * jax.random.truncated_normal(key, -2.0, 2.0, (layers, *shape))

    bound = width**-0.5
    if zero:
        down = jax.random.uniform(down_key, (layers, width, inner), minval=-bound, maxval=bound)
        up = jnp.zeros((layers, inner, width))
    else:
        down, up = cut_normal(down_key, width, inner), cut_normal(up_key, inner, width)
    return {
        "down": {"kernel": down, "bias": jnp.zeros((layers, inner))},
        "up": {"kernel": up, "bias": jnp.zeros((layers, width))},
    }
