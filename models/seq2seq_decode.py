"""Generation by an encoder-decoder, one token a call; see ``model.Decode``.

``start`` runs the encoder once, projects the keys and values of cross-attention once, and reads
the start token or a forced prefix; ``step`` reads one token a row. All rows write the same
column of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from steppe.models.attention import columns_of
from steppe.models.layers import run
from steppe.models.layout import rows as split_rows
from steppe.models.model import Batch, Inputs, Masks
from steppe.models.seq2seq_block import Block, Part
from steppe.models.sites import DECODER, OUTER_SITES, Hooks, Site, SiteContext, within
from steppe.models.tree import Params

if TYPE_CHECKING:
    from steppe.models.seq2seq_net import Network, Seq2SeqMasks


@flax.struct.dataclass
class Seq2SeqState:
    """What a decoder carries from token to token.

    Attributes:
      memory: keys and values of the encoder's output, [L, B, H, S, Dh], the columns of a
        prefix (``cross.kv_prefix``) in front.
      memory_mask: [B, S], True where a column is to be seen.
      cache: keys and values of the tokens read, [L, B, H, P + N, Dh], with the P columns of a
        prefix (``attn.kv_prefix``) in front and room for all tokens to come; None when
        recurrent.
      mask: [B, P + N], True at the columns that are written and no padding; None when
        recurrent.
      cell: the recurrent state [L, B, D], or None.
      position: position of the next token [B].
      column: where the next token's keys are written, int32 scalar.
      prefix: P.
    """

    memory: tuple[jax.Array, jax.Array]
    memory_mask: jax.Array
    cache: tuple[jax.Array, jax.Array] | None
    mask: jax.Array | None
    cell: jax.Array | None
    position: jax.Array
    column: jax.Array
    prefix: int = flax.struct.field(pytree_node=False, default=0)

    def take(self, rows: jax.Array) -> Seq2SeqState:
        """The state of the rows [N] of the batch, in that order; N may differ from B."""

        def pick(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda a: jnp.take(a, rows, axis=axis), tree)

        return self.replace(  # type: ignore[attr-defined]
            memory=pick(self.memory, 1),
            memory_mask=pick(self.memory_mask, 0),
            cache=pick(self.cache, 1),
            mask=pick(self.mask, 0),
            cell=pick(self.cell, 1),
            position=pick(self.position, 0),
        )


def functions(net: Network) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``start`` and ``step`` of ``model.Decode`` for one network."""

    def start(
        params: Params,
        batch: Batch,
        more: int,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Seq2SeqMasks | None = None,
        last_only: bool = True,
    ) -> tuple[jax.Array, Seq2SeqState]:
        """Reads the source and what the decoder is to begin with.

        Args:
          batch: ``input_ids`` [B, T] with ``attention_mask``; and, to go on from a prefix,
            ``decoder_input_ids`` [B, U] with the start token first, padded on the left with
            ``decoder_attention_mask``. Default: the model's start token alone.
          more: tokens to come; room for the last of them is left too.
          last_only: give [B, V], the scores of the first new token; else [B, U, V].

        Raises:
          ValueError: ``more`` is negative, or prefix and ``more`` exceed the positions.
        """
        c = net.config
        net.check(sites, masks)
        memory, source = net.encode(params, batch, masks=masks, sites=sites)
        ids, mask = batch.get("decoder_input_ids"), batch.get("decoder_attention_mask")
        if ids is None:
            ids, mask = jnp.full((memory.shape[0], 1), c.start_id, jnp.int32), None
        target = net.embed(params, DECODER, ids, mask, sites=sites)
        length = target.hidden.shape[1]
        if more < 0:
            raise ValueError(f"more must be >= 0 tokens, got {more}")
        if c.position_kind != "relative" and length + more > c.max_length:
            raise ValueError(
                f"a prefix of {length} tokens and more={more} exceed max_length={c.max_length}; "
                "ask for fewer tokens, or load a model with more positions"
            )
        fixed = net.masks_and_bias(params, DECODER, target, source)

        def read(block: Block, layer: Any, x: jax.Array, _: Any, **options: Any) -> Any:
            out = run(block, layer, x, memory=memory, **fixed, **options)
            return out[0], out[1:]

        hidden, (kept, across) = _layers(net, read, params, target, None, sites, masks, step=False)
        hidden = net.finish(params, DECODER, hidden, None)
        hidden = hidden[:, -1] if last_only else hidden[:, target.prompt :]
        logits = net.head(params, hidden, sites=sites)
        state = _state(net, target, source, across, kept, more)
        return _float32(logits), state

    def step(
        params: Params,
        tokens: jax.Array,
        state: Seq2SeqState,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Seq2SeqMasks | None = None,
    ) -> tuple[jax.Array, Seq2SeqState]:
        """Reads tokens [B] and scores the next ones, [B, V] in float32."""
        net.check(sites, masks)
        position = state.position[:, None]
        inputs = net.embed(params, DECODER, tokens[:, None], None, position, sites=sites, step=True)
        memory_mask = state.memory_mask[:, None, None, :]
        own_bias, past_bias, seen = None, None, None
        if state.cache is not None and state.mask is not None:
            columns = jnp.arange(state.mask.shape[1]) - state.prefix
            seen = state.mask[:, None, None, :]
            here = state.column[None]
            own_bias = net.bias(params, DECODER, here, here)
            past_bias = net.bias(params, DECODER, here, columns)
            if past_bias is not None:
                past_bias = jnp.where(columns >= 0, past_bias, 0)

        def read(block: Block, layer: Any, x: jax.Array, held: Any, **options: Any) -> Any:
            own, memory = held
            past = own if state.cache is None else Part(own[0], own[1], seen, past_bias)
            across = Part(memory[0], memory[1], memory_mask)
            return run(block, layer, x, past, across, bias=own_bias, method=Block.step, **options)

        held = (state.cell if state.cache is None else state.cache, state.memory)
        hidden, kept = _layers(net, read, params, inputs, held, sites, masks, step=True)
        hidden = net.finish(params, DECODER, hidden[:, 0], None)
        logits = net.head(params, hidden, sites=sites, step=True)
        new: dict[str, Any] = {"position": state.position + 1, "column": state.column + 1}
        if state.cache is None or state.mask is None:
            new["cell"] = kept
        else:
            at = state.column + state.prefix
            new["cache"] = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, one.astype(old.dtype), at, axis=3)
                for old, one in zip(state.cache, kept, strict=True)
            )
            new["mask"] = state.mask | (jnp.arange(state.mask.shape[1]) == at)[None]
        return _float32(logits), state.replace(**new)  # type: ignore[attr-defined]

    return start, step


def _float32(logits: jax.Array | None) -> jax.Array:
    if logits is None:
        raise ValueError("a model without a head scores no tokens; load it with head='lm'")
    return logits.astype(jnp.float32)


def _layers(
    net: Network,
    read: Callable[..., Any],
    params: Params,
    inputs: Inputs,
    held: Any,
    sites: Mapping[str, Site] | None,
    masks: Seq2SeqMasks | None,
    *,
    step: bool,
) -> tuple[jax.Array, Any]:
    """The decoder's layers, with what each keeps stacked over layers.

    ``read(block, layer_params, x, held_of_layer, *, hooks, *_mask) -> (x, kept)``.
    """
    c = net.config
    inner = {n: s for n, s in within(sites, DECODER).items() if n not in OUTER_SITES}
    deltas = {n: s.delta for n, s in inner.items()}
    layer_masks = net.layer_masks(DECODER, masks) or Masks()
    context = SiteContext(mask=inputs.mask, step=step)

    def body(x: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
        layer, delta, mask, mine, index = slices
        hooks = Hooks(inner, delta, context._replace(layer=index))
        kept = []

        def base(y: jax.Array) -> jax.Array:
            y, own = read(
                net.blocks[DECODER],
                layer,
                y,
                mine,
                hooks=hooks,
                head_mask=mask.head,
                ffn_mask=mask.ffn,
                layer_mask=mask.layer,
            )
            kept.append(own)
            return y

        y = hooks("resid", x, base)
        if not kept:  # the site left the layer out; later tokens may still read it
            base(x)
        return split_rows(y), kept[-1]

    layers = c.decoder_layers
    xs = (params[DECODER]["layers"], deltas, layer_masks, held, jnp.arange(layers))
    unroll = layers if layers <= c.unroll else 1
    return jax.lax.scan(body, split_rows(inputs.hidden), xs, length=layers, unroll=unroll)


def _state(
    net: Network, target: Inputs, source: Inputs, memory: Any, kept: Any, more: int
) -> Seq2SeqState:
    """The state after the prefix, with room for ``more`` tokens."""
    rows, length = target.hidden.shape[:2]
    mask = jnp.ones((rows, length), bool)
    if target.mask is not None:
        if target.mask.ndim != 2:
            raise ValueError(
                "generation needs a decoder_attention_mask [batch, tokens], got shape "
                f"{tuple(target.mask.shape)}"
            )
        mask = target.mask != 0
    position = mask.sum(axis=1).astype(jnp.int32)
    seen = columns_of(source.mask)
    columns = memory[0].shape[3]
    if seen is None:
        memory_mask = jnp.ones((rows, columns), bool)
    else:
        front = columns - seen.shape[-1]
        memory_mask = jnp.pad(seen, ((0, 0), (front, 0)), constant_values=True)
    common: dict[str, Any] = {
        "memory": memory,
        "memory_mask": memory_mask,
        "position": position,
        "column": jnp.asarray(length, jnp.int32),
    }
    if net.config.cell == "ssru":
        return Seq2SeqState(cache=None, mask=None, cell=kept, **common)
    prefix = kept[0].shape[3] - length
    room = ((0, 0),) * 3 + ((0, more), (0, 0))
    return Seq2SeqState(
        cache=(jnp.pad(kept[0], room), jnp.pad(kept[1], room)),
        mask=jnp.pad(mask, ((0, 0), (prefix, more)))
        | (jnp.arange(prefix + length + more) < prefix)[None],
        cell=None,
        prefix=prefix,
        **common,
    )
