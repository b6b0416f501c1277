"""Instance-dependent prompts: a small network makes the prompt of a text from a feature of it.

  P(f) = reshape(W_2 drop(gelu(W_1 drop(f) + b_1)), (t, D)) + b_2       [t, D] an example
  input  [<s> ; P(f) ; x_1 ... </s>]                                    before layer 1
  h^l_P += P^l(f^l),   l = 1..L-1                                       output of layer l

Added, not replaced: the sequence grows once. ``dnn`` has dense W_1 [d_in, m], W_2 [m, t D]; in
``phm`` both are sums of n Kronecker products, W = sum_i A_i (x) B_i, each with its own A_i. f is
the state of <s> above the frozen network's last layer, read in a run of its own without dropout
and without gradient, or cheaper ones. f^l is the state of <s> after layer l ("previous"), or f
again ("first"). Layers share W_1, b_1, W_2 and b_2 (S), all but b_2 (M), or nothing (L).

Parameters, M: dense d_in m + m + m t D + L t D; PHM (d_in m + m t D) / n + 2 n^3 + m + L t D.

Wu et al., NAACL 2022, arXiv 2204.04497.

Deviations: A_i are two, as in the published code, where the paper says that both maps share them;
the code leaves dropout on in the run that gives f. The residual and the normed generators of the
ablation are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.attention import last_column
from steppe.models.dropout import dropout
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import POOLED
from steppe.models.layers import gelu
from steppe.models.model import Inputs, Model
from steppe.models.overlays import compacter
from steppe.models.overlays.batchwise import Call, attached, sees_batch
from steppe.models.overlays.inside import Column, added, inserted, removed
from steppe.models.overlays.overlay import Overlay, kernel_paths
from steppe.models.overlays.prompt import table_of
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

SITE = "idpg"
KINDS, SHARES = ("phm", "dnn"), ("S", "M", "L")
MODES, FEATURES = ("previous", "first"), ("pass", "words", "batch")
# Where a batch has its features, float [B, width].
COLUMN = "features"
PLACES = (
    "0 behind the first token, 1 before the first separator, 2 behind it, "
    "3 before the last separator"
)
_STREAM = 8


def overlay(
    *,
    length: int = 5,
    bottleneck: int = 16,
    kind: str = "phm",
    n: int = 16,
    multi: bool = True,
    share: str = "M",
    mode: str = "previous",
    feature: str = "pass",
    width: int = 0,
    position: int = 0,
    separator: int = -1,
    drop: float = 0.1,
) -> Overlay:
    """The IDPG overlay of an encoder.

    Args:
      length: t, rows of the prompt; 0 is the base itself.
      bottleneck: m.
      kind: of the generator, ``phm`` or ``dnn``.
      n: terms of the Kronecker sums; it divides the feature's width, m and t D.
      multi: whether prompts are added between layers too; False = before the first one alone.
      share: what layers share, ``S``, ``M`` or ``L``.
      mode: what the generators between layers read, ``previous`` or ``first``.
      feature: f. ``pass``: <s> after a run of the frozen network. ``words``: the mean of its word
        embeddings over the text, at no cost. ``batch``: column ``features`` of the batch, such as
        averaged GloVe vectors.
      width: of the batch's features.
      position: where the prompt stands: 0 behind the first token, 1 before the first separator,
        2 behind it (between two sentences), 3 before the last one. Without one: as 0.
      separator: id of the token that ends a sentence, for positions 1 to 3.
      drop: dropout rate of f and behind the activation.

    Returns:
      An overlay whose delta is ``{"generator": {"down", "bias", "up"}, "layers": {"resid": [L, t,
      D]}}`` (M: row l is b_2 after layer l, row 0 that of the input), ``"prompt"`` [t, D] in place
      of ``layers`` (S, and without layers), or ``{"layers": {"resid": {"down", "bias", "up",
      "rows"}}}`` (L). Maps are [d_in, d_out], or ``{"a": [n, n, n], "b": [n, d_in / n, d_out /
      n]}``. No merged form; heads of one label a token skip the prompt.

    Raises:
      ValueError: a size, rate or name that it cannot have; from ``init``, widths that n does not
        divide, no position left for the text, a model of two stacks or without words; from
        ``bind``, a model that is no encoder; from ``apply``, a batch without its features, or
        another overlay that puts rows in front.
    """
    if length < 0 or bottleneck < 1 or n < 1:
        raise ValueError(
            f"length must be >= 0, bottleneck and n >= 1, got {length}, {bottleneck} and {n}"
        )
    for name, value, known in (
        ("kind", kind, KINDS),
        ("share", share, SHARES),
        ("mode", mode, MODES),
        ("feature", feature, FEATURES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if position not in range(4):
        raise ValueError(f"position must be one of {PLACES}; got {position}")
    if position and separator < 0:
        raise ValueError(f"position={position} needs the separator's id, got {separator}")
    if width < 0 or (feature == "batch") != (width > 0):
        raise ValueError(f"width must be that of feature='batch', else 0, got {width}")
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    every = multi and share == "L"

    def init(key: jax.Array, params: Params) -> Params:
        layers, d = _shape(params, length)
        d_in = width or d
        if multi and mode == "previous" and d_in != d:
            raise ValueError(
                f"mode='previous' reads hidden states of width {d} too, features have {d_in}; "
                "use mode='first'"
            )
        if kind == "phm":
            for what, size in (("feature", d_in), ("bottleneck", bottleneck), ("t D", length * d)):
                if size % n:
                    raise ValueError(f"n={n} must divide the {what} of {size}")
        if not length:
            return {}
        lead = (layers,) if every else ()
        net, rows = jax.random.split(key)
        made = _generator(net, lead, d_in, bottleneck, length * d, n if kind == "phm" else 0)
        many = (layers,) if multi and share != "S" else ()
        bias = jax.random.uniform(rows, (*many, length, d), minval=-0.5, maxval=0.5)
        if every:
            return {tree.STACK: {"resid": {**made, "rows": bias}}}
        if many:
            return {"generator": made, tree.STACK: {"resid": bias}}
        return {"generator": made, "prompt": bias}

    def parts(delta: Params) -> tuple[Params, jax.Array]:
        """Generator and b_2 of the input."""
        if every:
            first = jax.tree.map(lambda a: a[0], delta[tree.STACK]["resid"])
            return first, first["rows"]
        bias = delta[tree.STACK]["resid"][0] if tree.STACK in delta else delta["prompt"]
        return delta["generator"], bias

    def make(delta: Params, call: Call, model: Model) -> dict[str, Site]:
        if "embed" in call.others:
            raise ValueError(
                "idpg counts columns of the text itself: another overlay puts rows there at the "
                "site 'embed'; attach one of them"
            )
        f = feature_of(model, call, feature, width)
        at = _column(call.batch, position, separator)
        in_key, inner_key = (None, None) if call.rng is None else jax.random.split(call.rng)
        f = dropout(f, drop, in_key)
        own, rows = parts(delta)

        def embed(_: Any, x: Inputs, base: Callable[[Any], Any], context: SiteContext) -> Any:
            made = generate(own, rows, f.astype(x.hidden.dtype), drop, inner_key)
            return base(inserted(x, made, at))

        def resid(mine: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
            net = mine if every else own
            bias = mine["rows"] if every else mine if share == "M" else rows
            read = x[:, 0] if mode == "previous" else f.astype(x.dtype)
            key = context.rng if context.train else None
            made = generate(net, bias, read, drop, key)
            # The input of layer 1 has its prompt already.
            return base(added(x, jnp.where(context.layer == 0, 0, made), at))

        def logits(_: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
            return base(removed(x, length, at))

        sites = {"embed": Site(embed, {})}
        if multi:
            stacked = delta[tree.STACK]["resid"] if share != "S" else {}
            # It reads <s> and writes below the layer: the last one may be run for <s> alone.
            sites["resid"] = Site(resid, stacked, tokenwise=True)
        if model.config.head is not None and model.config.head.kind not in POOLED:
            sites["logits"] = Site(logits, {})
        return sites

    def around(model: Model) -> Model:
        if not isinstance(model.config, EncoderConfig):
            raise ValueError(
                "idpg reads the first token of an encoder, which has seen the whole text; got a "
                f"{type(model.config).__name__}"
            )
        return sees_batch(model, SITE, lambda d, call: make(d, call, model), stream=_STREAM)

    def attach(delta: Params) -> dict[str, Site]:
        return {SITE: Site(attached, delta)} if length else {}

    settings: dict[str, Any] = {"length": length, "bottleneck": bottleneck, "kind": kind, "n": n}
    settings |= {"multi": multi, "share": share, "mode": mode, "feature": feature, "width": width}
    settings |= {"position": position, "separator": separator, "drop": drop}
    return Overlay("idpg", init, attach, None, settings=tuple(settings.items()), around=around)


def generate(
    own: Params,
    rows: Float[Array, "t D"],
    f: Float[Array, "B d_in"],
    drop: float = 0.0,
    rng: jax.Array | None = None,
) -> Float[Array, "B t D"]:
    """P(f) of features that have had their own dropout.

    Args:
      own: ``{"down", "bias", "up"}``, maps dense or ``{"a", "b"}``.
      rows: b_2.
      rng: for the dropout behind the activation; None = none.
    """
    inner = dropout(gelu(_map(own["down"], f) + own["bias"].astype(f.dtype)), drop, rng)
    made = _map(own["up"], inner).reshape(len(f), *rows.shape)
    return made + rows.astype(made.dtype)


def feature_of(model: Model, call: Call, feature: str, width: int = 0) -> Float[Array, "B d_in"]:
    """f of every text, without gradient; see :func:`overlay`.

    Raises:
      ValueError: the batch lacks the column, or its shape is another.
    """
    batch, params = call.batch, call.params
    if feature == "batch":
        found, texts = batch.get(COLUMN), batch.get("input_ids", call.embeds)
        rows = None if texts is None else len(texts)
        if found is None or jnp.shape(found) != (rows, width):
            raise ValueError(
                f"the batch must hold {COLUMN!r} of shape [batch, {width}], got "
                f"{None if found is None else tuple(found.shape)}"
            )
        return jnp.asarray(found)
    if feature == "words":
        words = call.embeds
        if words is None:
            words = jnp.take(table_of(params, "word"), batch["input_ids"], axis=0)
        mask = batch.get("attention_mask")
        shown = jnp.ones(words.shape[:2]) if mask is None else jnp.asarray(mask) != 0
        shown = (shown if shown.ndim == 2 else shown.any(1)).astype(words.dtype)[..., None]
        mean = (words * shown).sum(1) / jnp.maximum(shown.sum(1), 1)
        return jax.lax.stop_gradient(mean)
    given: dict[str, Any] = {"masks": call.masks}
    if model.parts is None:
        hidden = model.apply(params, batch, embeds=call.embeds, **given).hidden
        return jax.lax.stop_gradient(hidden[:, 0])
    # The last layer at the first token alone, as for a classifier.
    embed, layers, _ = model.parts
    last = model.config.layers - 1
    inputs = embed(params, batch, embeds=call.embeds)
    inputs = inputs._replace(hidden=layers(params, inputs, stop=last, **given))
    return jax.lax.stop_gradient(layers(params, inputs, start=last, queries=1, **given)[:, 0])


def _map(own: Any, x: jax.Array) -> jax.Array:
    if isinstance(own, dict):
        return compacter.phm(x, own["a"], own["b"])
    return x @ own.astype(x.dtype)


def _column(batch: Any, position: int, separator: int) -> Column:
    """Column of the prompt's first row."""
    if not position:
        return 1
    if "input_ids" not in batch:
        raise ValueError(f"position={position} looks for the separator in input_ids; none given")
    found = jnp.asarray(batch["input_ids"]) == separator
    if position == 3:
        at = last_column(found)
    else:
        at = jnp.argmax(found, axis=1) + (position == 2)
    return jnp.where(found.any(1), at, 1)


def _shape(params: Params, length: int) -> tuple[int, int]:
    """(L, D) of a model of one stack that has room for ``length`` rows."""
    table, found = table_of(params, "word"), kernel_paths(params)
    if table is None or "attn.q" not in found:
        raise ValueError("idpg needs a model of one stack of layers that embeds words")
    positions = table_of(params, "position")
    if positions is not None and length + 1 >= positions.shape[0]:
        raise ValueError(
            f"length={length} leaves the text none of the model's {positions.shape[0]} "
            "positions; take a shorter prompt"
        )
    return tree.get(params, found["attn.q"]).shape[0], table.shape[1]


def _generator(
    key: jax.Array, lead: tuple[int, ...], d_in: int, inner: int, d_out: int, n: int
) -> Params:
    """Maps and b_1: normal with 0.05 (PHM), or 0.02 and a bias of 0; n = 0 is dense."""
    keys = jax.random.split(key, 5)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return (0.05 if n else 0.02) * jax.random.normal(key, (*lead, *shape))

    if not n:
        dense = {"down": normal(keys[0], d_in, inner), "up": normal(keys[1], inner, d_out)}
        return {**dense, "bias": jnp.zeros((*lead, inner))}

    def kronecker(i: int, a: int, b: int) -> Params:
        return {"a": normal(keys[i], n, n, n), "b": normal(keys[i + 1], n, a // n, b // n)}

    maps = {"down": kronecker(0, d_in, inner), "up": kronecker(2, inner, d_out)}
    return {**maps, "bias": normal(keys[4], inner)}
