"""Marian models in the format of ``transformers`` (opus-mt; Junczys-Dowmunt et al. 2018).

Targets start with the padding token. Its word vector learns here like any other; the published
class gives it no gradient through the look-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.families import bart, encoder_decoder
from steppe.models.families.names import Family, HeadNames, Name, table
from steppe.models.seq2seq import Seq2SeqConfig

BODY: list[Name] = [*table("embed/word", "shared"), *encoder_decoder.stacks()]


def read(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    """See ``Family.read``."""
    if raw.get("share_encoder_decoder_embeddings") is False:
        raise ValueError(
            "share_encoder_decoder_embeddings=False is not supported: one word table serves both"
        )
    return encoder_decoder.read(raw, "marian", position_kind="sinusoidal", epsilon=1e-5)


FAMILY = Family(
    name="marian",
    prefix="model",
    base="MarianModel",
    body=BODY,
    heads={"lm": HeadNames("MarianMTModel", encoder_decoder.bias)},
    read=read,
    write=encoder_decoder.write,
    adjust=bart.adjust,
    # The positions are computed; the others are copies of the word table.
    ignored=(
        "embed_tokens.weight",
        "lm_head.weight",
        "embed_positions.weight",
        encoder_decoder.BIAS,
    ),
)
