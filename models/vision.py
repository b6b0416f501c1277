"""Vision transformers: ViT, DINOv2 (with or without registers), and the image tower of CLIP.

One configuration describes all of them. An image [B, H, W, C] is cut into patches, the patches
become tokens behind a class token, and pre-norm layers follow. Parameters:

  embed/patch/{kernel,bias}              [P * P * C, D]; a patch is (row, column, channel)
  embed/class, embed/registers, embed/mask   [D], [R, D], [D]
  embed/position/table                   [1 + N, D], the class token first
  embed/norm                             CLIP
  layers/{attn_norm,attn/{q,k,v,o},attn_scale,ffn_norm,ffn/{in,gate,out},ffn_scale}
  norm                                   after the last layer
  pooler/dense, projection/kernel, head/out

Dosovitskiy et al. 2021 (arXiv 2010.11929), Oquab et al. 2023 (2304.07193), Darcet et al. 2023
(2309.16588), Radford et al. 2021 (2103.00020).
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
from steppe.models.layers import Attention, Dense, FeedForward, LayerNorm, activation, run
from steppe.models.model import Batch, Inputs, Masks, Model, ModelOut, Parts, Rules
from steppe.models.patches import grid_of, interpolated, normalised, patches, square
from steppe.models.prenorm import LayerNormBlock
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
from steppe.models.stack import REMAT, init_stack, run_stack
from steppe.models.tree import Params

# What a head of a vision model reads of the tokens.
READS = ("class", "class+mean")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

RULES: Rules = (
    (r"embed/patch/kernel", (None, "model")),
    (r"embed/patch/bias", ("model",)),
    (r"embed/position/table|embed/registers", (None, None)),
    (r"embed/(class|mask)", (None,)),
    (r"layers/attn/[qkv]/kernel", (None, "fsdp", "model")),
    (r"layers/attn/o/kernel", (None, "model", "fsdp")),
    (r"layers/ffn/(in|gate)/kernel", (None, "fsdp", "model")),
    (r"layers/ffn/out/kernel", (None, "model", "fsdp")),
    (r"layers/(attn/[qkv]|ffn/(in|gate))/bias", (None, "model")),
    (r"layers/(attn/o|ffn/out)/bias", (None, None)),
    (r"layers/\w+_(norm|scale)/(scale|bias)", (None, None)),
    (r"(embed/norm|norm)/(scale|bias)", (None,)),
    (r"(pooler/dense|projection|head/out)/kernel", (None, None)),
    (r"(pooler/dense|head/out)/bias", (None,)),
)


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer.

    Attributes:
      family: name of the family whose files it reads and writes.
      image_size: side in pixels of the images that the positions were learnt on. Other sizes
        are served too: positions are then interpolated.
      patch: P, side of a patch in pixels.
      channels: C.
      width, layers, heads, ffn_width: D, L, H, F.
      act: feed-forward activation.
      gated: feed-forward ``out(act(gate(x)) * in(x))`` (DINOv2 giant: SwiGLU).
      epsilon: of the norms.
      qkv_bias, patch_bias: whether queries, keys and values, and the patches, have biases.
      registers: tokens without position between the class token and the patches; R.
      mask_token: whether there is a token for masked patches (batch ``bool_masked_pos`` [B, N]).
      layer_scale: initial gain of each branch; None = no gains.
      embed_norm: whether a norm precedes the first layer (CLIP).
      antialias: whether positions are interpolated with antialiasing (DINOv2 with registers).
      pooler: whether a tanh layer over the class token belongs to the model (ViT).
      projection: width E of a projection of the class token, without bias, which the model
        then returns as its logits [B, E] (CLIP); 0 = none.
      reads: what a head reads: "class" (ViT) or "class+mean" = the class token and the mean of
        the patches, concatenated (DINOv2).
      image_mean, image_std: by channel, of images in [0, 1]; uint8 images are normalised so.
      drop, attn_drop, drop_path: dropout rates of embeddings and branches, of attention
        probabilities, and of whole branches by example.
      head: a classification or regression head, or None.
      remat, unroll, attention: as in ``EncoderConfig``.
    """

    family: str
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    ffn_width: int
    channels: int = 3
    act: str = "gelu"
    gated: bool = False
    epsilon: float = 1e-6
    qkv_bias: bool = True
    patch_bias: bool = True
    registers: int = 0
    mask_token: bool = False
    layer_scale: float | None = None
    embed_norm: bool = False
    antialias: bool = False
    pooler: bool = False
    projection: int = 0
    reads: str = "class"
    image_mean: tuple[float, ...] = IMAGENET[0]
    image_std: tuple[float, ...] = IMAGENET[1]
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.0
    head: HeadConfig | None = None
    remat: str = "auto"
    unroll: int = 6
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch", "width", "layers", "heads", "ffn_width", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the patch {self.patch}"
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"{name} must have {self.channels} entries, one a channel, "
                    f"got {getattr(self, name)}"
                )
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be > 0, got {self.image_std}")
        if self.reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {self.reads!r}")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        if self.head is not None and self.head.kind not in POOLED:
            raise ValueError(
                f"a vision model has heads {' and '.join(POOLED)}, got {self.head.kind!r}"
            )
        if self.head is not None and self.projection:
            raise ValueError("a model returns a projection or a head's logits; set projection=0")
        activation(self.act)

    @property
    def grid(self) -> int:
        """Side of the grid of patches that the positions were learnt on."""
        return self.image_size // self.patch

    @property
    def max_length(self) -> int:
        """Tokens of an image of ``image_size``; other sizes give more or fewer."""
        return 1 + self.registers + self.grid**2

    def with_head(self, head: HeadConfig | None) -> VisionConfig:
        """The same network under another head."""
        return dataclasses.replace(self, head=head)

    def build(self) -> Model:
        """The model of this configuration.

        Its batch holds ``pixel_values`` [B, H, W, C], uint8 or normalised floats, with H and W
        multiples of the patch, and where wanted ``bool_masked_pos`` [B, N] (patches to replace
        by the mask token) and ``attention_mask`` [B, 1 + R + N]. ``hidden`` is
        [B, 1 + R + N, D] after the final norm: class token, registers, patches row by row.
        """
        tower = VisionTower(self)
        return Model(
            config=self,
            init=tower.init,
            apply=tower.apply,
            axes=RULES,
            sites=tower.sites,
            parts=Parts(tower.embed, tower.layers, tower.head),
        )


class VisionTower:
    """The pure functions of one configuration; it holds modules, never parameters."""

    def __init__(self, config: VisionConfig) -> None:
        c = self.config = config
        self.sites = OUTER_SITES + LAYER_SITES + ((GATE_SITE,) if c.gated else ())
        self.patch = Dense(c.width, c.patch_bias)
        self.norm = LayerNorm(c.epsilon)
        self.block = LayerNormBlock(
            attention=functools.partial(
                Attention,
                heads=c.heads,
                head_dim=c.width // c.heads,
                features=c.width,
                use_bias=c.qkv_bias,
                out_bias=True,
                drop=c.attn_drop,
                implementation=c.attention,
            ),
            feed_forward=functools.partial(
                FeedForward, width=c.ffn_width, features=c.width, act=c.act, gated=c.gated
            ),
            epsilon=c.epsilon,
            layer_scale=c.layer_scale,
            drop=c.drop,
            drop_path=c.drop_path,
        )
        self.pool = Dense(c.width)
        self.project = Dense(c.projection, use_bias=False)
        self.head_net = None if c.head is None else Head(c.head, c.width, c.act, c.epsilon)

    def init(self, key: jax.Array) -> Params:
        c = self.config
        keys = iter(jax.random.split(key, 12))
        x = jnp.zeros((1, 1, c.width))

        def module(net: Any, *args: Any, **kwargs: Any) -> Params:
            return net.init(next(keys), *args, **kwargs)["params"]

        def normal(*shape: int) -> jax.Array:
            return 0.02 * jax.random.normal(next(keys), shape)

        embed: Params = {
            "patch": module(self.patch, jnp.zeros((1, c.patch**2 * c.channels))),
            "class": normal(c.width),
            "position": {"table": normal(1 + c.grid**2, c.width)},
        }
        if c.registers:
            embed["registers"] = normal(c.registers, c.width)
        if c.mask_token:
            embed["mask"] = jnp.zeros(c.width)
        if c.embed_norm:
            embed["norm"] = module(self.norm, x)
        hooks = Hooks(None, {}, SiteContext())
        params: Params = {
            "embed": embed,
            "layers": init_stack(
                lambda k: self.block.init(k, x, hooks=hooks)["params"], next(keys), c.layers
            ),
            "norm": module(self.norm, x),
        }
        if c.pooler:
            params["pooler"] = {"dense": module(self.pool, x)}
        if c.projection:
            params["projection"] = module(self.project, x)
        if self.head_net is not None:
            width = c.width * (2 if c.reads == "class+mean" else 1)
            params["head"] = module(self.head_net, jnp.zeros((1, width)))
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
        """The forward pass; see ``VisionConfig.build`` for the batch.

        Args:
          embeds: embedded patches [B, N, D] in place of ``pixel_values``; without those N must
            be a square.

        ``hidden`` is after the final norm, and so is the last of all hidden states.

        Raises:
          ValueError: a missing or misshapen input, an unknown site, or train=True without rng
            although a dropout rate is not 0.
        """
        c = self.config
        check_sites(sites, self.sites, c.layers)
        inputs = self.embed(params, batch, sites=sites, embeds=embeds, rng=rng, train=train)
        more: dict[str, Any] = {"sites": sites, "masks": masks, "rng": rng, "train": train}
        # On a mesh the whole last layer: jaxlib 0.10.2 partitions the shortcut wrongly over three
        # axes (logits off by 0.03).
        on_mesh = not jax.sharding.get_abstract_mesh().empty
        if all_hidden or on_mesh or not self._reads_first_token(sites):
            hidden = self.layers(params, inputs, all_hidden=all_hidden, **more)
            final = run(self.norm, params["norm"], hidden[-1] if all_hidden else hidden)
            logits = self.logits(params, final, inputs, sites=sites, rng=rng, train=train)
            return ModelOut(logits, hidden.at[-1].set(final) if all_hidden else final)
        # The logits need the last layer at the class token only, see ``EncoderConfig``.
        last = c.layers - 1
        below = inputs._replace(hidden=self.layers(params, inputs, stop=last, **more))
        first = self.layers(params, below, start=last, queries=inputs.prompt + 1, **more)
        logits = self.head(params, first, inputs, sites=sites, rng=rng, train=train)
        hidden = self.layers(params, below, start=last, **more)
        return ModelOut(logits, run(self.norm, params["norm"], hidden))

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
        pixels = batch.get("pixel_values")
        grid = None
        if pixels is not None:
            pixels = jnp.asarray(pixels)
            grid = grid_of(pixels, c.channels, c.patch)
        if embeds is not None:
            tokens = embeds
        elif pixels is not None:
            dense = normalised(pixels, c.image_mean, c.image_std)
            tokens = run(self.patch, p["patch"], patches(dense, c.patch))
        else:
            raise ValueError("the batch holds no pixel_values and no embeds are given")
        b, n, _ = tokens.shape
        if b == 0:
            raise ValueError(f"the batch is empty: embeds has shape {tuple(tokens.shape)}")
        if grid is None:
            grid = (square(n), square(n))
        elif n != math.prod(grid):
            raise ValueError(
                f"embeds holds {n} patches, images of {grid[0]} x {grid[1]} have {math.prod(grid)}"
            )
        tokens = self._masked(p, tokens, batch.get("bool_masked_pos"))
        tokens = jnp.concatenate([jnp.broadcast_to(p["class"], (b, 1, c.width)), tokens], axis=1)
        mask = batch.get("attention_mask")
        length = 1 + c.registers + n
        if mask is not None and tuple(mask.shape) != (b, length):
            raise ValueError(
                f"batch['attention_mask'] must have shape {(b, length)}, got {tuple(mask.shape)}"
            )
        key = self._key(rng, train, 0)

        def base(x: Inputs) -> Inputs:
            table = p["position"]["table"]
            spread = interpolated(table[1:], grid, antialias=c.antialias)
            # Prompts that stand in front of the image have no position in it.
            y, prompt = x.hidden, x.prompt
            first = y[:, prompt : prompt + 1] + table[:1]
            pieces = [y[:, :prompt], first, y[:, prompt + 1 :] + spread]
            if c.registers:
                pieces.insert(2, jnp.broadcast_to(p["registers"], (b, c.registers, c.width)))
            y = jnp.concatenate(pieces, axis=1)
            y = dropout(y, c.drop, key)
            if c.embed_norm:
                y = run(self.norm, p["norm"], y)
            return x._replace(hidden=y)

        inputs = Inputs(tokens, None, None, mask)
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
        mask = attention_mask(inputs.mask)

        def block(layer: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
            return run(self.block, layer, x, mask=mask, queries=queries, **kwargs)

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
    ) -> jax.Array | None:
        """Logits from normed hidden states, whose first rows are a prompt."""
        c, net = self.config, self.head_net
        hidden = hidden[:, inputs.prompt :]
        key = self._key(rng, train, 2)
        if c.projection:

            def base(x: jax.Array) -> jax.Array:
                return run(self.project, params["projection"], x)

        elif net is not None:

            def base(x: jax.Array) -> jax.Array:
                return run(net, params["head"], x, rng=key)

        else:
            return None
        read = hidden[:, 0]
        if c.reads == "class+mean":
            read = jnp.concatenate([read, hidden[:, 1 + c.registers :].mean(1)], axis=-1)
        return outer_hooks(sites, inputs.mask, rng, train)("logits", read, base)

    def _masked(self, p: Params, tokens: jax.Array, masked: jax.Array | None) -> jax.Array:
        if masked is None:
            return tokens
        if "mask" not in p:
            raise ValueError("bool_masked_pos needs a mask token; this model has mask_token=False")
        if tuple(masked.shape) != tuple(tokens.shape[:2]):
            raise ValueError(
                f"batch['bool_masked_pos'] must have shape {tuple(tokens.shape[:2])}, "
                f"got {tuple(masked.shape)}"
            )
        return jnp.where((masked != 0)[..., None], p["mask"], tokens)

    def _reads_first_token(self, sites: Mapping[str, Site] | None) -> bool:
        """Whether the logits read the class token and no site needs to see others in a layer."""
        c = self.config
        inside = (site for name, site in (sites or {}).items() if name not in OUTER_SITES)
        logits = c.projection or c.head is not None
        return bool(logits) and c.reads == "class" and all(s.tokenwise for s in inside)

    def _key(self, rng: jax.Array | None, train: bool, stream: int) -> jax.Array | None:
        c = self.config
        rates = (c.drop, c.attn_drop, c.drop_path, c.head.drop if c.head else 0.0)
        return stream_key(rng, train, stream, rates)


def pooled(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    """One vector [B, D] an image: the class token of final hidden states [B, T, D].

    It goes through the tanh layer where the model has one (``pooler``).
    """
    first = hidden[:, 0]
    if not model.config.pooler:
        return first
    return jnp.tanh(run(Dense(model.config.width), params["pooler"]["dense"], first))
