"""The pure functions of a decoder: ``init``, ``apply`` and its parts. See ``decoder``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from steppe.models import decoder_decode
from steppe.models.attention import attention_mask, last_column
from steppe.models.decoder_block import DecoderBlock, View, norm
from steppe.models.dropout import dropout, stream_key
from steppe.models.layers import Dense, Embedding, run
from steppe.models.model import Batch, Decode, Inputs, Masks, Model, ModelOut, Parts
from steppe.models.sites import (
    GATE_SITE,
    LAYER_SITES,
    OUTER_SITES,
    Hooks,
    Site,
    SiteContext,
    check_sites,
    outer_hooks,
)
from steppe.models.stack import init_stack, run_stack
from steppe.models.tree import Params

if TYPE_CHECKING:
    from steppe.models.decoder import DecoderConfig


def build(config: DecoderConfig) -> Model:
    """The model of a configuration."""
    from steppe.models.decoder import RULES

    net = Network(config)
    return Model(
        config=config,
        init=net.init,
        apply=net.apply,
        axes=RULES,
        sites=net.sites,
        parts=Parts(net.embed, net.layers, net.head),
        decode=Decode(*decoder_decode.functions(net)),
    )


class Network:
    """The functions of one configuration; it holds modules, never parameters."""

    def __init__(self, config: DecoderConfig) -> None:
        c = self.config = config
        self.word = Embedding(c.vocab_size, c.width)
        self.position = Embedding(c.positions, c.width)
        self.block = DecoderBlock(c)
        self.norm = norm(c)
        self.out: Dense | None = None
        if c.head is not None and not (c.head.kind == "lm" and c.tied):
            outputs = c.vocab_size if c.head.kind == "lm" else c.head.num_labels
            self.out = Dense(outputs, use_bias=False)
        self.sites = OUTER_SITES + LAYER_SITES + ((GATE_SITE,) if c.gated else ())

    def init(self, key: jax.Array) -> Params:
        c = self.config
        keys = iter(jax.random.split(key, 6))
        ids = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, c.width))
        view = self.views(jnp.zeros((1, 1), jnp.int32), None, None, 0)[0]
        hooks = Hooks(None, {}, SiteContext())

        def module(net: Any, *args: Any) -> Params:
            return net.init(next(keys), *args)["params"]

        params: Params = {"embed": {"word": module(self.word, ids)}}
        if c.rotary is None:
            params["embed"]["position"] = module(self.position, ids)
        params["layers"] = init_stack(
            lambda k: self.block.init(k, x, hooks=hooks, view=view)["params"], next(keys), c.layers
        )
        params["norm"] = module(self.norm, x)
        if self.out is not None:
            params["head"] = {"out": module(self.out, x)}
        return params

    def apply(
        self,
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> ModelOut:
        """The forward pass; see ``Model.apply``.

        ``hidden`` is after the final norm, and so is the last of all hidden states.

        Args:
          batch: ``input_ids`` [B, T] (or ``embeds``), and where wanted ``attention_mask``
            [B, T] (padding on either side) or [B, T, T], ``position_ids`` [B, T] or [T]
            (default: the number of real tokens before), and ``segment_ids`` [B, T] of packed
            texts, 0 = padding: tokens see only their own segment, positions begin anew.
          embeds: word embeddings [B, T, D] in place of the look-up, before their scaling.

        Raises:
          ValueError: a missing input, a sequence longer than the positions, an unknown site,
            or train=True without rng although a dropout rate is not 0.
        """
        check_sites(sites, self.sites, self.config.layers)
        inputs = self.embed(params, batch, sites=sites, embeds=embeds, rng=rng, train=train)
        hidden = self.layers(
            params,
            inputs,
            sites=sites,
            masks=masks,
            rng=rng,
            train=train,
            all_hidden=all_hidden,
        )
        last = run(self.norm, params["norm"], hidden[-1] if all_hidden else hidden)
        logits = self.logits(params, last, inputs, sites=sites, rng=rng, train=train)
        return ModelOut(logits, hidden.at[-1].set(last) if all_hidden else last)

    def embed(
        self,
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        step: bool = False,
    ) -> Inputs:
        """Word embeddings (and learned positions); ``types`` of the result are the segments."""
        c, p = self.config, params["embed"]
        ids = batch.get("input_ids")
        if embeds is not None:
            words = embeds
        elif ids is not None:
            words = run(self.word, p["word"], ids)
        else:
            raise ValueError("the batch holds no input_ids and no embeds are given")
        _check_inputs(batch, words.shape)
        mask, segments = batch.get("attention_mask"), batch.get("segment_ids")
        if segments is not None and mask is None:
            mask = segments != 0
        positions = batch.get("position_ids")
        if positions is None:
            positions = default_positions(mask, segments, words.shape[1])
        positions = jnp.broadcast_to(jnp.asarray(positions), words.shape[:2])
        key = self._key(rng, train, 0)

        def base(x: Inputs) -> Inputs:
            x = _settled(x)
            y = x.hidden
            if c.embed_scale != 1.0:
                y = y * jnp.asarray(c.embed_scale, y.dtype)
            if not step and y.shape[1] > c.max_length:
                raise ValueError(
                    f"sequence of {y.shape[1]} tokens is longer than the model's {c.max_length} "
                    "positions; truncate it, or load a model with more"
                    + ("" if c.rotary is None else ", or see rotary.extend_context")
                )
            if c.rotary is None:
                y = y + run(self.position, p["position"], x.positions)
            return x._replace(hidden=dropout(y, c.drop, key))

        inputs = Inputs(words, positions, segments, mask)
        hooks = outer_hooks(sites, mask, rng, train, step)
        return _settled(hooks("embed", inputs, base))

    def views(
        self,
        positions: jax.Array | None,
        mask: jax.Array | None,
        segments: jax.Array | None,
        prompt: int,
    ) -> tuple[View, View | None]:
        """What layers see that look at everything, and what those with a window see.

        The second is None where all layers see the same. positions [B, T], mask [B, T] or
        [B, T, T], segments [B, T].
        """
        c = self.config
        kinds = [c.window if local else None for local in dict.fromkeys(c.local)]
        kinds.sort(key=lambda window: window is not None)
        several = len(kinds) > 1
        explicit = mask is not None or segments is not None or several
        length = 0 if positions is None else positions.shape[1]
        out = []
        for window in kinds:
            rotary = c.rotary
            if window is not None and c.local_rotary is not None:
                rotary = c.local_rotary
            turn = None
            if rotary is not None:
                assert positions is not None
                turn = rotary.turn(positions, c.dim, c.positions // 2)
            seen = visible(mask, segments, length, window, prompt) if explicit else None
            out.append(View(turn, seen, window))
        return out[0], out[1] if several else None

    def layers(
        self,
        params: Params,
        inputs: Inputs,
        *,
        start: int = 0,
        stop: int | None = None,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
        queries: int | None = None,
    ) -> jax.Array:
        c = self.config
        wide, narrow = self.views(inputs.positions, inputs.mask, inputs.types, inputs.prompt)

        def block(layer: Any, x: jax.Array, *, extra: Any = None, **kwargs: Any) -> jax.Array:
            view = choose(wide, narrow, extra)
            y: jax.Array = run(self.block, layer, x, view=view, **kwargs)[0]
            return y if queries is None else y[:, :queries]

        return run_stack(
            block,
            params["layers"],
            inputs.hidden,
            layers=c.layers,
            start=start,
            stop=stop,
            sites=sites,
            masks=masks,
            context=SiteContext(rng=self._key(rng, train, 1), train=train, mask=inputs.mask),
            remat=c.remat,
            unroll=c.unroll,
            all_hidden=all_hidden,
            extra=None if narrow is None else jnp.asarray(c.local),
        )

    def head(
        self,
        params: Params,
        hidden: jax.Array,
        inputs: Inputs,
        *,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array | None:
        """Final norm and head on the output of any layer."""
        hidden = run(self.norm, params["norm"], hidden)
        return self.logits(params, hidden, inputs, sites=sites, rng=rng, train=train)

    def logits(
        self,
        params: Params,
        hidden: jax.Array,
        inputs: Inputs,
        *,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        step: bool = False,
    ) -> jax.Array | None:
        """Logits from normed hidden states [B, P + T, D], P rows of them a prompt in front."""
        c = self.config
        if c.head is None:
            return None
        if c.head.kind == "lm":
            hidden = hidden[:, inputs.prompt :]
        else:
            hidden = last_real(hidden, inputs.mask)
            hidden = dropout(hidden, c.head.drop, self._key(rng, train, 2))

        def base(x: jax.Array) -> jax.Array:
            if self.out is not None:
                y = run(self.out, params["head"]["out"], x)
            else:
                table = params["embed"]["word"]["table"]
                flat = x.astype(table.dtype).reshape(-1, c.width)
                y = jax.lax.dot_general(flat, table, (((1,), (1,)), ((), ())))
                y = y.reshape(*x.shape[:-1], c.vocab_size)
            if c.head is not None and c.head.kind == "regression":
                return y[..., 0]
            if c.softcap is not None and c.head is not None and c.head.kind == "lm":
                y = jnp.tanh(y / c.softcap) * c.softcap
            return y

        return outer_hooks(sites, inputs.mask, rng, train, step)("logits", hidden, base)

    def _key(self, rng: jax.Array | None, train: bool, stream: int) -> jax.Array | None:
        c = self.config
        pooled = c.head is not None and c.head.kind != "lm"
        rates = (c.drop, c.attn_drop, c.head.drop if c.head is not None and pooled else 0.0)
        return stream_key(rng, train, stream, rates)


def choose(wide: View, narrow: View | None, local: Any) -> View:
    """The view of a layer: ``local`` is a bool, also a traced one inside a loop over layers."""
    if narrow is None:
        return wide
    if isinstance(local, bool):
        return narrow if local else wide

    def pick(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(local, y, x), a, b)

    return View(pick(wide.turn, narrow.turn), pick(wide.mask, narrow.mask))


def default_positions(mask: jax.Array | None, segments: jax.Array | None, length: int) -> jax.Array:
    """Number of real tokens of the text before each token, [B, T] or [T]; padding counts 0."""
    steps = jnp.arange(length)
    if segments is not None:
        segments = jnp.asarray(segments)
        begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        return steps - jax.lax.cummax(jnp.where(begins, steps, 0), axis=1)
    if mask is None or mask.ndim != 2:
        return steps
    return jnp.maximum(jnp.cumsum(jnp.asarray(mask) != 0, axis=1, dtype=jnp.int32) - 1, 0)


def visible(
    mask: jax.Array | None,
    segments: jax.Array | None,
    length: int,
    window: int | None,
    prompt: int,
) -> jax.Array:
    """Which keys [B or 1, 1, T, T] a query sees: real ones before it in its own segment.

    A window counts real tokens, so that padding inside a row takes no room. Rows of a prompt in
    front belong to every segment.
    """
    column = jnp.arange(length)
    seen = (column[:, None] >= column[None, :])[None, None]
    given = attention_mask(None if mask is None else jnp.asarray(mask))
    if given is not None:
        seen = seen & given
    if window is not None:
        order = column[None]
        if mask is not None and mask.ndim == 2:
            order = jnp.cumsum(jnp.asarray(mask) != 0, axis=1, dtype=jnp.int32)
        near = order[:, :, None] - order[:, None, :] < window
        seen = seen & near[:, None]
    if segments is not None:
        segments = jnp.asarray(segments)
        own = segments[:, :, None] == segments[:, None, :]
        seen = seen & (own | (column < prompt))[:, None]
    return seen


def last_real(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Hidden state [B, D] of every row's last real token.

    Raises:
      ValueError: a mask that is not [B, T].
    """
    if mask is None:
        return hidden[:, -1]
    if mask.ndim != 2:
        raise ValueError(
            "a head that reads the last token needs an attention_mask [batch, tokens], got shape "
            f"{tuple(mask.shape)}"
        )
    return jnp.take_along_axis(hidden, last_column(mask)[:, None, None], axis=1)[:, 0]


def _settled(x: Inputs) -> Inputs:
    """Positions, mask and segments also for rows that an overlay has put in front."""
    assert x.positions is not None
    new = x.hidden.shape[1] - x.positions.shape[-1]
    if new:
        positions = jnp.broadcast_to(x.positions, (x.hidden.shape[0], x.positions.shape[-1]))
        front = jnp.broadcast_to(jnp.arange(new), (len(positions), new)).astype(positions.dtype)
        x = x._replace(positions=jnp.concatenate([front, positions + new], axis=1), prompt=new)
    short = 0 if x.mask is None else x.hidden.shape[1] - x.mask.shape[-1]
    if short and x.mask is not None:
        if x.mask.ndim != 2:
            raise ValueError("rows in front need an attention_mask [batch, tokens]")
        x = x._replace(mask=jnp.pad(x.mask, ((0, 0), (short, 0)), constant_values=1))
    short = 0 if x.types is None else x.hidden.shape[1] - x.types.shape[-1]
    if short and x.types is not None:
        x = x._replace(types=jnp.pad(x.types, ((0, 0), (short, 0))))
    return x


def _check_inputs(batch: Batch, shape: tuple[int, ...]) -> None:
    """Shapes that would broadcast instead of failing."""
    rows, length = shape[:2]
    if rows == 0 or length == 0:
        raise ValueError(f"the batch is empty: {rows} rows of {length} tokens")
    for name in ("input_ids", "segment_ids", "attention_mask"):
        value = batch.get(name)
        if value is None:
            continue
        full = (rows, length, length) if value.ndim == 3 else (rows, length)
        if tuple(value.shape) != full:
            raise ValueError(f"batch[{name!r}] must have shape {full}, got {tuple(value.shape)}")
