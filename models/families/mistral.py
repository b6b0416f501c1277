"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with attention through a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.decoder import DecoderConfig
from steppe.models.families import llama
from steppe.models.families.names import Family


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """See ``Family.read``."""
    defaults = {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    }
    window = config.get("sliding_window", 4096)
    return DecoderConfig(
        "mistral",
        **llama.read_common(config, defaults),
        window=None if window is None else int(window),
        rotary=llama.read_rotary(config),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    assert config.rotary is not None
    return {
        **llama.write_common(config),
        "sliding_window": config.window,
        "rope_parameters": llama.write_rotary(config.rotary),
    }


FAMILY = Family(
    name="mistral",
    prefix="model",
    base="MistralModel",
    body=llama.body,
    heads=llama.heads("Mistral"),
    read=read,
    write=write,
    ignored=llama.IGNORED,
)
