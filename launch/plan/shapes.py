"""Models by name: the sizes of published configurations, so that planning needs no files.

The values are those of each model's published config.json; the families of
``steppe.models.families`` read them as they read such a file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steppe.models.families import family as family_of


def _llama(width: int, layers: int, heads: int, kv: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        **more,
    }


def _bert(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
        **more,
    }


_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5}

SHAPES: dict[str, dict[str, Any]] = {
    "minilm-l3": _bert(384, 3, 12),
    "minilm-l6": _bert(384, 6, 12),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "smollm2": _llama(
        576, 30, 9, 3, 1536, vocab_size=49152, max_position_embeddings=8192,
        rope_theta=1e5, tie_word_embeddings=True,
    ),
    "llama-1b": _llama(
        2048, 16, 32, 8, 8192, **_LLAMA3 | {"tie_word_embeddings": True, "head_dim": 64}
    ),
    "llama-7b": _llama(4096, 32, 32, 32, 11008),
    "llama-8b": _llama(4096, 32, 32, 8, 14336, **_LLAMA3),
    "llama-13b": _llama(5120, 40, 40, 40, 13824),
    "llama-70b": _llama(8192, 80, 64, 8, 28672, **_LLAMA3),
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    },
    "vit-base": {
        "model_type": "vit", "image_size": 224, "patch_size": 16, "num_channels": 3,
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip


def config_of(name: str) -> Any:
    """The configuration of a model, without its head and without reading a weight.

    Args:
      name: of :data:`SHAPES`, with or without ``asset:``; a run, a folder, a file of weights or
        config.json; or an asset that is fetched.

    Raises:
      ValueError: no such shape (the nearest is named), an unknown family, a damaged file.
      OSError: no such file.
    """
    short = name.removeprefix("asset:")
    if short in SHAPES:
        return _read(SHAPES[short])
    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        try:
            raw = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        if not isinstance(raw, dict) or "model_type" not in raw:
            raise ValueError(f"{path} is no config.json of a model: it names no model_type")
        return _read(raw)
    if name.startswith("asset:") or path.exists():
        from steppe.launch import setup
        from steppe.models import pretrained

        if (path / "model" / "config.json").is_file():  # a run
            name = str(path / "model")
        return pretrained.load_config(setup.origin(name).weights)
    near = difflib.get_close_matches(short, SHAPES, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown model {name!r}{hint} (shapes: {', '.join(SHAPES)}; or a recipe, a folder, a "
        "config.json, asset:NAME)"
    )


def _read(raw: Mapping[str, Any]) -> Any:
    return family_of(str(raw["model_type"])).read(raw)
