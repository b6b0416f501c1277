"""Llama (Touvron et al. 2023, arXiv 2307.09288), and what families like it share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.decoder import DecoderConfig
from steppe.models.families.names import Family, HeadNames, Name, table
from steppe.models.rotary import Rotary

# our field -> key of config.json
KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_width": "intermediate_size",
    "positions": "max_position_embeddings",
    "epsilon": "rms_norm_eps",
    "act": "hidden_act",
    "attn_drop": "attention_dropout",
    "tied": "tie_word_embeddings",
}
LAYER = "layers.{}"
IGNORED = ("rotary_emb.inv_freq",)


def dense(path: str, tensor: str, bias: bool) -> list[Name]:
    """A linear map, with bias or without."""
    names = [Name(f"{path}/kernel", f"{tensor}.weight", transposed=True)]
    return [*names, Name(f"{path}/bias", f"{tensor}.bias")] if bias else names


def scale(path: str, tensor: str) -> list[Name]:
    """An RMS norm."""
    return [Name(f"{path}/scale", f"{tensor}.weight")]


def body(config: DecoderConfig) -> list[Name]:
    """See ``Family.body``."""
    c = config
    names = [
        *table("embed/word", "embed_tokens"),
        *scale("layers/attn_norm", f"{LAYER}.input_layernorm"),
        *dense("layers/attn/q", f"{LAYER}.self_attn.q_proj", c.qkv_bias),
        *dense("layers/attn/k", f"{LAYER}.self_attn.k_proj", c.qkv_bias),
        *dense("layers/attn/v", f"{LAYER}.self_attn.v_proj", c.qkv_bias),
        *dense("layers/attn/o", f"{LAYER}.self_attn.o_proj", c.out_bias),
        *dense("layers/ffn/gate", f"{LAYER}.mlp.gate_proj", c.ffn_bias),
        *dense("layers/ffn/in", f"{LAYER}.mlp.up_proj", c.ffn_bias),
        *dense("layers/ffn/out", f"{LAYER}.mlp.down_proj", c.ffn_bias),
        *scale("norm", "norm"),
    ]
    if c.qk_norm:
        names += scale("layers/attn/q_norm", f"{LAYER}.self_attn.q_norm")
        names += scale("layers/attn/k_norm", f"{LAYER}.self_attn.k_norm")
    if c.post_norms:
        names += scale("layers/attn_post_norm", f"{LAYER}.post_attention_layernorm")
        names += scale("layers/ffn_norm", f"{LAYER}.pre_feedforward_layernorm")
        names += scale("layers/ffn_post_norm", f"{LAYER}.post_feedforward_layernorm")
    else:
        names += scale("layers/ffn_norm", f"{LAYER}.post_attention_layernorm")
    return names


def heads(prefix: str) -> dict[str, HeadNames]:
    """The heads of a family whose classes are named ``{prefix}For...``."""
    score = HeadNames(f"{prefix}ForSequenceClassification", dense("head/out", "score", False))
    return {
        "lm": HeadNames(f"{prefix}ForCausalLM", lm),
        "classification": score,
        "regression": score,
    }


def lm(config: DecoderConfig) -> list[Name]:
    """Tensors of the language-model head; none where it is the word table."""
    return [] if config.tied else dense("head/out", "lm_head", False)


def number(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A number of config.json.

    Raises:
      ValueError: it is missing without a default, or no number.
    """
    value = config.get(key, default)
    if value is None:
        raise ValueError(f"config.json lacks {key!r}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be a number, got {value!r}")
    return value


def read_common(
    config: Mapping[str, Any], defaults: Mapping[str, Any], keys: Mapping[str, str] = KEYS
) -> dict[str, Any]:
    """Values of ``DecoderConfig`` that Llama and its relatives spell alike.

    Args:
      defaults: by key of config.json, for those that a file may leave out.

    Raises:
      ValueError: a key is missing, or its value has the wrong type.
    """
    out: dict[str, Any] = {}
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        defaults = {"head_dim": width // heads, **defaults}
    for ours, theirs in keys.items():
        given = config.get(theirs)
        value = defaults.get(theirs) if given is None else given
        if ours in ("act", "tied"):
            wanted = str if ours == "act" else bool
            if not isinstance(value, wanted):
                raise ValueError(f"config.json: {theirs} must be {wanted.__name__}, got {value!r}")
            out[ours] = value
        else:
            out[ours] = number({theirs: value}, theirs)
    out["act"] = {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "swish": "silu",
    }.get(out["act"], out["act"])
    return out


def write_common(config: DecoderConfig, keys: Mapping[str, str] = KEYS) -> dict[str, Any]:
    """The reverse of :func:`read_common`."""
    out = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    out[keys["kv_heads"]], out[keys["head_dim"]] = config.groups, config.dim
    out[keys["act"]] = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.act, config.act)
    return out


def read_rotary(config: Mapping[str, Any], settings: Any = None, **defaults: Any) -> Rotary:
    """A rotary embedding, as ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

    Args:
      settings: the entry of one kind of layer, where they differ; default: the only one.

    Raises:
      ValueError: a scaling that we do not implement, or a setting of it that is missing.
    """
    if settings is None:
        settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    base = settings.get("rope_theta") or config.get("rope_theta") or defaults.get("base", 1e4)
    fraction = settings.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    out: dict[str, Any] = {"base": float(base), "fraction": float(fraction)}
    if kind == "default":
        return Rotary(**out)
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"config.json: rope_type {kind!r} is not supported; only default, linear, llama3, yarn"
        )
    out |= {"scaling": kind, "factor": float(number(settings, "factor"))}
    original = settings.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn"):
        length = original or config.get("max_position_embeddings")
        out["original"] = int(number({"original_max_position_embeddings": length},
                                     "original_max_position_embeddings"))  # fmt: skip
    if kind == "llama3":
        out["low"] = float(number(settings, "low_freq_factor"))
        out["high"] = float(number(settings, "high_freq_factor"))
    if kind == "yarn":
        if settings.get("mscale") or settings.get("mscale_all_dim"):
            raise ValueError("config.json: yarn with mscale is not supported")
        if settings.get("truncate", True) is not True:
            raise ValueError("config.json: yarn with truncate=false is not supported")
        out["fast"] = float(settings.get("beta_fast") or 32.0)
        out["slow"] = float(settings.get("beta_slow") or 1.0)
        if settings.get("attention_factor") is not None:
            out["sharpen"] = float(settings["attention_factor"])
    return Rotary(**out)


def write_rotary(rotary: Rotary) -> dict[str, Any]:
    """The reverse of :func:`read_rotary`: the entry ``rope_parameters``.

    Raises:
      ValueError: settings that such files cannot hold (xPos, interleaved pairs).
    """
    if rotary.xpos or rotary.layout != "half":
        raise ValueError("files of this family hold neither xPos nor interleaved pairs")
    kind = "default" if rotary.scaling == "none" else rotary.scaling
    out: dict[str, Any] = {"rope_type": kind, "rope_theta": rotary.base}
    if rotary.fraction != 1.0:
        out["partial_rotary_factor"] = rotary.fraction
    if kind != "default":
        out["factor"] = rotary.factor
    if kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rotary.original
    if kind == "llama3":
        out |= {"low_freq_factor": rotary.low, "high_freq_factor": rotary.high}
    if kind == "yarn":
        out |= {"beta_fast": rotary.fast, "beta_slow": rotary.slow}
        if rotary.sharpen is not None:
            out["attention_factor"] = rotary.sharpen
    return out


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """See ``Family.read``."""
    defaults = {
        "num_key_value_heads": config.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }
    bias = bool(config.get("attention_bias"))
    return DecoderConfig(
        "llama",
        **read_common(config, defaults),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=bool(config.get("mlp_bias")),
        rotary=read_rotary(config),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    assert config.rotary is not None
    return {
        **write_common(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.ffn_bias,
        "rope_parameters": write_rotary(config.rotary),
    }


FAMILY = Family(
    name="llama",
    prefix="model",
    base="LlamaModel",
    body=body,
    heads=heads("Llama"),
    read=read,
    write=write,
    ignored=IGNORED,
)
