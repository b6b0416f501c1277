"""Reads the tensors of a GGUF file as if they were a Hugging Face checkpoint.

The file (llama.cpp's format) is mapped, and every read dequantises only the rows asked for: a row
of a quantised tensor is a whole number of blocks. Three things that llama.cpp's converter does
are undone on the way: it interleaves the two halves of every query and key head of Llama models
(its rotary embedding turns neighbouring pairs, Hugging Face's turns halves), it stores Gemma's
norm scales with their 1 added, and it transposes GPT-2's matrices. Dequantised values carry the
rounding of their type. Needs ``gguf`` (``pip install gguf``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steppe.models import gguf_file
from steppe.models.gguf_file import File
from steppe.models.weights import Index


class GgufWeights:
    """Named tensors of a GGUF file, under the names and in the layout of Hugging Face.

    Plain float16 and bfloat16 tensors keep their type; quantised ones come as float32.
    """

    def __init__(self, file: File, names: Mapping[str, str], fix: _Fix) -> None:
        self._file, self._names, self._fix = file, dict(names), fix

    def shapes(self) -> dict[str, tuple[int, ...]]:
        out = {}
        for name, stored in self._names.items():
            shape = self._file.entries[stored].shape
            out[name] = shape[::-1] if self._fix.transposed(stored) else shape
        return out

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        stored = self._names[name]
        entry = self._file.entries[stored]
        index = tuple(index or ()) + (slice(None),) * (len(entry.shape) - len(index or ()))
        if self._fix.transposed(stored):
            return gguf_file.rows_of(self._file.path, entry, np.arange(entry.shape[0])[index[1]])[
                :, index[0]
            ].T
        heads = self._fix.heads(stored)
        rows = np.arange(entry.shape[0])
        if heads:  # row (head, half, i) of Hugging Face is row (head, i, half) here
            rows = rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        out = gguf_file.rows_of(self._file.path, entry, rows[index[0]])[(slice(None), *index[1:])]
        return out.astype(np.float32) - 1 if self._fix.shifted(stored) else out


class _Fix:
    """Where the layout of an architecture's file differs from Hugging Face's."""

    def __init__(self, architecture: str, heads: int, kv_heads: int) -> None:
        self._architecture, self._counts = architecture, {"q": heads, "k": kv_heads}

    def heads(self, stored: str) -> int:
        """Number of heads whose rows are interleaved; 0 = none are."""
        match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", stored)
        return self._counts[match.group(1)] if match and self._architecture == "llama" else 0

    def shifted(self, stored: str) -> bool:
        return self._architecture == "gemma3" and stored.endswith("norm.weight")

    def transposed(self, stored: str) -> bool:
        matrices = r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight"
        return self._architecture == "gpt2" and re.fullmatch(matrices, stored) is not None


def read(path: Path) -> tuple[GgufWeights, dict[str, Any]]:
    """The weights and the config.json settings of a language model.

    Raises:
      FileNotFoundError: no such file.
      ImportError: ``gguf`` is not installed.
      ValueError: not a GGUF file, truncated (the first tensor that is cut off is named), a tensor
        of a type that is not read, an unknown architecture, or metadata that are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("reading .gguf needs gguf: pip install gguf") from error
    file = gguf_file.open_file(path)
    architecture = file.meta.get("general.architecture")
    if architecture not in _CONFIGS:
        raise ValueError(
            f"{path} holds a model of architecture {architecture!r}; {sorted(_CONFIGS)} are read"
        )
    if file.meta.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {file.meta['split.count']} parts of a model; join them first "
            "(llama-gguf-split --merge)"
        )
    config = _CONFIGS[architecture](file)
    heads = file.number("attention.head_count")
    fix = _Fix(architecture, heads, file.number("attention.head_count_kv", heads))
    table = _TENSORS[architecture]
    names = {}
    for stored in file.entries:
        match = re.fullmatch(r"(?s)(?:blk\.(\d+)\.)?(.*?)(\.weight|\.bias)?", stored)
        assert match is not None
        layer, stem, end = match.groups()
        if stem in _DROPPED:
            continue
        there = table.get(stem if layer is None else f"blk.{stem}")
        names[stored if there is None else there.format(layer) + (end or "")] = stored
    return GgufWeights(file, names, fix), config


# --- Names -----------------------------------------------------------------------------------

_DROPPED = ("rope_freqs", "attn_rot_embd")  # tables that follow from the config

_DECODER = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "blk.attn_norm": "model.layers.{}.input_layernorm",
    "blk.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.ffn_down": "model.layers.{}.mlp.down_proj",
}
_GEMMA3 = {
    **_DECODER,
    "blk.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output": "lm_head",
    "output_norm": "transformer.ln_f",
    "blk.attn_norm": "transformer.h.{}.ln_1",
    "blk.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.ffn_norm": "transformer.h.{}.ln_2",
    "blk.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.ffn_down": "transformer.h.{}.mlp.c_proj",
}
_TENSORS = {"llama": _DECODER, "qwen2": _DECODER, "gemma3": _GEMMA3, "gpt2": _GPT2}


# --- Config ----------------------------------------------------------------------------------


def _common(file: File) -> dict[str, Any]:
    """What all architectures say in the same words."""
    if "token_embd.weight" not in file.entries:
        raise ValueError(f"{file.path} lacks the tensor 'token_embd.weight'; convert it again")
    out: dict[str, Any] = {
        "vocab_size": file.entries["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.entries,
        "dtype": "float32",
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = file.meta.get(f"tokenizer.ggml.{theirs}_token_id")
        out[f"{ours}_token_id"] = None if number is None else int(number)
    return out


def _rotary(file: File) -> dict[str, Any]:
    """The settings of decoders with rotary embeddings and RMS norms."""
    hidden, heads = file.number("embedding_length"), file.number("attention.head_count")
    return {
        **_common(file),
        "hidden_size": hidden,
        "num_hidden_layers": file.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number("attention.head_count_kv", heads),
        "head_dim": file.number("attention.key_length", hidden // heads),
        "intermediate_size": file.number("feed_forward_length"),
        "max_position_embeddings": file.number("context_length"),
        "rms_norm_eps": _single(file.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _single(file.option("rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(file),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
    }


def _llama(file: File) -> dict[str, Any]:
    out = _rotary(file)
    out |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
    }
    turned = file.number("rope.dimension_count", out["head_dim"])
    if turned != out["head_dim"]:
        raise ValueError(
            f"{file.path} turns {turned} of {out['head_dim']} dimensions of a head; "
            "partial rotary embeddings are not supported"
        )
    if any(".ffn_gate_exps." in name for name in file.entries):
        raise ValueError(f"{file.path} is a mixture of experts, which is not supported")
    window = file.option("attention.sliding_window")
    if window:  # llama.cpp calls Mistral "llama" too
        out |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        out["sliding_window"] = int(window)
    return out


def _qwen2(file: File) -> dict[str, Any]:
    return _rotary(file) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
    }


def _gemma3(file: File) -> dict[str, Any]:
    out = _rotary(file)
    layers, heads = out["num_hidden_layers"], out["num_attention_heads"]
    period = 6  # every sixth layer sees the whole text; not in the file
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    out |= {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.number("attention.sliding_window"),
        "sliding_window_pattern": period,
        "layer_types": [kinds[i % period] for i in range(layers)],
        "rope_local_base_freq": _single(file.option("rope.freq_base_swa", 10000.0)),
        # Scores are divided by the root of this: the head size, but in the 27B model.
        "query_pre_attn_scalar": out["hidden_size"] // heads if layers == 62 else out["head_dim"],
        "attention_bias": False,
    }
    del out["hidden_act"]
    return out


def _gpt2(file: File) -> dict[str, Any]:
    hidden = file.number("embedding_length")
    return _common(file) | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": hidden,
        "n_layer": file.number("block_count"),
        "n_head": file.number("attention.head_count"),
        "n_inner": file.number("feed_forward_length", 4 * hidden),
        "n_positions": file.number("context_length"),
        "layer_norm_epsilon": _single(file.get("attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
    }


_CONFIGS: dict[str, Callable[[File], dict[str, Any]]] = {
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
}


def _single(value: float) -> float:
    """A number stored in single precision, as it was written in decimals."""
    return float(f"{value:.7g}")


def _scaling(file: File) -> dict[str, Any] | None:
    """``rope_scaling`` of config.json."""
    if "rope_freqs.weight" in file.entries:
        return _llama3(file)
    kind = file.option("rope.scaling.type", "none")
    if kind == "none":
        return None
    out: dict[str, Any] = {"rope_type": kind, "factor": _single(file.get("rope.scaling.factor"))}
    if kind == "yarn":
        length = file.get("rope.scaling.original_context_length")
        out["original_max_position_embeddings"] = int(length)
    elif kind != "linear":
        raise ValueError(f"{file.path} scales rotary angles by {kind!r}, which is not supported")
    return out


def _llama3(file: File) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file keeps only the divisor of every frequency.

    The rule has four numbers; all published models share three of them and differ in the factor,
    so it is read off and the divisors are computed anew to see that they are those of the file.
    """
    entry = file.entries["rope_freqs.weight"]
    held = np.memmap(file.path, np.float32, "r", entry.offset, entry.shape)
    factor, low, high, length = _single(float(held.max())), 1.0, 4.0, 8192
    base = file.option("rope.freq_base", 10000.0)
    wave = 2 * np.pi * base ** (np.arange(len(held)) / len(held))
    smooth = np.clip((length / wave - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), held, rtol=1e-3):
        raise ValueError(
            f"{file.path}: its 'rope_freqs.weight' are not those of Llama 3.1's scaling, "
            "and no other rule is known"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
