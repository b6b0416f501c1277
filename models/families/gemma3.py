"""Gemma 3, text only (Gemma Team 2025, arXiv 2503.19786).

Five layers look through a window for each that sees everything, with a rotary base of their own;
norms before and after every sublayer and on queries and keys; word embeddings times sqrt(D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steppe.models.decoder import DecoderConfig
from steppe.models.families import llama
from steppe.models.families.names import Family
from steppe.models.families.qwen2 import layer_types, windowed

KEYS = {**llama.KEYS, "act": "hidden_activation"}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """See ``Family.read``."""
    defaults = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    }
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"config.json: {key}={config[key]!r} is not supported")
    out = llama.read_common(config, defaults, KEYS)
    period = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
    local = tuple((layer + 1) % period != 0 for layer in range(out["layers"]))
    if config.get("layer_types") is not None:
        local = windowed(config, out["layers"], True)
    by_kind = config.get("rope_parameters") or {}
    if "full_attention" in by_kind:
        wide = llama.read_rotary(config, by_kind["full_attention"], base=1e6)
        near = llama.read_rotary({}, by_kind["sliding_attention"])
    else:
        wide = llama.read_rotary(config, base=1e6)
        near = llama.read_rotary({"rope_theta": config.get("rope_local_base_freq", 1e4)})
    bias = bool(config.get("attention_bias"))
    return DecoderConfig(
        "gemma3_text",
        **out,
        norm="rms1",
        qkv_bias=bias,
        out_bias=bias,
        rotary=wide,
        window=int(llama.number(config, "sliding_window", 4096)),
        windowed=local,
        local_rotary=near,
        qk_norm=True,
        post_norms=True,
        embed_scale=math.sqrt(out["width"]),
        query_scale=float(llama.number(config, "query_pre_attn_scalar", 256)) ** -0.5,
        softcap=config.get("final_logit_softcapping"),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    assert config.rotary is not None
    near = config.rotary if config.local_rotary is None else config.local_rotary
    divisor = config.scale**-2
    return {
        **llama.write_common(config, KEYS),
        "attention_bias": config.qkv_bias,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": round(divisor) if abs(divisor % 1) < 1e-6 else divisor,
        "final_logit_softcapping": config.softcap,
        "rope_parameters": {
            "full_attention": llama.write_rotary(config.rotary),
            "sliding_attention": llama.write_rotary(near),
        },
    }


FAMILY = Family(
    name="gemma3_text",
    prefix="model",
    base="Gemma3TextModel",
    body=llama.body,
    heads={
        **llama.heads("Gemma3Text"),
        "lm": llama.heads("Gemma3")["lm"],
    },
    read=read,
    write=write,
    ignored=llama.IGNORED,
)
