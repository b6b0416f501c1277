"""T5 v1.0 and v1.1, with Flan-T5 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, 2002.05202).

The output is tied to the word table unless the file holds a matrix of its own, as those of
v1.1 do; whether hidden states are scaled before it is the config's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from steppe.models.families.encoder_decoder import THEIR_ACTS, act, number, values
from steppe.models.families.names import Family, HeadNames, Name, table
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.sites import DECODER, ENCODER

# ours -> (theirs, default)
KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "width": ("d_model", None),
    "heads": ("num_heads", None),
    "head_dim": ("d_kv", None),
    "ffn_width": ("d_ff", None),
    "encoder_layers": ("num_layers", None),
    "buckets": ("relative_attention_num_buckets", 32),
    "distance": ("relative_attention_max_distance", 128),
    "positions": ("n_positions", 512),
    "epsilon": ("layer_norm_epsilon", 1e-6),
    "drop": ("dropout_rate", 0.1),
    "pad_id": ("pad_token_id", 0),
    "eos_id": ("eos_token_id", 1),
}
UNTIED = "lm_head.weight"


def kernel(path: str, tensor: str) -> Name:
    """A linear map without bias."""
    return Name(f"{path}/kernel", f"{tensor}.weight", transposed=True)


def scale(path: str, tensor: str) -> Name:
    """An RMS norm."""
    return Name(f"{path}/scale", f"{tensor}.weight")


def body(config: Seq2SeqConfig) -> list[Name]:
    """See ``Family.body``."""
    names = table("embed/word", "shared")
    for part in (ENCODER, DECODER):
        block, ours = f"{part}.block.{{}}.layer", f"{part}/layers"
        names += [kernel(f"{ours}/attn/{n}", f"{block}.0.SelfAttention.{n}") for n in "qkvo"]
        names.append(scale(f"{ours}/attn_norm", f"{block}.0.layer_norm"))
        last = 1
        if part == DECODER:
            names += [kernel(f"{ours}/cross/{n}", f"{block}.1.EncDecAttention.{n}") for n in "qkvo"]
            names.append(scale(f"{ours}/cross_norm", f"{block}.1.layer_norm"))
            last = 2
        ffn = f"{block}.{last}.DenseReluDense"
        if config.gated:
            names.append(kernel(f"{ours}/ffn/gate", f"{ffn}.wi_0"))
        names.append(kernel(f"{ours}/ffn/in", f"{ffn}.wi_1" if config.gated else f"{ffn}.wi"))
        names.append(kernel(f"{ours}/ffn/out", f"{ffn}.wo"))
        names.append(scale(f"{ours}/ffn_norm", f"{block}.{last}.layer_norm"))
        first = f"{part}.block.0.layer.0.SelfAttention"
        names += table(f"{part}/relative", f"{first}.relative_attention_bias")
        names.append(scale(f"{part}/norm", f"{part}.final_layer_norm"))
    return names


def read(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    """See ``Family.read``."""
    ours = values(raw, KEYS)
    kind = str(raw.get("feed_forward_proj", "relu"))
    gated = kind.startswith("gated-")
    # The published v1.1 say "gated-gelu" and mean the tanh form of GELU.
    name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    scaled = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False)
    depth = raw.get("num_decoder_layers")
    return Seq2SeqConfig(
        "t5",
        **ours,
        decoder_layers=ours["encoder_layers"] if depth is None else number(raw, *_DEPTH),
        start_id=number(raw, "decoder_start_token_id", ours["pad_id"]),
        gated=gated,
        act=act(name),
        scale=1.0,
        head_scale=ours["width"] ** -0.5 if scaled else 1.0,
        attn_drop=ours["drop"],
        ffn_drop=ours["drop"],
    )


_DEPTH = ("num_decoder_layers", None)


def write(config: Seq2SeqConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    name = THEIR_ACTS.get(config.act, config.act)
    kind = name
    if config.gated:
        kind = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    return {
        **{theirs: getattr(config, ours) for ours, (theirs, _) in KEYS.items()},
        "num_decoder_layers": config.decoder_layers,
        "decoder_start_token_id": config.start_id,
        "feed_forward_proj": kind,
        "is_encoder_decoder": True,
        # Older readers take one key for both.
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.head_scale != 1.0,
    }


def adjust(config: Seq2SeqConfig, tensors: Collection[str]) -> Seq2SeqConfig:
    """See ``Family.adjust``: an output matrix in the file is one of its own."""
    return dataclasses.replace(config, tied=UNTIED not in tensors)


FAMILY = Family(
    name="t5",
    prefix="",
    base="T5Model",
    body=body,
    heads={
        "lm": HeadNames(
            "T5ForConditionalGeneration",
            lambda config: [] if config.tied else [kernel("head/out", "lm_head")],
        )
    },
    read=read,
    write=write,
    adjust=adjust,
    # Copies of the word table, and a bias that the published code never read.
    ignored=("embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight"),
)
