"""BART (Lewis et al. 2020, arXiv 1910.13461)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from steppe.models.families import encoder_decoder
from steppe.models.families.names import Family, HeadNames, Name, norm, table
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.sites import DECODER, ENCODER

# The published table starts with two rows that no position uses.
OFFSET = 2
BODY: list[Name] = [
    *table("embed/word", "shared"),
    *(
        name
        for part in (ENCODER, DECODER)
        for name in (
            *table(f"{part}/embed/position", f"{part}.embed_positions"),
            *norm(f"{part}/embed/norm", f"{part}.layernorm_embedding"),
        )
    ),
    *encoder_decoder.stacks(),
]


def read(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    """See ``Family.read``."""
    defaults = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return encoder_decoder.read(
        {**defaults, **raw},
        "bart",
        position_kind="learned",
        position_offset=OFFSET,
        embed_norm=True,
        epsilon=1e-5,
    )


def adjust(config: Seq2SeqConfig, tensors: Collection[str]) -> Seq2SeqConfig:
    """See ``Family.adjust``: the bias of the logits is a buffer that a file may lack."""
    held = encoder_decoder.BIAS in tensors and config.head is not None
    return dataclasses.replace(config, head_bias="fixed" if held else "none")


FAMILY = Family(
    name="bart",
    prefix="model",
    base="BartModel",
    body=BODY,
    heads={"lm": HeadNames("BartForConditionalGeneration", encoder_decoder.bias)},
    read=read,
    write=encoder_decoder.write,
    adjust=adjust,
    ignored=("embed_tokens.weight", "lm_head.weight", encoder_decoder.BIAS),
)
