"""CLIP: an image tower and a text tower that meet in one space.

  z_i = W_i f(image)[class],  z_t = W_t g(text)[end],  logits = exp(s) <z_i, z_t> / (|z_i| |z_t|)

The image tower is a ``VisionConfig`` with a projection, the text tower a ``ClipTextConfig``.
Each is a model by itself; their parameters lie under ``vision/`` and ``text/`` of the pair's,
beside ``logit_scale``.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML
2021, arXiv 2103.00020.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.models import clip_text, vision
from steppe.models.clip_text import ClipTextConfig, TextTower, no_head
from steppe.models.heads import HeadConfig
from steppe.models.model import Batch, Masks, Model, ModelOut, Rules
from steppe.models.sites import LAYER_SITES, OUTER_SITES, Site, within
from steppe.models.tree import Params
from steppe.models.vision import VisionConfig, VisionTower

# Pixel statistics of CLIP's training images.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOWERS = ("vision", "text")
RULES: Rules = tuple(
    (rf"{tower}/(?:{pattern})", axes)
    for tower, rules in (("vision", vision.RULES), ("text", clip_text.RULES))
    for pattern, axes in rules
)


class Embedded(NamedTuple):
    """Both sides of a CLIP batch, of length 1 each.

    Attributes:
      image: [B, E].
      text: [C, E].
    """

    image: jax.Array
    text: jax.Array


@dataclass(frozen=True)
class ClipConfig:
    """A pair of towers.

    Attributes:
      vision, text: the towers, projecting to the same width.
      family: name of the family whose files it reads and writes.
      logit_scale: initial s; CLIP starts from log(1 / 0.07).
      head: always None.
    """

    vision: VisionConfig
    text: ClipTextConfig
    family: str = "clip"
    logit_scale: float = math.log(1 / 0.07)
    head: HeadConfig | None = None

    def __post_init__(self) -> None:
        no_head(self.head)
        if not self.vision.projection or self.vision.projection != self.text.projection:
            raise ValueError(
                "both towers must project to the same width, got "
                f"vision.projection={self.vision.projection} and "
                f"text.projection={self.text.projection}"
            )

    @property
    def vocab_size(self) -> int:
        """Of the text tower."""
        return self.text.vocab_size

    @property
    def max_length(self) -> int:
        """Longest text, in tokens."""
        return self.text.max_length

    def with_head(self, head: HeadConfig | None) -> ClipConfig:
        """The same pair; only ``head=None`` is possible."""
        return dataclasses.replace(self, head=head)

    def build(self) -> Model:
        """The model of this configuration.

        Its batch holds ``pixel_values`` [B, H, W, C] and ``input_ids`` [C, T] (with
        ``attention_mask`` [C, T] where wanted); the number of texts may differ from that of
        images. ``logits`` [B, C] score every text for every image. ``hidden`` are the image
        tower's, ``state`` is an :class:`Embedded`. Sites and rules are those of the towers
        behind ``vision.`` and ``text.``.
        """
        pair = _Pair(self)
        sites = tuple(f"{tower}.{s}" for tower in TOWERS for s in OUTER_SITES + LAYER_SITES)
        return Model(config=self, init=pair.init, apply=pair.apply, axes=RULES, sites=sites)


class _Pair:
    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text)

    def init(self, key: jax.Array) -> Params:
        keys = jax.random.split(key)
        return {
            "vision": self.vision.init(keys[0]),
            "text": self.text.init(keys[1]),
            "logit_scale": jnp.float32(self.config.logit_scale),
        }

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
        """The forward pass; see ``ClipConfig.build`` for the batch.

        Raises:
          ValueError: what the towers raise; masks or embeds, which belong to one tower.
        """
        if masks is not None or embeds is not None:
            raise ValueError(
                "masks and embeds belong to one tower; run it by itself, see clip.tower"
            )
        known = tuple(f"{name}.{site}" for name in TOWERS for site in OUTER_SITES + LAYER_SITES)
        for name in sites or {}:
            if name not in known:
                raise ValueError(
                    f"this model has no site {name!r}; its sites are {', '.join(known)}"
                )
        keys: tuple[Any, ...] = (None, None) if rng is None else tuple(jax.random.split(rng))
        image = self.vision.apply(
            params["vision"],
            {n: v for n, v in batch.items() if n != "attention_mask"},
            sites=within(sites, "vision"),
            rng=keys[0],
            train=train,
            all_hidden=all_hidden,
        )
        text = self.text.apply(
            params["text"], batch, sites=within(sites, "text"), rng=keys[1], train=train
        )
        both = Embedded(_unit(image.logits), _unit(text.logits))
        scale = jnp.exp(params["logit_scale"].astype(jnp.float32)).astype(both.image.dtype)
        return ModelOut(scale * (both.image @ both.text.T), image.hidden, both)


def tower(model: Model, params: Params, name: str) -> tuple[Model, Params]:
    """One tower of a pair as a model by itself, with its parameters (shared, not copied).

    Args:
      name: "vision" or "text".

    Raises:
      ValueError: another name.
    """
    if name not in TOWERS:
        raise ValueError(f"name must be one of {', '.join(TOWERS)}, got {name!r}")
    config: VisionConfig | ClipTextConfig = getattr(model.config, name)
    return config.build(), params[name]


def _unit(x: jax.Array | None) -> jax.Array:
    """Rows of length 1, computed in float32."""
    assert x is not None
    y = x.astype(jnp.float32)
    return (y / jnp.sqrt(jnp.square(y).sum(-1, keepdims=True))).astype(x.dtype)
