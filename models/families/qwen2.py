"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.decoder import DecoderConfig
from steppe.models.families import llama
from steppe.models.families.names import Family


def windowed(config: Mapping[str, Any], layers: int, windowed: bool) -> tuple[bool, ...]:
    """By layer, whether it looks through the window; ``windowed`` where the file is silent.

    Raises:
      ValueError: an unknown kind of layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return (windowed,) * layers
    known = {"full_attention": False, "sliding_attention": True}
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"config.json: layer_types has {kind!r}; only {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def layer_types(config: DecoderConfig) -> list[str]:
    """The reverse of :func:`windowed`."""
    return ["sliding_attention" if local else "full_attention" for local in config.local]


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """See ``Family.read``."""
    defaults = {
        "num_key_value_heads": config.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    }
    out = llama.read_common(config, defaults)
    window, local = None, None
    if config.get("use_sliding_window") and config.get("sliding_window"):
        first = config.get("max_window_layers", 28)
        local = windowed(config, out["layers"], True)
        if config.get("layer_types") is None:
            local = tuple(layer >= first for layer in range(out["layers"]))
        window = int(config["sliding_window"]) if any(local) else None
        local = local if window else None
    return DecoderConfig(
        "qwen2",
        **out,
        qkv_bias=True,
        window=window,
        windowed=local,
        rotary=llama.read_rotary(config),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    assert config.rotary is not None
    local = config.local
    return {
        **llama.write_common(config),
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": local.index(True) if any(local) else config.layers,
        "layer_types": layer_types(config),
        "rope_parameters": llama.write_rotary(config.rotary),
    }


FAMILY = Family(
    name="qwen2",
    prefix="model",
    base="Qwen2Model",
    body=llama.body,
    heads=llama.heads("Qwen2"),
    read=read,
    write=write,
    ignored=llama.IGNORED,
)
