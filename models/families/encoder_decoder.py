"""What the files of BART, Marian and T5 have in common: keys of config.json, names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.families.names import Codec, Name, dense, norm
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.sites import DECODER, ENCODER

OUR_ACTS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
THEIR_ACTS = {"gelu_tanh": "gelu_new"}

# ours -> (theirs, default); None = must be there
KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "width": ("d_model", None),
    "heads": ("encoder_attention_heads", None),
    "ffn_width": ("encoder_ffn_dim", None),
    "encoder_layers": ("encoder_layers", None),
    "decoder_layers": ("decoder_layers", None),
    "decoder_heads": ("decoder_attention_heads", None),
    "decoder_ffn_width": ("decoder_ffn_dim", None),
    "positions": ("max_position_embeddings", None),
    "drop": ("dropout", 0.1),
    "attn_drop": ("attention_dropout", 0.0),
    "ffn_drop": ("activation_dropout", 0.0),
    "pad_id": ("pad_token_id", None),
    "eos_id": ("eos_token_id", None),
    "start_id": ("decoder_start_token_id", None),
}
BIAS = "final_logits_bias"


def number(raw: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The number at ``key`` of a config.json.

    Raises:
      ValueError: it is missing without a default, or is no number.
    """
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, list) and value:  # several end tokens: the first is the usual one
        value = value[0]
    if value is None:
        raise ValueError(f"config.json lacks {key!r}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be a number, got {value!r}")
    return value


def values(raw: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Fields of our config from a config.json; ``keys`` maps ours to (theirs, default)."""
    return {ours: number(raw, *theirs) for ours, theirs in keys.items()}


def act(name: Any) -> str:
    """Our name of an activation; an unknown one is refused by the config itself.

    Raises:
      ValueError: a name that is no text.
    """
    if not isinstance(name, str):
        raise ValueError(f"config.json: activation_function must be text, got {name!r}")
    return OUR_ACTS.get(name, name)


def read(raw: Mapping[str, Any], family: str, **more: Any) -> Seq2SeqConfig:
    """The config of a post-norm model with the keys of BART and Marian.

    Raises:
      ValueError: a key is missing, or a setting that we do not implement is on.
    """
    if raw.get("tie_word_embeddings") is False:
        raise ValueError("tie_word_embeddings=False is not supported: one word table serves all")
    ours = values(raw, KEYS)
    return Seq2SeqConfig(
        family,
        **ours,
        embed_scale=float(ours["width"]) ** 0.5 if raw.get("scale_embedding") else 1.0,
        pre_norm=False,
        rms=False,
        use_bias=True,
        act=act(raw.get("activation_function", "gelu")),
        **more,
    )


def write(config: Seq2SeqConfig) -> dict[str, Any]:
    """The reverse of :func:`read`."""
    filled = {
        "decoder_heads": config.decoder_heads or config.heads,
        "decoder_ffn_width": config.decoder_ffn_width or config.ffn_width,
    }
    return {
        **{theirs: filled.get(ours, getattr(config, ours)) for ours, (theirs, _) in KEYS.items()},
        "activation_function": THEIR_ACTS.get(config.act, config.act),
        "scale_embedding": config.embed_scale != 1.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def stack(part: str, own: list[Name] | None = None) -> list[Name]:
    """The layers of one stack; ``own`` = other names in place of self-attention."""
    theirs, ours = f"{part}.layers.{{}}", f"{part}/layers"

    def attention(path: str, tensor: str) -> list[Name]:
        pieces = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        names = [
            n
            for a, b in pieces.items()
            for n in dense(f"{ours}/{path}/{a}", f"{theirs}.{tensor}.{b}")
        ]
        return names + norm(f"{ours}/{path}_norm", f"{theirs}.{tensor}_layer_norm")

    names = attention("attn", "self_attn") if own is None else list(own)
    if part == DECODER:
        names += attention("cross", "encoder_attn")
    return [
        *names,
        *dense(f"{ours}/ffn/in", f"{theirs}.fc1"),
        *dense(f"{ours}/ffn/out", f"{theirs}.fc2"),
        *norm(f"{ours}/ffn_norm", f"{theirs}.final_layer_norm"),
    ]


def stacks() -> list[Name]:
    """The layers of both stacks."""
    return stack(ENCODER) + stack(DECODER)


def bias(config: Seq2SeqConfig) -> list[Name]:
    """The bias of the logits, which files keep as [1, V]."""
    row = Codec(lambda a: a[0], lambda a: a[None], lambda shape: (1, *shape))
    return [] if config.head_bias == "none" else [Name("head/bias", BIAS, codec=row)]
