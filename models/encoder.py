"""Bidirectional encoders: BERT, RoBERTa, DistilBERT, and MPNet with relative-position bias.

One configuration describes all four; what differs is data, not code. Parameters:

  embed/{word,position,type}/table, embed/norm
  relative/table                              MPNet, [buckets, H], shared by all layers
  layers/attn/{q,k,v,o}, layers/attn_norm     stacked over layers on axis 0
  layers/ffn/{in,out}, layers/ffn_norm
  pooler/dense, head/...

Devlin et al. 2019 (arXiv 1810.04805), Liu et al. 2019 (1907.11692), Sanh et al. 2019
(1910.01108), Song et al. 2020 (2004.09297).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.attention import Implementation, attention_mask
from steppe.models.dropout import dropout, stream_key
from steppe.models.heads import POOLED, Head, HeadConfig
from steppe.models.layers import (
    Attention,
    Dense,
    Embedding,
    FeedForward,
    LayerNorm,
    PostNormBlock,
    activation,
    run,
)
from steppe.models.model import Batch, Inputs, Masks, Model, ModelOut, Parts, Rules
from steppe.models.sites import (
    LAYER_SITES,
    OUTER_SITES,
    Hooks,
    Site,
    SiteContext,
    check_sites,
    outer_hooks,
)
from steppe.models.stack import REMAT, init_stack, run_stack
from steppe.models.tree import Params

# Megatron-style: the first matrix of a pair splits its outputs over "model", the second its
# inputs, so that a sublayer needs one all-reduce; "fsdp" splits the other dimension.
RULES: Rules = (
    (r"embed/word/table", (None, ("fsdp", "model"))),
    (r"embed/(position|type)/table", (None, None)),
    (r"relative/table", (None, None)),
    (r"layers/attn/[qkv]/kernel", (None, "fsdp", "model")),
    (r"layers/attn/o/kernel", (None, "model", "fsdp")),
    (r"layers/ffn/in/kernel", (None, "fsdp", "model")),
    (r"layers/ffn/out/kernel", (None, "model", "fsdp")),
    (r"layers/(attn/[qkv]|ffn/in)/bias", (None, "model")),
    (r"layers/(attn/o|ffn/out)/bias", (None, None)),
    (r"layers/\w+_norm/(scale|bias)", (None, None)),
    (r"(embed/norm|head/norm)/(scale|bias)", (None,)),
    (r"(pooler/dense|head/(dense|out))/kernel", (None, None)),
    (r"(pooler/dense|head/(dense|out))/bias|head/bias", (None,)),
)


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder.

    Attributes:
      family: name of the family whose files it reads and writes.
      vocab_size, width, layers, heads, ffn_width: V, D, L, H, F.
      positions: rows of the position table, offset included.
      position_offset: id of the first position (RoBERTa and MPNet: pad id + 1); when it is
        not 0, padding tokens get the position ``position_offset - 1``, as there.
      types: rows of the token-type table; 0 = none.
      pad_id: id of the padding token.
      act: feed-forward activation.
      epsilon: of the norms.
      relative_buckets, relative_distance: MPNet's bias; 0 buckets = none.
      pooler: whether a tanh layer over the first token belongs to the model.
      head_dim: Dh; None = D / H. Other ones come of cutting heads (see ``shrink``).
      drop, attn_drop: dropout rates of hidden states and attention probabilities.
      head: the head, or None.
      remat: see ``run_stack``.
      unroll: a stack of at most so many layers is written out, a deeper one is looped over. On
        a CPU the loop's buffers cost a 6-layer model a tenth of its step; compile time of
        deeper models stays that of one layer.
      attention: implementation, see ``attend``.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    ffn_width: int
    positions: int
    position_offset: int = 0
    types: int = 0
    pad_id: int = 0
    act: str = "gelu"
    epsilon: float = 1e-12
    relative_buckets: int = 0
    relative_distance: int = 128
    pooler: bool = False
    head_dim: int | None = None
    drop: float = 0.1
    attn_drop: float = 0.1
    head: HeadConfig | None = None
    remat: str = "auto"
    unroll: int = 6
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        for name in ("vocab_size", "width", "layers", "heads", "ffn_width", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        activation(self.act)

    @property
    def max_length(self) -> int:
        """Longest sequence that the position table can serve, in tokens."""
        return self.positions - self.position_offset

    @property
    def dim(self) -> int:
        """Dh, dimensions of a head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    def with_head(self, head: HeadConfig | None) -> EncoderConfig:
        """The same encoder under another head."""
        return dataclasses.replace(self, head=head)

    def build(self) -> Model:
        """The model of this configuration."""
        encoder = _Encoder(self)
        return Model(
            config=self,
            init=encoder.init,
            apply=encoder.apply,
            axes=RULES,
            sites=OUTER_SITES + LAYER_SITES,
            parts=Parts(encoder.embed, encoder.layers, encoder.head),
        )


class _Encoder:
    """The pure functions of one configuration; it holds modules, never parameters."""

    def __init__(self, config: EncoderConfig) -> None:
        c = self.config = config
        self.word = Embedding(c.vocab_size, c.width)
        self.position = Embedding(c.positions, c.width)
        self.type = Embedding(c.types, c.width)
        self.embed_norm = LayerNorm(c.epsilon)
        self.relative = Embedding(c.relative_buckets, c.heads)
        self.block = PostNormBlock(
            attention=functools.partial(
                Attention,
                heads=c.heads,
                head_dim=c.dim,
                features=c.width,
                drop=c.attn_drop,
                implementation=c.attention,
            ),
            feed_forward=functools.partial(
                FeedForward, width=c.ffn_width, features=c.width, act=c.act
            ),
            epsilon=c.epsilon,
            drop=c.drop,
        )
        self.pool = Dense(c.width)
        self.head_net = None if c.head is None else Head(c.head, c.width, c.act, c.epsilon)

    def init(self, key: jax.Array) -> Params:
        c = self.config
        keys = iter(jax.random.split(key, 8))
        ids = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, c.width))

        def module(net: Any, *args: Any, **kwargs: Any) -> Params:
            return net.init(next(keys), *args, **kwargs)["params"]

        embed = {"word": module(self.word, ids), "position": module(self.position, ids)}
        if c.types:
            embed["type"] = module(self.type, ids)
        embed["norm"] = module(self.embed_norm, x)
        params: Params = {"embed": embed}
        if c.relative_buckets:
            params["relative"] = module(self.relative, ids)
        hooks = Hooks(None, {}, SiteContext())
        params["layers"] = init_stack(
            lambda k: self.block.init(k, x, hooks=hooks)["params"], next(keys), c.layers
        )
        if c.pooler:
            params["pooler"] = {"dense": module(self.pool, x)}
        if self.head_net is not None and c.head is not None:
            table = embed["word"]["table"] if c.head.kind == "mlm" else None
            x = x[:, 0] if c.head.kind in POOLED else x
            params["head"] = module(self.head_net, x, table=table)
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

        Args:
          batch: ``input_ids`` [B, T] (or ``embeds``), and where wanted ``attention_mask``
            [B, T] or [B, T, T], ``token_type_ids`` [B, T], ``position_ids`` [B, T] or [T].
          embeds: word embeddings [B, T, D] in place of the look-up.

        Raises:
          ValueError: a missing input, a sequence longer than the positions, an unknown site,
            or train=True without rng although a dropout rate is not 0.
        """
        check_sites(sites, OUTER_SITES + LAYER_SITES, self.config.layers)
        inputs = self.embed(params, batch, sites=sites, embeds=embeds, rng=rng, train=train)
        more: dict[str, Any] = {"sites": sites, "masks": masks, "rng": rng, "train": train}
        if all_hidden or not self._reads_first_token(sites):
            hidden = self.layers(params, inputs, all_hidden=all_hidden, **more)
            final = hidden[-1] if all_hidden else hidden
            logits = self.head(params, final, inputs, sites=sites, rng=rng, train=train)
            return ModelOut(logits, hidden)
        # The logits need the last layer at the first token only: without the other tokens'
        # queries and feed-forward it is five sixths cheaper. Whoever reads ``hidden`` gets the
        # whole layer; for everybody else the compiler drops it.
        last = self.config.layers - 1
        below = inputs._replace(hidden=self.layers(params, inputs, stop=last, **more))
        first = self.layers(params, below, start=last, queries=inputs.prompt + 1, **more)
        logits = self.head(params, first, inputs, sites=sites, rng=rng, train=train)
        return ModelOut(logits, self.layers(params, below, start=last, **more))

    def embed(
        self,
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> Inputs:
        c, p = self.config, params["embed"]
        ids = batch.get("input_ids")
        if embeds is not None:
            words = embeds
        elif ids is not None:
            words = run(self.word, p["word"], ids)
        else:
            raise ValueError("the batch holds no input_ids and no embeds are given")
        _check_inputs(batch, words.shape)
        positions = batch.get("position_ids")
        if positions is None:
            positions = self._positions(ids, words.shape[1])
        key = self._key(rng, train, 0)

        def base(x: Inputs) -> Inputs:
            length = x.hidden.shape[1]
            if length > c.max_length:
                raise ValueError(
                    f"sequence of {length} tokens is longer than the model's {c.max_length} "
                    "positions; truncate it, or load a model with more"
                )
            y = x.hidden + run(self.position, p["position"], x.positions)
            if c.types:
                types = jnp.zeros(y.shape[:2], jnp.int32) if x.types is None else x.types
                y = y + run(self.type, p["type"], types)
            y = run(self.embed_norm, p["norm"], y)
            return x._replace(hidden=dropout(y, c.drop, key))

        inputs = Inputs(words, positions, batch.get("token_type_ids"), batch.get("attention_mask"))
        return outer_hooks(sites, inputs.mask, rng, train)("embed", inputs, base)

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
        x = inputs.hidden
        mask = attention_mask(inputs.mask)
        bias = None
        if c.relative_buckets:
            table = params["relative"]["table"]
            length = x.shape[1]
            buckets = relative_buckets(length, c.relative_buckets, c.relative_distance)
            bias = jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]

        def block(layer: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
            return run(self.block, layer, x, mask=mask, bias=bias, queries=queries, **kwargs)

        return run_stack(
            block,
            params["layers"],
            x,
            layers=c.layers,
            start=start,
            stop=stop,
            sites=sites,
            masks=masks,
            context=SiteContext(rng=self._key(rng, train, 1), train=train, mask=inputs.mask),
            remat=c.remat,
            unroll=c.unroll,
            all_hidden=all_hidden,
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
        c, net = self.config, self.head_net
        if net is None or c.head is None:
            return None
        hidden = hidden[:, inputs.prompt :]
        key = self._key(rng, train, 2)
        table = params["embed"]["word"]["table"] if c.head.kind == "mlm" else None
        if c.head.kind in POOLED:
            hidden = self.pooled(params, hidden)

        def base(x: jax.Array) -> jax.Array:
            return run(net, params["head"], x, table=table, rng=key)

        return outer_hooks(sites, inputs.mask, rng, train)("logits", hidden, base)

    def _reads_first_token(self, sites: Mapping[str, Site] | None) -> bool:
        """Whether the head reads one token and no site needs to see the others in a layer."""
        head = self.config.head
        inside = (site for name, site in (sites or {}).items() if name not in OUTER_SITES)
        return head is not None and head.kind in POOLED and all(s.tokenwise for s in inside)

    def pooled(self, params: Params, hidden: jax.Array) -> jax.Array:
        """First token [B, D], through the pooler where the model has one."""
        first = hidden[:, 0]
        if not self.config.pooler:
            return first
        return jnp.tanh(run(self.pool, params["pooler"]["dense"], first))

    def _positions(self, ids: jax.Array | None, length: int) -> jax.Array:
        offset = self.config.position_offset
        if offset == 0 or ids is None:
            return jnp.arange(offset, offset + length)
        real = (ids != self.config.pad_id).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + offset - 1

    def _key(self, rng: jax.Array | None, train: bool, stream: int) -> jax.Array | None:
        c = self.config
        rates = (c.drop, c.attn_drop, c.head.drop if c.head else 0.0)
        return stream_key(rng, train, stream, rates)


def _check_inputs(batch: Batch, shape: tuple[int, ...]) -> None:
    """Shapes that would broadcast instead of failing."""
    rows, length = shape[:2]
    if rows == 0 or length == 0:
        raise ValueError(f"the batch is empty: {rows} rows of {length} tokens")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        value = batch.get(name)
        if value is None:
            continue
        full = (rows, length, length) if value.ndim == 3 else (rows, length)
        if tuple(value.shape) != full:
            raise ValueError(f"batch[{name!r}] must have shape {full}, got {tuple(value.shape)}")


def relative_buckets(length: int, buckets: int, distance: int) -> jax.Array:
    """Bidirectional T5-style buckets of key position minus query position, [T, T].

    Half of the buckets are for keys after the query. Of each half, the first half holds exact
    distances and the rest grow logarithmically up to ``distance``.
    """
    position = jnp.arange(length)
    relative = position[None, :] - position[:, None]
    half = buckets // 2
    after = jnp.where(relative > 0, half, 0)
    away = jnp.abs(relative)
    exact = half // 2
    ratio = jnp.log(jnp.maximum(away, 1) / exact) / math.log(distance / exact)
    far = exact + (ratio * (half - exact)).astype(jnp.int32)
    return after + jnp.where(away < exact, away, jnp.minimum(far, half - 1))
