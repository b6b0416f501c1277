"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), and with registers (Darcet et al. 2023)."""

from collections.abc import Mapping
from typing import Any

from steppe.models.families.names import Family, Name, dense, norm
from steppe.models.families.vit import (
    KEYS,
    LAYER,
    attention,
    classifiers,
    embeddings,
    pixels,
    values,
    write_pixels,
    write_values,
)
from steppe.models.vision import VisionConfig

PLAIN, REGISTERS = "dinov2", "dinov2_with_registers"
OURS = {
    **{ours: theirs for ours, theirs in KEYS.items() if ours != "ffn_width"},
    "layer_scale": "layerscale_value",
    "drop_path": "drop_path_rate",
    "gated": "use_swiglu_ffn",
}
DEFAULTS = {
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}


def ffn_width(width: int, ratio: int, gated: bool) -> int:
    """Width of the feed-forward layer; a gated one has two thirds, in multiples of 8."""
    plain = int(width * ratio)
    return (int(plain * 2 / 3) + 7) // 8 * 8 if gated else plain


def body(config: VisionConfig) -> list[Name]:
    """See ``Family.body``."""
    if config.gated:
        # One matrix holds the gate and what it multiplies, in this order.
        stored = dense("", f"{LAYER}.mlp.weights_in")
        ffn = [
            Name(f"layers/ffn/{ours}{n.path}", n.tensor, n.transposed, part=(part, 2))
            for part, ours in enumerate(("gate", "in"))
            for n in stored
        ]
        ffn += dense("layers/ffn/out", f"{LAYER}.mlp.weights_out")
    else:
        ffn = [
            *dense("layers/ffn/in", f"{LAYER}.mlp.fc1"),
            *dense("layers/ffn/out", f"{LAYER}.mlp.fc2"),
        ]
    return [
        *embeddings(config, mask=1),
        *norm("layers/attn_norm", f"{LAYER}.norm1"),
        *attention(config),
        Name("layers/attn_scale/scale", f"{LAYER}.layer_scale1.lambda1"),
        *norm("layers/ffn_norm", f"{LAYER}.norm2"),
        *ffn,
        Name("layers/ffn_scale/scale", f"{LAYER}.layer_scale2.lambda1"),
        *norm("norm", "layernorm"),
    ]


def _read(config: Mapping[str, Any], family: str, **more: Any) -> VisionConfig:
    out = values(config, OURS, DEFAULTS)
    ratio = config.get("mlp_ratio", 4)
    width = ffn_width(out["width"], ratio, out["gated"])
    act = "silu" if out["gated"] else out["act"]
    out = {**out, "act": act, "ffn_width": width, "reads": "class+mean"}
    return VisionConfig(family, **out, **pixels(config, out["channels"]), **more)


def read(config: Mapping[str, Any]) -> VisionConfig:
    """See ``Family.read``."""
    return _read(config, PLAIN, mask_token=bool(config.get("use_mask_token", True)))


def read_registers(config: Mapping[str, Any]) -> VisionConfig:
    """See ``Family.read``."""
    registers = config.get("num_register_tokens", 4)
    return _read(config, REGISTERS, mask_token=True, registers=registers, antialias=True)


def write(config: VisionConfig) -> dict[str, Any]:
    """See ``Family.write``.

    Raises:
      ValueError: a feed-forward width that is no whole multiple of the width, which is all
        that a config.json of this family can say.
    """
    ratios = range(1, 33)
    fits = [r for r in ratios if ffn_width(config.width, r, config.gated) == config.ffn_width]
    if not fits:
        raise ValueError(
            f"config.json of {config.family} cannot hold ffn_width={config.ffn_width} "
            f"at width={config.width}: only whole multiples of the width"
        )
    out = {**write_values(config, OURS), **write_pixels(config), "mlp_ratio": fits[0]}
    if config.gated:
        out["hidden_act"] = "gelu"  # of the other kind of feed-forward layer
    if config.family == REGISTERS:
        return {**out, "num_register_tokens": config.registers}
    return {**out, "use_mask_token": config.mask_token}


FAMILY = Family(
    name=PLAIN,
    prefix="dinov2",
    base="Dinov2Model",
    body=body,
    heads=classifiers("Dinov2ForImageClassification"),
    read=read,
    write=write,
    ignored=("mask_token",),
)
WITH_REGISTERS = Family(
    name=REGISTERS,
    prefix="dinov2_with_registers",
    base="Dinov2WithRegistersModel",
    body=body,
    heads=classifiers("Dinov2WithRegistersForImageClassification"),
    read=read_registers,
    write=write,
)
