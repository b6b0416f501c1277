"""Late prompt tuning: a prompt that is put in front in the middle of the network.

  H = sg(layers 1..k of the text)        [n, D]
  layers k+1..L read [P ; H],            P in R^{t x D}, visible to all, at no learned position

  free   P itself is learnt
  npg    P = reshape(W_2 relu(W_1 u + b_1) + b_2, (t, D)),   u = H at one token
  appg   P_j = W_2 relu(mean_{i in S_j} z_i) + b_2,          z_i = W_1 H_i + b_1
  mppg   the same with the maximum

u is the state of the first token in an encoder, of the last one in a decoder. S_j are adaptive
pools: the real tokens floor(j n / t) .. ceil((j + 1) n / t) - 1. W_1: D -> m. Nothing below layer
k trains, so the backward pass ends there. P = 0 is not the base: its rows take part in attention.
Where layers rotate queries and keys, the prompt has positions in front of the text's; so has it
under a bias by distance. In an encoder-decoder the layers are the encoder's (``stack="encoder"``),
the decoder attends to the prompt as to the text, u is the state of the source's last token, and
the bound model generates.

Liu, Sun, Huang, Qiu, Findings of EMNLP 2022, arXiv 2210.11292.

Deviations: all real tokens are pooled, where the published code leaves a decoder's last one out; a
generator of a language model reads what stands before the first label alone. Encoder-decoders are
not in the paper: their sources need not begin with a token that stands for the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steppe.models.dropout import dropout
from steppe.models.model import Inputs, Model
from steppe.models.overlays import prompt
from steppe.models.overlays.late import SITE, insert_after
from steppe.models.overlays.overlay import Overlay, stack_prefix, stack_shape
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.sites import LateSite, Site, SiteContext
from steppe.models.tree import Params

KINDS = ("npg", "appg", "mppg", "free")


def overlay(
    *,
    layer: int = -1,
    length: int = 5,
    kind: str = "npg",
    bottleneck: int = 128,
    drop: float = 0.1,
    start: str = "words",
    stop: bool = True,
    stack: str = "",
) -> Overlay:
    """The late prompt overlay.

    Args:
      layer: k, layers below the prompt, 0 to L; -1 = half of them.
      length: t, rows of the prompt.
      kind: ``npg``, ``appg``, ``mppg`` or ``free``, see the module.
      bottleneck: m.
      drop: dropout rate of a generated prompt.
      start: initial rows of a free prompt, see ``overlays.prompt``.
      stop: no gradient flows below the prompt; False where something there trains too.
      stack: ``encoder`` in an encoder-decoder, whose encoder then has the layers meant.

    Returns:
      An overlay whose delta is ``{"prompt": [t, D]}`` or ``{"down": {"kernel": [D, m], "bias"},
      "up"}``, with ``up/kernel`` [m, t D] (npg) or [m, D]. Parameters: t D; D m + m + t D m + t D;
      D m + m + m D + D. No merged form; a bound model of one stack does not generate.

    Raises:
      ValueError: length or bottleneck < 1, an unknown kind, start or stack, a bad rate; from
        ``init`` and ``bind`` a layer that the model lacks, a model with other stacks, or a part of
        the base that trains below the prompt; from ``apply`` what ``late.insert_after`` refuses,
        and a generator on texts of a language model without labels.
    """
    if length < 1 or bottleneck < 1:
        raise ValueError(f"length and bottleneck must be >= 1, got {length} and {bottleneck}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if layer < -1:
        raise ValueError(f"layer must be >= 0, or -1 for half of the layers, got {layer}")
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    place = stack_prefix(stack)
    plain = prompt.overlay(length=length, start=start)

    def below(depth: int) -> int:
        return depth // 2 if layer < 0 else layer

    def init(key: jax.Array, params: Params) -> Params:
        depth, width = stack_shape(params, stack, "a late prompt")
        if below(depth) > depth:
            raise ValueError(f"layer must be in 0..{depth} for {depth} layers, got {layer}")
        if kind == "free":
            return plain.init(key, params)
        down, up = jax.random.split(key)
        out = length * width if kind == "npg" else width
        return {"down": _dense(down, width, bottleneck), "up": _dense(up, bottleneck, out)}

    def around(model: Model) -> Model:
        if stack:
            if not isinstance(model.config, Seq2SeqConfig):
                raise ValueError(
                    f"stack={stack!r} is of an encoder-decoder, got a {type(model.config).__name__}"
                )
            return model
        return insert_after(model, below(getattr(model.config, "layers", 0)), stop=stop)

    def attach(delta: Params) -> dict[str, Site]:
        if stack:
            return {f"{place}{SITE}": LateSite(put, delta, layer=layer, stop=stop)}
        return {SITE: Site(put, delta)}

    def put(own: Params, x: Inputs, base: Callable[[Any], Any], context: SiteContext) -> Inputs:
        made = own["prompt"] if kind == "free" else generated(own, x.hidden, context, kind, length)
        if kind != "free":
            made = dropout(made, drop, context.rng if context.train else None)
        return prompt.prepend(made, x, base, context)

    settings = {"layer": layer, "length": length, "kind": kind, "bottleneck": bottleneck}
    settings |= {"drop": drop, "start": start, "stop": stop, "stack": stack}
    below_it = "embed" if layer == 0 else "(?:embed|relative|layers)"
    own = f"(?:{stack}/)?" if stack else ""  # both stacks look words up in one table
    stops = (rf"{own}{below_it}/.*",) if stop else ()
    return Overlay(
        "lpt", init, attach, None, settings=tuple(settings.items()), around=around, stops=stops
    )


def generated(
    delta: Params, hidden: jax.Array, context: SiteContext, kind: str, length: int
) -> Float[Array, "B t D"]:
    """P of the states [B, n, D] under layer k.

    Args:
      context: its ``mask`` [B, n] are the tokens that count, ``reads`` [B] the one of ``npg``.

    Raises:
      ValueError: no mask: it is not known which tokens may be read.
    """
    if context.mask is None:
        raise ValueError(
            "a prompt that is made of the text would tell a language model what it is to predict: "
            "the batch must hold labels [B, T] (negative where nothing is predicted)"
        )
    down, up = (delta[n] for n in ("down", "up"))
    if kind == "npg":
        assert context.reads is not None
        u = jnp.take_along_axis(hidden, context.reads[:, None, None], axis=1)[:, 0]
        inner = jax.nn.relu(u @ down["kernel"] + down["bias"])
        return (inner @ up["kernel"] + up["bias"]).reshape(len(u), length, -1)
    z = hidden @ down["kernel"] + down["bias"]
    pooled = adaptive_pool(z, context.mask, length, "avg" if kind == "appg" else "max")
    return jax.nn.relu(pooled) @ up["kernel"] + up["bias"]


def adaptive_pool(
    x: Float[Array, "B n m"],
    mask: Bool[Array, "B n"],
    slots: int,
    how: Literal["avg", "max"],
) -> Float[Array, "B t m"]:
    """The N tokens of every row that the mask shows, pooled into ``slots`` groups.

    Group j holds the tokens floor(j N / t) .. ceil((j + 1) N / t) - 1, counted from 0; groups
    overlap, and for N < t they repeat. A row without tokens gives 0.
    """
    shown = jnp.asarray(mask) != 0
    rank = jnp.cumsum(shown, axis=1) - 1
    total = shown.sum(1)[:, None]
    j = jnp.arange(slots)
    begin, end = j * total // slots, -(-(j + 1) * total // slots)
    inside = (rank[:, None] >= begin[..., None]) & (rank[:, None] < end[..., None]) & shown[:, None]
    if how == "avg":
        share = inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)
        return share.astype(x.dtype) @ x
    low = jnp.asarray(-jnp.inf, x.dtype)
    most = jnp.where(inside[..., None], x[:, None], low).max(2)
    return jnp.where(total[..., None] > 0, most, jnp.zeros((), x.dtype))


def _dense(key: jax.Array, d_in: int, d_out: int) -> Params:
    bound = d_in**-0.5
    kernel, bias = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel, (d_in, d_out), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, (d_out,), minval=-bound, maxval=bound),
    }
