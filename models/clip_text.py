"""The text tower of CLIP: a causal pre-norm transformer, read where a text ends.

  embed/{word,position}/table, layers/..., norm, projection/kernel

Radford et al. 2021 (arXiv 2103.00020), section 2.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import vision
from steppe.models.attention import Implementation, attention_mask, causal_mask
from steppe.models.dropout import stream_key
from steppe.models.heads import HeadConfig
from steppe.models.layers import (
    Attention,
    Dense,
    Embedding,
    FeedForward,
    LayerNorm,
    activation,
    run,
)
from steppe.models.model import Batch, Inputs, Masks, Model, ModelOut, Parts, Rules
from steppe.models.prenorm import LayerNormBlock
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

# Files of before July 2023 name this end token whatever their tokenizer's is.
LEGACY_END = 2


RULES: Rules = (
    (r"embed/word/table", (None, ("fsdp", "model"))),
    *(rule for rule in vision.RULES if not rule[0].startswith(("embed/patch", "embed/(", "pool"))),
)


@dataclass(frozen=True)
class ClipTextConfig:
    """The text tower of CLIP.

    Attributes:
      family: name of the family whose files it reads and writes.
      vocab_size, width, layers, heads, ffn_width: V, D, L, H, F.
      positions: rows of the position table.
      end_id: id of the end token; a text is read where it first stands. For 2, a value that
        old files hold by mistake, a text is read at its largest id instead.
      act, epsilon: feed-forward activation, epsilon of the norms.
      projection: width E of the projection whose output [B, E] is then the logits; 0 = none.
      drop, attn_drop: dropout rates of branches and attention probabilities.
      head: always None.
      remat, unroll, attention: as in ``EncoderConfig``.
    """

    family: str = "clip_text_model"
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    ffn_width: int = 2048
    positions: int = 77
    end_id: int = 49407
    act: str = "quick_gelu"
    epsilon: float = 1e-5
    projection: int = 0
    drop: float = 0.0
    attn_drop: float = 0.0
    head: HeadConfig | None = None
    remat: str = "auto"
    unroll: int = 6
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        for name in ("vocab_size", "width", "layers", "heads", "ffn_width", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        no_head(self.head)
        activation(self.act)

    @property
    def max_length(self) -> int:
        """Longest text that the position table can serve, in tokens."""
        return self.positions

    def with_head(self, head: HeadConfig | None) -> ClipTextConfig:
        """The same tower; only ``head=None`` is possible."""
        return dataclasses.replace(self, head=head)

    def build(self) -> Model:
        """The model of this configuration.

        Its batch holds ``input_ids`` [B, T] and where wanted ``attention_mask`` [B, T];
        attention is causal. ``hidden`` [B, T, D] is after the final norm.
        """
        tower = TextTower(self)
        return Model(
            config=self,
            init=tower.init,
            apply=tower.apply,
            axes=RULES,
            sites=OUTER_SITES + LAYER_SITES,
            parts=Parts(tower.embed, tower.layers, tower.head),
        )


class TextTower:
    """The pure functions of one configuration; it holds modules, never parameters."""

    def __init__(self, config: ClipTextConfig) -> None:
        c = self.config = config
        self.word = Embedding(c.vocab_size, c.width)
        self.position = Embedding(c.positions, c.width, 0.01)
        self.norm = LayerNorm(c.epsilon)
        self.block = LayerNormBlock(
            attention=functools.partial(
                Attention,
                heads=c.heads,
                head_dim=c.width // c.heads,
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
        self.project = Dense(c.projection, use_bias=False)

    def init(self, key: jax.Array) -> Params:
        c = self.config
        keys = iter(jax.random.split(key, 5))
        x = jnp.zeros((1, 1, c.width))
        ids = jnp.zeros((1, 1), jnp.int32)

        def module(net: Any, *args: Any) -> Params:
            return net.init(next(keys), *args)["params"]

        hooks = Hooks(None, {}, SiteContext())
        params: Params = {
            "embed": {"word": module(self.word, ids), "position": module(self.position, ids)},
            "layers": init_stack(
                lambda k: self.block.init(k, x, hooks=hooks)["params"], next(keys), c.layers
            ),
            "norm": module(self.norm, x),
        }
        if c.projection:
            params["projection"] = module(self.project, x)
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
        """The forward pass; see ``ClipTextConfig.build`` for the batch.

        Args:
          embeds: word embeddings [B, T, D] in place of the look-up; a tower with a projection
            still needs ``input_ids``, to know where a text ends.

        Raises:
          ValueError: a missing or misshapen input, a text longer than the positions, an
            unknown site, or train=True without rng although a dropout rate is not 0.
        """
        check_sites(sites, OUTER_SITES + LAYER_SITES, self.config.layers)
        more: dict[str, Any] = {"sites": sites, "rng": rng, "train": train}
        inputs = self.embed(params, batch, embeds=embeds, **more)
        hidden = self.layers(params, inputs, masks=masks, all_hidden=all_hidden, **more)
        final = run(self.norm, params["norm"], hidden[-1] if all_hidden else hidden)
        hidden = hidden.at[-1].set(final) if all_hidden else final
        if not self.config.projection:
            return ModelOut(None, hidden)
        ids = batch.get("input_ids")
        if ids is None:
            raise ValueError("the batch holds no input_ids, which say where a text ends")
        return ModelOut(self.logits(params, final, inputs, ids, **more), hidden)

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
        if embeds is None and ids is None:
            raise ValueError("the batch holds no input_ids and no embeds are given")
        words = run(self.word, p["word"], ids) if embeds is None else embeds
        rows, length = words.shape[:2]
        if rows == 0 or length == 0:
            raise ValueError(f"the batch is empty: {rows} texts of {length} tokens")
        for name in ("input_ids", "attention_mask"):
            value = batch.get(name)
            if value is not None and tuple(value.shape) != (rows, length):
                raise ValueError(
                    f"batch[{name!r}] must have shape {(rows, length)}, got {tuple(value.shape)}"
                )

        def base(x: Inputs) -> Inputs:
            length = x.hidden.shape[1]
            if length > c.positions:
                raise ValueError(
                    f"text of {length} tokens is longer than the model's {c.positions} "
                    "positions; truncate it"
                )
            where = jnp.arange(length) if x.positions is None else x.positions
            return x._replace(hidden=x.hidden + run(self.position, p["position"], where))

        inputs = Inputs(words, batch.get("position_ids"), None, batch.get("attention_mask"))
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
    ) -> jax.Array:
        c = self.config
        key = stream_key(rng, train, 1, (c.drop, c.attn_drop))
        mask = causal_mask(inputs.hidden.shape[1])
        visible = attention_mask(inputs.mask)
        if visible is not None:
            mask = mask & visible

        def block(layer: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
            return run(self.block, layer, x, mask=mask, **kwargs)

        return run_stack(
            block,
            params["layers"],
            inputs.hidden,
            layers=c.layers,
            start=start,
            stop=stop,
            sites=sites,
            masks=masks,
            context=SiteContext(rng=key, train=train, mask=inputs.mask),
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
        ids: jax.Array | None = None,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array | None:
        """Final norm and projection on the output of any layer; needs ``ids`` [B, T]."""
        if not self.config.projection:
            return None
        if ids is None:
            raise ValueError("the head of a text tower needs ids=, to know where a text ends")
        hidden = run(self.norm, params["norm"], hidden)
        return self.logits(params, hidden, inputs, ids, sites=sites, rng=rng, train=train)

    def logits(
        self,
        params: Params,
        hidden: jax.Array,
        inputs: Inputs,
        ids: jax.Array,
        *,
        sites: Mapping[str, Site] | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Projected ends of texts from normed hidden states, whose first rows are a prompt."""
        read = ending(hidden[:, inputs.prompt :], ids, self.config.end_id)

        def base(x: jax.Array) -> jax.Array:
            return run(self.project, params["projection"], x)

        return outer_hooks(sites, inputs.mask, rng, train)("logits", read, base)


def ending(hidden: jax.Array, ids: jax.Array, end_id: int) -> jax.Array:
    """Hidden states [B, T, D] where each text ends, [B, D].

    That is at the first ``end_id`` of ids [B, T]; a text without one is read at its first
    token, as in the published code. For ``end_id`` 2 see :class:`ClipTextConfig`.
    """
    ids = jnp.asarray(ids)
    where = jnp.argmax(ids if end_id == LEGACY_END else ids == end_id, axis=1)
    return jnp.take_along_axis(hidden, where[:, None, None], axis=1)[:, 0]


def no_head(head: HeadConfig | None) -> None:
    """Refuses a head.

    Raises:
      ValueError: there is one.
    """
    if head is not None:
        raise ValueError(f"CLIP has no heads, got {head.kind!r}; put one on its image tower alone")
