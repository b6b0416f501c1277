"""CLIP (Radford et al. 2021, arXiv 2103.00020): the pair, and each tower in files of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from steppe.models.clip import MEAN, STD, ClipConfig
from steppe.models.clip_text import ClipTextConfig
from steppe.models.families.names import Family, Name, dense, norm, table
from steppe.models.families.vit import (
    patches,
    pixels,
    values,
    write_pixels,
    write_values,
)
from steppe.models.vision import VisionConfig

SHARED = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "act": "hidden_act",
    "epsilon": "layer_norm_eps",
    "attn_drop": "attention_dropout",
}
IMAGE = {**SHARED, "image_size": "image_size", "patch": "patch_size", "channels": "num_channels"}
TEXT = {
    **SHARED,
    "vocab_size": "vocab_size",
    "positions": "max_position_embeddings",
    "end_id": "eos_token_id",
}
# Files name only what differs from the first published model.
_DEFAULTS = {
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
IMAGE_DEFAULTS = {
    **_DEFAULTS,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
TEXT_DEFAULTS = {
    **_DEFAULTS,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
SCALE = 2.6592


def layers(tower: str) -> list[Name]:
    """The layers of a tower."""
    layer = f"{tower}encoder.layers.{{}}"
    return [
        *norm("layers/attn_norm", f"{layer}.layer_norm1"),
        *dense("layers/attn/q", f"{layer}.self_attn.q_proj"),
        *dense("layers/attn/k", f"{layer}.self_attn.k_proj"),
        *dense("layers/attn/v", f"{layer}.self_attn.v_proj"),
        *dense("layers/attn/o", f"{layer}.self_attn.out_proj"),
        *norm("layers/ffn_norm", f"{layer}.layer_norm2"),
        *dense("layers/ffn/in", f"{layer}.mlp.fc1"),
        *dense("layers/ffn/out", f"{layer}.mlp.fc2"),
    ]


def image_body(config: VisionConfig, tower: str = "") -> list[Name]:
    """Leaves of the image tower, whose tensors are called ``{tower}...``."""
    embed = f"{tower}embeddings"
    return [
        Name("embed/patch/kernel", f"{embed}.patch_embedding.weight", codec=patches(config)),
        Name("embed/class", f"{embed}.class_embedding"),
        *table("embed/position", f"{embed}.position_embedding"),
        *norm("embed/norm", f"{tower}pre_layrnorm"),
        *layers(tower),
        *norm("norm", f"{tower}post_layernorm"),
        *_projection(config, "visual_projection"),
    ]


def text_body(config: ClipTextConfig, tower: str = "") -> list[Name]:
    """Leaves of the text tower, whose tensors are called ``{tower}...``."""
    return [
        *table("embed/word", f"{tower}embeddings.token_embedding"),
        *table("embed/position", f"{tower}embeddings.position_embedding"),
        *layers(tower),
        *norm("norm", f"{tower}final_layer_norm"),
        *_projection(config, "text_projection"),
    ]


def _projection(config: VisionConfig | ClipTextConfig, tensor: str) -> list[Name]:
    return dense("projection", tensor)[:1] if config.projection else []


def body(config: ClipConfig) -> list[Name]:
    """Leaves of the pair."""

    def under(tower: str, names: list[Name]) -> list[Name]:
        return [dataclasses.replace(name, path=f"{tower}/{name.path}") for name in names]

    return [
        *under("vision", image_body(config.vision, "vision_model.")),
        *under("text", text_body(config.text, "text_model.")),
        Name("logit_scale", "logit_scale"),
    ]


def _projected(config: Mapping[str, Any]) -> int:
    """Width of the projection that a file of one tower holds, by its class."""
    architecture = (config.get("architectures") or [""])[0]
    return int(config.get("projection_dim", 512)) if "WithProjection" in architecture else 0


def read_image(config: Mapping[str, Any], projection: int | None = None) -> VisionConfig:
    """See ``Family.read``."""
    out = values(config, IMAGE, IMAGE_DEFAULTS)
    return VisionConfig(
        "clip_vision_model",
        **out,
        **pixels(config, out["channels"], MEAN, STD),
        patch_bias=False,
        embed_norm=True,
        projection=_projected(config) if projection is None else projection,
    )


def read_text(config: Mapping[str, Any], projection: int | None = None) -> ClipTextConfig:
    """See ``Family.read``."""
    out = values(config, TEXT, TEXT_DEFAULTS)
    width = _projected(config) if projection is None else projection
    return ClipTextConfig(**out, projection=width)


def read(config: Mapping[str, Any]) -> ClipConfig:
    """See ``Family.read``."""
    parts = []
    for name in ("vision_config", "text_config"):
        part = config.get(name) or {}
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {name} must be an object, got {part!r}")
        parts.append(part)
    image, text = parts
    for name in ("image_mean", "image_std"):
        if name in config:
            image = {**image, name: config[name]}
    width = int(config.get("projection_dim", 512))
    return ClipConfig(
        read_image(image, width),
        read_text(text, width),
        logit_scale=float(config.get("logit_scale_init_value", SCALE)),
    )


def write_image(config: VisionConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    return {**write_values(config, IMAGE), **write_pixels(config), **_write_projection(config)}


def write_text(config: ClipTextConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    return {**write_values(config, TEXT), **_write_projection(config)}


def _write_projection(config: VisionConfig | ClipTextConfig) -> dict[str, Any]:
    if not config.projection:
        return {}
    base = IMAGE_TOWER.base if isinstance(config, VisionConfig) else TEXT_TOWER.base
    return {"architectures": [f"{base}WithProjection"], "projection_dim": config.projection}


def write(config: ClipConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    image, text = write_image(config.vision), write_text(config.text)
    for part in (image, text):
        del part["architectures"]
    return {
        "vision_config": {**image, "model_type": IMAGE_TOWER.name},
        "text_config": {**text, "model_type": TEXT_TOWER.name},
        "projection_dim": config.vision.projection,
        "logit_scale_init_value": config.logit_scale,
    }


FAMILY = Family(
    name="clip",
    prefix="",
    base="CLIPModel",
    body=body,
    heads={},
    read=read,
    write=write,
    ignored=("position_ids",),
)
IMAGE_TOWER = Family(
    name="clip_vision_model",
    prefix="vision_model",
    base="CLIPVisionModel",
    body=image_body,
    heads={},
    read=read_image,
    write=write_image,
    ignored=("position_ids",),
)
TEXT_TOWER = Family(
    name="clip_text_model",
    prefix="text_model",
    base="CLIPTextModel",
    body=text_body,
    heads={},
    read=read_text,
    write=write_text,
    ignored=("position_ids",),
)
