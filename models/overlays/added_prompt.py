"""Prompts that are added to hidden states: a few ordinary words in the text, moved in some layers.

  input   [<s> ; w_1 ... w_n ; rest ; E(x)]         w_i ordinary tokens of the vocabulary
  shallow h_{1..n}^1 + P                            P in R^{n x D}, input of the first layer only
  deep    h_{1..n}^l + P^l,   l = 1..L              input of every layer

Unlike a prompt in front, P = 0 is the model as it was pretrained, reading a text with some words
more. The words stand behind the first token (``first=1``, encoders) or before it (0, decoders, as
of a language model). What is put behind the text (``after``) makes the last token one whose next
word is a class, so that the classification head of a decoder, which reads there, can be the rows of
its vocabulary for the classes' names.

Sun et al., ICML 2022, arXiv 2201.03514 (shallow); Sun et al., EMNLP 2022, arXiv 2205.11200 (deep).

Deviations: the words are given as ids; the published code writes them as a text, which its
tokenizer may read as other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.model import Inputs, Model
from steppe.models.overlays.inside import first_column
from steppe.models.overlays.overlay import Overlay, stack_prefix, stack_shape
from steppe.models.overlays.prompt import table_of
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

# The first of the ordinary tokens; what stands below is often special.
FIRST_ID = 1000


def overlay(
    *,
    length: int = 50,
    deep: bool = True,
    first: int = -1,
    ids: Sequence[int] = (),
    after: Sequence[int] = (),
    stack: str = "",
) -> Overlay:
    """The overlay of added prompts.

    Args:
      length: n, positions that are added to.
      deep: a prompt for every layer; False = for the input of the first one.
      first: position of the first of the words: 1 behind the first token, 0 in front; -1 = 1,
        and 0 in a stack.
      ids: the words, at least n; those beyond n are read as they are. Empty = the n ids from
        1000 on.
      after: tokens that stand behind every text, before its padding.
      stack: ``encoder`` in an encoder-decoder, where they stand in the source.

    Returns:
      An overlay whose delta is ``{"words": [>= n, D], "prompt": [n, D]}``, deep ``{"words",
      "layers": {"resid": [L, n, D]}}``, and ``"after"`` [a, D] where tokens follow; prompts begin
      as 0. Words and what follows are constants of the base that never train. No merged
      form.

    Raises:
      ValueError: length < 1, first that is neither 0 nor 1, fewer ids than length, another stack;
        from ``init`` an id outside the vocabulary, no position left for the text, or a model
        without words or with other stacks; from ``bind`` a decoder with first=1; from ``apply``
        another overlay that puts rows in front.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    first = first_column(first, stack)
    words = tuple(int(i) for i in ids) or tuple(range(FIRST_ID, FIRST_ID + length))
    behind = tuple(int(i) for i in after)
    place = stack_prefix(stack)
    if len(words) < length:
        raise ValueError(f"ids must name at least length={length} tokens, got {len(words)}")

    def init(key: jax.Array, params: Params) -> Params:
        layers, _ = stack_shape(params, stack, "added-prompt")
        table = table_of(params, "word")
        if table is None:
            raise ValueError("added-prompt needs a model that embeds words")
        size, width = table.shape
        for name, given in (("ids", words), ("after", behind)):
            bad = next((i for i in given if not 0 <= i < size), None)
            if bad is not None:
                raise ValueError(f"{name} must be of the vocabulary of {size} tokens, got {bad}")
        positions = table_of(params, "position")
        more = len(words) + len(behind)
        if positions is not None and more + first >= positions.shape[0]:
            raise ValueError(
                f"{more} tokens around the text leave it none of the model's "
                f"{positions.shape[0]} positions; take a smaller length"
            )
        made: Params = {"words": _rows(table, words)}
        if behind:
            made["after"] = _rows(table, behind)
        if not deep:
            return {**made, "prompt": jnp.zeros((length, width))}
        return {**made, tree.STACK: {"resid": jnp.zeros((layers, length, width))}}

    def attach(delta: Params) -> dict[str, Site]:
        def embed(own: Params, x: Inputs, base: Callable[[Any], Any], context: SiteContext) -> Any:
            if context.step:  # they stand in the cache already
                return base(x)
            ours = inserted(x, own["words"], first, own.get("after"))
            done: Inputs = base(ours)
            if x.prompt or done.hidden.shape[1] != ours.hidden.shape[1]:
                raise ValueError(
                    "added-prompt counts columns of the text itself, and another overlay puts rows "
                    "in front; attach one of them"
                )
            if "prompt" not in own:
                return done
            return done._replace(hidden=added(done.hidden, own["prompt"], first))

        sites = {f"{place}embed": Site(embed, {k: v for k, v in delta.items() if k != tree.STACK})}
        if deep:
            # What is added to a token depends on nothing else.
            sites[f"{place}resid"] = Site(resid, delta[tree.STACK]["resid"], tokenwise=True)
        return sites

    def resid(rows: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
        return base(x if context.step else added(x, rows, first))

    def around(model: Model) -> Model:
        if first and isinstance(model.config, DecoderConfig):
            raise ValueError(
                "first=1 puts the words behind the first token, which tells an encoder's text from "
                "its padding; use first=0 for a decoder"
            )
        return model

    settings = {"length": length, "deep": deep, "first": first, "ids": words, "after": behind}
    settings |= {"stack": stack}
    return Overlay(
        "added-prompt",
        init,
        attach,
        None,
        settings=tuple(settings.items()),
        fixed=("words", "after"),
        around=around,
    )


def added(hidden: jax.Array, rows: Any, first: int) -> jax.Array:
    """``rows`` [n, D] added to positions ``first``.. of ``hidden`` [B, T, D]."""
    rows = jnp.asarray(rows)
    return hidden.at[:, first : first + rows.shape[0]].add(rows.astype(hidden.dtype))


def inserted(x: Inputs, words: Any, first: int, after: Any = None) -> Inputs:
    """The input with ``words`` [m, D] at ``first``, and ``after`` [a, D] behind each text.

    Raises:
      ValueError: an attention mask that says who sees whom.
    """
    batch = len(x.hidden)
    if x.mask is not None and jnp.ndim(x.mask) != 2:
        raise ValueError("added prompts need an attention_mask [batch, tokens]")
    if after is not None:
        x = _behind(x, jnp.asarray(after))
    n = jnp.shape(words)[0]

    def put(values: Any, new: Any, axis: int = 1) -> jax.Array:
        head, tail = jnp.split(jnp.asarray(values), [first], axis=axis)
        return jnp.concatenate([head, new, tail], axis=axis)

    rows = jnp.broadcast_to(jnp.asarray(words).astype(x.hidden.dtype), (batch, *jnp.shape(words)))
    positions = x.positions
    if positions is not None:
        positions = jnp.asarray(positions)
        head, tail = jnp.split(positions, [first], axis=-1)
        new = tail[..., :1] + jnp.arange(n, dtype=positions.dtype)
        positions = jnp.concatenate([head, new, tail + n], axis=-1)
    kind = None if x.types is None else jnp.asarray(x.types)[:, first : first + 1]
    return Inputs(
        put(x.hidden, rows),
        positions,
        None if kind is None else put(x.types, jnp.broadcast_to(kind, (batch, n))),
        None if x.mask is None else put(x.mask, jnp.ones((batch, n), jnp.asarray(x.mask).dtype)),
        # Heads skip rows in front; behind the first token they are rows as any other.
        x.prompt + (n if first == 0 else 0),
    )


def _behind(x: Inputs, rows: jax.Array) -> Inputs:
    """``rows`` [a, D] behind the last real token of every text, its padding behind them."""
    batch, length, _ = x.hidden.shape
    more = len(rows)
    mask = jnp.ones((batch, length), jnp.int32) if x.mask is None else jnp.asarray(x.mask)
    ends = (length - jnp.argmax(mask[:, ::-1] != 0, axis=1))[:, None]
    column = jnp.arange(length + more)
    new = (column >= ends) & (column < ends + more)
    # Where each column comes from, the new ones being those after `length`.
    source = jnp.where(column < ends, column, column - more)
    source = jnp.where(new, length + column - ends, source)

    def take(values: Any, fresh: jax.Array) -> jax.Array:
        both = jnp.concatenate([values, fresh.astype(values.dtype)], axis=1)
        index = source if both.ndim == 2 else source[..., None]
        return jnp.take_along_axis(both, index, axis=1)

    def last(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, ends - 1, axis=1)

    positions = x.positions
    if positions is not None:
        positions = jnp.broadcast_to(jnp.asarray(positions), (batch, length))
        positions = take(positions, last(positions) + 1 + jnp.arange(more))
    types = None if x.types is None else jnp.asarray(x.types)
    if types is not None:
        types = take(types, jnp.broadcast_to(last(types), (batch, more)))
    return x._replace(
        hidden=take(x.hidden, jnp.broadcast_to(rows, (batch, *rows.shape))),
        positions=positions,
        types=types,
        mask=take(mask, jnp.ones((batch, more))),
    )


def _rows(table: Any, ids: Sequence[int]) -> Any:
    if isinstance(table, jax.ShapeDtypeStruct):  # only shapes are asked for
        return jnp.zeros((len(ids), table.shape[1]))
    return jnp.asarray(table, jnp.float32)[jnp.asarray(ids)]
