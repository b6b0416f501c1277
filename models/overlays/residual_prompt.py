"""Residual prompt tuning: a prompt that is learnt through a small network with a bypass.

  phi(p) = LN(relu(p W_down + b_down) W_up + b_up),   P'_i = phi(P_i) + P_i,   input [P' ; E(x)]

The network sees one row of the prompt at a time; LN stands inside the branch. After training P' is
all that is needed: ``fold`` gives the delta of a plain prompt.

Razdaibiedina et al., Findings of ACL 2023, arXiv 2305.03937.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from steppe.models.overlays import prompt
from steppe.models.overlays.overlay import Overlay
from steppe.models.sites import Site
from steppe.models.tree import Params

EPSILON = 1e-5


def overlay(
    *,
    length: int = 10,
    bottleneck: int = 400,
    blocks: int = 1,
    separate: bool = False,
    residual: bool = True,
    layer_norm: bool = True,
    site: str = "embed",
    start: str = "words",
    ids: Sequence[int] = (),
) -> Overlay:
    """The residual prompt overlay.

    Args:
      length, site, start, ids: of the prompt, see ``overlays.prompt``.
      bottleneck: m, inner width of the network.
      blocks: networks one after the other, each with parameters of its own (the published code
        repeats one, which is not followed).
      separate: a network for each row.
      residual, layer_norm: False leaves out the bypass, the norm.

    Returns:
      An overlay whose delta is ``{"prompt": [n, D], "blocks": {"0": {"down": {"kernel", "bias"},
      "up", "norm": {"scale", "bias"}}}}``, leaves with an axis of n in front where networks are
      separate. n D + 2 D m + m + 3 D parameters with one shared block. No merged form.

    Raises:
      ValueError: bottleneck or blocks < 1, and what a prompt refuses.
    """
    if bottleneck < 1 or blocks < 1:
        raise ValueError(f"bottleneck and blocks must be >= 1, got {bottleneck} and {blocks}")
    plain = prompt.overlay(length=length, site=site, start=start, ids=ids)

    def init(key: jax.Array, params: Params) -> Params:
        rows_key, *keys = jax.random.split(key, blocks + 1)
        made = plain.init(rows_key, params)
        width = made["prompt"].shape[-1]
        return {
            **made,
            "blocks": {
                str(number): _block(own, length if separate else 0, width, bottleneck, layer_norm)
                for number, own in enumerate(keys)
            },
        }

    def attach(delta: Params) -> dict[str, Site]:
        return plain.sites(fold(delta, residual=residual))

    settings = {"length": length, "bottleneck": bottleneck, "blocks": blocks}
    settings |= {"separate": separate, "residual": residual, "layer_norm": layer_norm}
    more = (("site", site), ("start", start), ("ids", tuple(ids)))
    return Overlay("residual-prompt", init, attach, None, settings=(*settings.items(), *more))


def fold(delta: Params, *, residual: bool = True) -> Params:
    """The prompt that the network gives, as the delta of ``prompt.overlay``."""
    rows = delta["prompt"]
    for number in range(len(delta["blocks"])):
        branch = _phi(delta["blocks"][str(number)], rows)
        rows = rows + branch if residual else branch
    return {"prompt": rows}


def _phi(own: Params, rows: jax.Array) -> jax.Array:
    """[n, D] -> [n, D]; kernels [D, m], or one a row."""
    down, up = own["down"], own["up"]
    one = "nd,dm->nm" if down["kernel"].ndim == 2 else "nd,ndm->nm"
    inner = jax.nn.relu(jnp.einsum(one, rows, down["kernel"]) + down["bias"])
    y = jnp.einsum(one, inner, up["kernel"]) + up["bias"]
    if "norm" not in own:
        return y
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return y * own["norm"]["scale"] + own["norm"]["bias"]


def _block(key: jax.Array, rows: int, width: int, inner: int, norm: bool) -> Params:
    lead = (rows,) if rows else ()

    def dense(key: jax.Array, d_in: int, d_out: int) -> Params:
        bound = d_in**-0.5
        kernel, bias = jax.random.split(key)
        return {
            "kernel": jax.random.uniform(kernel, (*lead, d_in, d_out), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(bias, (*lead, d_out), minval=-bound, maxval=bound),
        }

    down, up = jax.random.split(key)
    made: Params = {"down": dense(down, width, inner), "up": dense(up, inner, width)}
    if norm:
        made["norm"] = {"scale": jnp.ones((*lead, width)), "bias": jnp.zeros((*lead, width))}
    return made
