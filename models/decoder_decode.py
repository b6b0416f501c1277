"""Generation by a decoder, one token a call; see ``model.Decode``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import cache
from steppe.models.cache import KVCache
from steppe.models.decoder_block import Past, View
from steppe.models.layers import run
from steppe.models.layout import rows as split_rows
from steppe.models.model import Batch, Inputs, Masks
from steppe.models.sites import OUTER_SITES, Hooks, Site, SiteContext, check_sites
from steppe.models.tree import Params

if TYPE_CHECKING:
    from steppe.models.decoder_net import Network


def functions(net: Network) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``start`` and ``step`` of ``model.Decode`` for one network."""
    c = net.config

    def start(
        params: Params,
        batch: Batch,
        more: int,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        last_only: bool = True,
    ) -> tuple[jax.Array, KVCache]:
        """Reads the prompt.

        Args:
          batch: ``input_ids`` [B, T] with ``attention_mask`` [B, T], padded on the left, and
            optionally ``position_ids`` [B, T].
          more: tokens to come; room for the last of them is left too.
          last_only: give [B, V], the scores of the first new token; else [B, T, V].

        Raises:
          ValueError: no language-model head, ``more`` is negative, prompt and ``more`` exceed
            the positions, or the prompt is padded on the right or packed.
        """
        check_sites(sites, net.sites, c.layers)
        _check_prompt(net, batch, more)
        inputs = net.embed(params, batch, sites=sites)
        length = inputs.hidden.shape[1]
        if length + more > c.max_length:
            raise ValueError(
                f"a prompt of {length} tokens and more={more} exceed max_length={c.max_length}; "
                "ask for fewer tokens, shorten the prompt, or load a model with more positions"
            )
        views = net.views(inputs.positions, inputs.mask, None, inputs.prompt)
        context = SiteContext(mask=inputs.mask)
        hidden, (keys, values) = _layers(
            net, params, inputs.hidden, views, None, sites, masks, context
        )
        assert inputs.positions is not None
        state = cache.filled(
            keys,
            values,
            inputs.mask,
            inputs.positions,
            more,
            cache.split(params["layers"], c.layers),
        )
        read = hidden[:, -1:] if last_only else hidden[:, inputs.prompt :]
        logits = _scores(net, params, read, sites, step=False)
        return (logits[:, 0] if last_only else logits), state

    def step(
        params: Params,
        tokens: jax.Array,
        state: KVCache,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Reads tokens [B] and scores the next ones, [B, V] in float32."""
        check_sites(sites, net.sites, c.layers)
        position = state.position[:, None]
        batch = {"input_ids": tokens[:, None], "position_ids": position}
        inputs = net.embed(params, batch, sites=sites, step=True)
        turns = net.views(position, None, None, 0)
        context = SiteContext(step=True)
        hidden, (keys, values) = _layers(
            net, params, inputs.hidden, turns, state, sites, masks, context
        )
        logits = _scores(net, params, hidden, sites, step=True)
        return logits[:, 0], state.add(keys, values)

    return start, step


def _check_prompt(net: Network, batch: Batch, more: int) -> None:
    head = net.config.head
    if head is None or head.kind != "lm":
        kind = "no head" if head is None else f"a {head.kind} head"
        raise ValueError(f"a model with {kind} scores no tokens; load it with head='lm'")
    if more < 0:
        raise ValueError(f"more must be >= 0 tokens, got {more}")
    if "segment_ids" in batch:
        raise ValueError("a packed row has no one end to go on from; give one text a row")
    mask = batch.get("attention_mask")
    if mask is None:
        return
    if mask.ndim != 2:
        raise ValueError(
            f"generation needs an attention_mask [batch, tokens], got shape {tuple(mask.shape)}"
        )
    if isinstance(mask, np.ndarray) and not mask[:, -1].all():
        row = int(np.flatnonzero(mask[:, -1] == 0)[0])
        raise ValueError(
            f"attention_mask: row {row} ends in padding; prompts are padded on the left"
        )


def _scores(
    net: Network,
    params: Params,
    hidden: jax.Array,
    sites: Mapping[str, Site] | None,
    *,
    step: bool,
) -> jax.Array:
    normed = run(net.norm, params["norm"], hidden)
    logits = net.logits(params, normed, Inputs(hidden, None, None, None), sites=sites, step=step)
    assert logits is not None
    return logits.astype(jnp.float32)


def _layers(
    net: Network,
    params: Params,
    x: jax.Array,
    views: tuple[View, View | None],
    state: KVCache | None,
    sites: Mapping[str, Site] | None,
    masks: Masks | None,
    context: SiteContext,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """All layers, with the keys and values of the tokens read, [L, B, Hkv, P + T, Dh]."""
    from steppe.models.decoder_net import choose

    c = net.config
    deltas = {n: s.delta for n, s in (sites or {}).items() if n not in OUTER_SITES}
    narrow = views[1] is not None
    seen: tuple[jax.Array, jax.Array] | None = None
    if state is not None:
        only = c.window if all(c.local) else None
        seen = (state.seen(only), state.seen(c.window) if narrow else state.mask)

    def body(x: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
        layer, delta, mask, index, local, held = slices
        hooks = Hooks(sites, delta, context._replace(layer=index))
        past = None
        if seen is not None:
            if isinstance(local, bool):
                mine = seen[1] if narrow and local else seen[0]
            else:
                mine = jnp.where(local, seen[1], seen[0]) if narrow else seen[0]
            past = Past(held[0], held[1], mine)
        kept: list[Any] = []

        def base(y: jax.Array) -> jax.Array:
            y, own = net.block.apply(
                {"params": layer},
                y,
                hooks=hooks,
                view=choose(*views, local),
                past=past,
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

    held = None if state is None else (state.keys, state.values)
    index = jnp.arange(c.layers)
    rest: Any = (deltas, masks or Masks(), index, jnp.asarray(c.local), held)
    xs = (params["layers"], *rest)
    if state is None or state.weights is None:
        unroll = c.layers if c.layers <= c.unroll else 1
        return jax.lax.scan(body, split_rows(x), xs, length=c.layers, unroll=unroll)
    x = split_rows(x)
    every = []
    for number in range(c.layers):
        mine = jax.tree.map(lambda a, n=number: a[n], rest)
        x, kept = body(x, (state.weights[number], *mine[:3], c.local[number], mine[4]))
        every.append(kept)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *every)
