"""The network of an encoder-decoder: embeddings, the two stacks, the output.

Whole sequences are read here; one token at a time, in ``seq2seq_decode``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models.attention import attention_mask, columns_of, last_column
from steppe.models.dropout import dropout, stream_key
from steppe.models.layers import Embedding, run
from steppe.models.model import Batch, Inputs, Masks, ModelOut
from steppe.models.relative import relative_bias
from steppe.models.seq2seq_block import Block
from steppe.models.sites import (
    CROSS_SITES,
    DECODER,
    ENCODER,
    GATE_SITE,
    LATE,
    LAYER_SITES,
    OUTER_SITES,
    SSRU_SITES,
    Hooks,
    LateSite,
    Site,
    SiteContext,
    check_sites,
    within,
)
from steppe.models.stack import init_stack, run_stack
from steppe.models.tree import Params

if TYPE_CHECKING:
    from steppe.models.seq2seq import Seq2SeqConfig


class Seq2SeqMasks(NamedTuple):
    """Structure masks of an encoder-decoder; None means ones.

    Attributes:
      encoder, decoder: the masks of each stack.
      cross: [L, H], of the heads of cross-attention.
    """

    encoder: Masks | None = None
    decoder: Masks | None = None
    cross: jax.Array | None = None


class Network:
    """The pure functions of one configuration; it holds modules, never parameters."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        c = self.config = config
        self.word = Embedding(c.vocab_size, c.width)
        self.position = Embedding(c.positions + c.position_offset, c.width)
        self.blocks = {part: Block(c.layer(part)) for part in (ENCODER, DECODER)}
        self.norm = c.layer(ENCODER).norm()
        gate = (GATE_SITE,) if c.gated else ()
        own: tuple[str, ...] = LAYER_SITES
        if c.cell == "ssru":
            own = tuple(n for n in LAYER_SITES if not n.startswith("attn.")) + SSRU_SITES
        self.inner = {
            ENCODER: ("embed", *LAYER_SITES, *gate, LATE),
            DECODER: ("embed", *own, *gate, *CROSS_SITES),
        }
        self.sites = (*(f"{p}.{n}" for p, names in self.inner.items() for n in names), "logits")

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters; see ``Model.init``."""
        c = self.config
        keys = iter(jax.random.split(key, 12))
        ids = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, c.width))
        params: Params = {"embed": {"word": self.word.init(next(keys), ids)["params"]}}
        for part, block in self.blocks.items():
            stack: Params = {}
            embed: Params = {}
            if c.position_kind == "learned":
                embed["position"] = self.position.init(next(keys), ids)["params"]
            if c.embed_norm:
                embed["norm"] = self.norm.init(next(keys), x)["params"]
            if embed:
                stack["embed"] = embed
            if self._relative(part):
                table = Embedding(c.buckets, c.layer(part).heads)
                stack["relative"] = table.init(next(keys), ids)["params"]
            given: dict[str, Any] = {"hooks": Hooks(None, {}, SiteContext())}
            if part == DECODER:
                given["memory"] = x
            init = functools.partial(_init, block, x, given)
            stack["layers"] = init_stack(init, next(keys), c.depth(part))
            if c.pre_norm:
                stack["norm"] = self.norm.init(next(keys), x)["params"]
            params[part] = stack
        head: Params = {}
        if c.head is not None and not c.tied:
            kernel = c.width**-0.5 * jax.random.normal(next(keys), (c.width, c.vocab_size))
            head["out"] = {"kernel": kernel}
        if c.head is not None and c.head_bias != "none":
            head["bias"] = jnp.zeros((c.vocab_size,))
        return {**params, "head": head} if head else params

    def apply(
        self,
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Any = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> ModelOut:
        """The forward pass; see ``Model.apply``. ``hidden`` are the decoder's states.

        Args:
          batch: ``input_ids`` [B, T] (or ``embeds``), where wanted ``attention_mask`` [B, T] and
            ``position_ids``; and what the decoder reads, ``decoder_input_ids`` [B, U] with its
            start token first, or ``labels`` [B, U], which are shifted right here (labels < 0
            count as padding); where wanted ``decoder_attention_mask`` [B, U] and
            ``decoder_position_ids``. Decoder positions count the tokens of its mask.
          embeds: word embeddings of the source [B, T, D] in place of the look-up.
          masks: see :class:`Seq2SeqMasks`.

        Raises:
          ValueError: a missing input, a sequence longer than the positions, an unknown site,
            or train=True without rng although a dropout rate is not 0.
        """
        self.check(sites, masks)
        options: dict[str, Any] = {"sites": sites, "rng": rng, "train": train}
        memory, source = self.encode(params, batch, embeds=embeds, masks=masks, **options)
        ids = batch.get("decoder_input_ids")
        if ids is None:
            ids = self.shifted(batch)
        mask = batch.get("decoder_attention_mask")
        target = self.embed(
            params, DECODER, ids, mask, batch.get("decoder_position_ids"), **options
        )
        hidden = self.stack(
            params, DECODER, target, masks, memory, source, all_hidden=all_hidden, **options
        )
        final = hidden[-1] if all_hidden else hidden
        return ModelOut(self.head(params, final[:, target.prompt :], **options), hidden)

    def shifted(self, batch: Batch) -> jax.Array:
        """What the decoder reads to predict ``labels`` [B, U]: the start token, then they."""
        labels = batch.get("labels")
        if labels is None:
            raise ValueError(
                "the batch holds neither decoder_input_ids nor labels for the decoder to read"
            )
        labels = jnp.asarray(labels)
        known = jnp.where(labels < 0, self.config.pad_id, labels)
        start = jnp.full_like(known[:, :1], self.config.start_id)
        return jnp.concatenate([start, known[:, :-1]], axis=1)

    def encode(
        self,
        params: Params,
        batch: Batch,
        *,
        embeds: jax.Array | None = None,
        masks: Seq2SeqMasks | None = None,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Inputs]:
        """The encoder's output [B, S, D] and its inputs, with the mask that goes with it."""
        options: dict[str, Any] = {"sites": sites, "rng": rng, "train": train}
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        source = self.embed(
            params, ENCODER, ids, mask, batch.get("position_ids"), embeds=embeds, **options
        )
        if f"{ENCODER}.{LATE}" not in (sites or {}):
            return self.stack(params, ENCODER, source, masks, **options), source
        source, layer = self._between(params, source, masks, **options)
        return self.stack(params, ENCODER, source, masks, start=layer, **options), source

    def _between(
        self,
        params: Params,
        source: Inputs,
        masks: Seq2SeqMasks | None,
        *,
        sites: Mapping[str, Site] | None,
        rng: jax.Array | None,
        train: bool,
    ) -> tuple[Inputs, int]:
        """What a late site makes of the encoder's states, and the layer that reads it."""
        others = within(sites, ENCODER)
        site, depth = others.pop(LATE), self.config.depth(ENCODER)
        if not isinstance(site, LateSite):
            raise ValueError("what is attached at 'encoder.late' must be a LateSite, and one alone")
        layer = depth // 2 if site.layer == -1 else site.layer
        if not 0 <= layer <= depth:
            raise ValueError(
                f"layer must be in 0..{depth} for an encoder of {depth}, -1 for half, got {layer}"
            )
        lower = [f"{ENCODER}.{n}" for n in others if layer or n == "embed"]
        if site.stop and lower:
            raise ValueError(
                f"stop=True ends the gradient after layer {layer} of the encoder, below which "
                f"other sites are attached ({', '.join(lower)}); use stop=False"
            )
        if "resid" in others:
            raise ValueError(
                "a site 'encoder.resid' adds to columns of the text (mp2, added prompts), which "
                f"move after layer {layer}; attach one of the overlays"
            )
        options: dict[str, Any] = {"sites": sites, "rng": rng, "train": train}
        hidden = self.stack(params, ENCODER, source, masks, stop=layer, **options)
        if site.stop:
            hidden = jax.lax.stop_gradient(hidden)
        states = source._replace(hidden=hidden)
        rows, length, _ = hidden.shape
        seen = columns_of(states.mask)
        mask = jnp.ones((rows, length), bool) if seen is None else seen
        mask = mask & (jnp.arange(length) >= states.prompt)  # rows of other prompts are no text
        # A source ends with the token that ends it, and need not begin with one that stands for it.
        key = jax.random.fold_in(rng, 5) if train and rng is not None else None
        context = SiteContext(rng=key, train=train, mask=mask, reads=last_column(mask))
        after: Inputs = site.fn(site.delta, states, lambda x: x, context)
        return after, layer

    def embed(
        self,
        params: Params,
        part: str,
        ids: jax.Array | None,
        mask: jax.Array | None,
        positions: jax.Array | None = None,
        *,
        embeds: jax.Array | None = None,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        step: bool = False,
    ) -> Inputs:
        """The input of one stack, through its ``embed`` site."""
        c = self.config
        p = params[part].get("embed", {})
        if embeds is not None:
            words = embeds
        elif ids is None:
            raise ValueError("the batch holds no input_ids and no embeds are given")
        else:
            ids = jnp.asarray(ids)
            known = jnp.maximum(ids, 0) if c.start_id < 0 else ids
            words = run(self.word, params["embed"]["word"], known)
            if c.start_id < 0:
                words = jnp.where((ids >= 0)[..., None], words, jnp.zeros((), words.dtype))
        rows, length = words.shape[:2]
        if rows == 0 or length == 0:
            raise ValueError(f"the {part}'s batch is empty: {rows} rows of {length} tokens")
        if mask is not None:
            full = (rows, length) if mask.ndim != 3 else (rows, length, length)
            if tuple(mask.shape) != full:
                raise ValueError(
                    f"the {part}'s attention mask must have shape {full}, got {tuple(mask.shape)}"
                )
        if positions is None and c.position_kind != "relative":
            positions = jnp.arange(length)
            if part == DECODER and mask is not None and mask.ndim == 2:
                positions = jnp.maximum(jnp.cumsum(mask != 0, axis=1) - 1, 0)
        key = self.key(rng, train, 0 if part == ENCODER else 2)

        def base(x: Inputs) -> Inputs:
            if x.hidden.shape[1] > c.positions and c.position_kind != "relative":
                raise ValueError(
                    f"{part} sequence of {x.hidden.shape[1]} tokens is longer than the model's "
                    f"{c.positions} positions; truncate it, or load a model with more"
                )
            y = x.hidden * jnp.asarray(c.embed_scale, x.hidden.dtype)
            if c.position_kind == "learned":
                rows = jnp.asarray(x.positions) + c.position_offset
                y = y + run(self.position, p["position"], rows)
            elif c.position_kind != "relative":
                table = jnp.asarray(sinusoids(c.positions, c.width, c.position_kind), y.dtype)
                y = y + jnp.take(table, jnp.asarray(x.positions), axis=0)
            if c.embed_norm:
                y = run(self.norm, p["norm"], y)
            return x._replace(hidden=dropout(y, c.drop, key))

        inputs = Inputs(words, positions, None, mask)
        context = SiteContext(rng=key, train=train, mask=mask, step=step)
        inner = {n: s for n, s in within(sites, part).items() if n == "embed"}
        hooks = Hooks(inner, {n: s.delta for n, s in inner.items()}, context)
        out: Inputs = hooks("embed", inputs, base)
        return out

    def stack(
        self,
        params: Params,
        part: str,
        inputs: Inputs,
        masks: Seq2SeqMasks | None = None,
        memory: jax.Array | None = None,
        source: Inputs | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> jax.Array:
        """Layers ``start <= l < stop`` of a stack over whole sequences; without ``stop``, the norm
        that ends a pre-norm model too."""
        c, net = self.config, self.blocks[part]
        key = self.key(rng, train, 1 if part == ENCODER else 3)
        fixed = self.masks_and_bias(params, part, inputs, source)

        def block(layer: Any, x: jax.Array, **options: Any) -> jax.Array:
            if part == DECODER:
                options["memory"] = memory
            out: Any = run(net, layer, x, **fixed, **options)
            return out[0]

        hidden = run_stack(
            block,
            params[part]["layers"],
            inputs.hidden,
            layers=c.depth(part),
            start=start,
            stop=stop,
            sites={n: s for n, s in within(sites, part).items() if n not in (*OUTER_SITES, LATE)},
            masks=self.layer_masks(part, masks),
            context=SiteContext(rng=key, train=train, mask=inputs.mask),
            remat=c.remat,
            unroll=c.unroll,
            all_hidden=all_hidden,
        )
        if stop is not None:
            return hidden
        if not all_hidden:
            return self.finish(params, part, hidden, key)
        return hidden.at[-1].set(self.finish(params, part, hidden[-1], key))

    def finish(
        self, params: Params, part: str, hidden: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """The norm at the end of a pre-norm stack, and T5's dropout after it."""
        if not self.config.pre_norm:
            return hidden
        key = None if key is None else jax.random.fold_in(key, self.config.depth(part))
        return dropout(run(self.norm, params[part]["norm"], hidden), self.config.drop, key)

    def masks_and_bias(
        self, params: Params, part: str, inputs: Inputs, source: Inputs | None
    ) -> dict[str, Any]:
        """What all layers of a stack share."""
        length = inputs.hidden.shape[1]
        mask = attention_mask(inputs.mask)
        out: dict[str, Any] = {}
        if part == DECODER:
            at = jnp.arange(length)
            causal = (at[None, :] <= at[:, None])[None, None]
            if self.config.cell == "ssru":
                if inputs.mask is not None and inputs.mask.ndim != 2:
                    raise ValueError(
                        "a recurrent decoder needs a decoder_attention_mask [batch, tokens], got "
                        f"shape {tuple(inputs.mask.shape)}"
                    )
                out["tokens"] = inputs.mask
            mask = causal if mask is None else mask & causal
            out["memory_mask"] = None if source is None else attention_mask(columns_of(source.mask))
        out["mask"] = mask
        out["bias"] = self.bias(params, part, jnp.arange(length), jnp.arange(length))
        return out

    def bias(self, params: Params, part: str, queries: Any, keys: Any) -> jax.Array | None:
        """T5's bias for columns ``queries`` [T] and ``keys`` [S], [1, H, T, S], or None."""
        if not self._relative(part):
            return None
        return relative_bias(
            params[part]["relative"]["table"],
            queries,
            keys,
            bidirectional=part == ENCODER,
            distance=self.config.distance,
        )

    def head(
        self,
        params: Params,
        hidden: jax.Array,
        *,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        step: bool = False,
    ) -> jax.Array | None:
        """Logits [..., V] of decoder states [..., D]."""
        c = self.config
        if c.head is None:
            return None

        def base(x: jax.Array) -> jax.Array:
            flat = x.reshape(-1, c.width) * jnp.asarray(c.head_scale, x.dtype)
            if c.tied:
                table = params["embed"]["word"]["table"]
                logits = jax.lax.dot_general(flat, table, (((1,), (1,)), ((), ())))
            else:
                logits = flat @ params["head"]["out"]["kernel"]
            if c.head_bias != "none":
                logits = logits + params["head"]["bias"]
            return logits.reshape(*x.shape[:-1], c.vocab_size)

        deltas = {n: s.delta for n, s in (sites or {}).items() if n == "logits"}
        context = SiteContext(rng=self.key(rng, train, 4), train=train, step=step)
        out: jax.Array = Hooks(sites, deltas, context)("logits", hidden, base)
        return out

    def layer_masks(self, part: str, masks: Seq2SeqMasks | None) -> Masks | None:
        """The masks of one stack; a decoder's own heads and cross heads in one array."""
        if masks is None:
            return None
        if part == ENCODER:
            return masks.encoder
        own = masks.decoder or Masks()
        if own.head is None and masks.cross is None:
            return own
        ones = jnp.ones((self.config.decoder_layers, self.config.layer(part).heads))
        pair = [ones if m is None else m for m in (own.head, masks.cross)]
        for name, mask in zip(("decoder.head", "cross"), pair):
            if mask.shape != ones.shape:
                raise ValueError(f"masks.{name} must be {ones.shape}, got {tuple(mask.shape)}")
        return own._replace(head=jnp.concatenate(pair, axis=1))

    def check(self, sites: Mapping[str, Site] | None, masks: Any) -> None:
        """Names and shapes of what is attached, before anything is traced."""
        c = self.config
        if masks is not None and not isinstance(masks, Seq2SeqMasks):
            raise ValueError(
                f"masks of an encoder-decoder must be Seq2SeqMasks, got {type(masks).__name__}; "
                "put the masks of each stack into one"
            )
        decoder = None if masks is None else masks.decoder
        if c.cell == "ssru" and decoder is not None and decoder.head is not None:
            raise ValueError("masks.decoder.head must be None: an SSRU decoder has no own heads")
        unknown = {n: s for n, s in (sites or {}).items() if n not in self.sites}
        check_sites(unknown, self.sites, 0)
        for part in (ENCODER, DECODER):
            check_sites(within(sites, part), self.inner[part], c.depth(part))

    def key(self, rng: jax.Array | None, train: bool, stream: int) -> jax.Array | None:
        """The key of one stage of a forward pass; None where nothing is random."""
        c = self.config
        return stream_key(rng, train, stream, (c.drop, c.attn_drop, c.ffn_drop))

    def _relative(self, part: str) -> bool:
        recurrent = part == DECODER and self.config.cell == "ssru"
        return self.config.position_kind == "relative" and not recurrent


def _init(block: Block, x: jax.Array, given: Mapping[str, Any], key: jax.Array) -> Any:
    return block.init(key, x, **given)["params"]


def sinusoids(length: int, width: int, kind: str) -> np.ndarray:
    """Sines, then cosines, of positions 0 ... ``length`` - 1, [length, width] in float32.

    The wavelengths grow from 2 pi by equal factors; the last is 10000 * 2 pi for "timing" and
    one factor short of it for "sinusoidal".
    """
    half = (width + 1) // 2
    steps = width / 2 if kind == "sinusoidal" else max(half - 1, 1)
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / steps)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(np.float32)
