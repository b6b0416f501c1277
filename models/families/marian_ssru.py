"""Marian students with an SSRU decoder (Bogoychev et al. 2020, WNGT 2020).

No class of ``transformers`` has this decoder, so the directories that ``pretrained.save``
writes for these models are a format of our own: a config.json with the keys of Marian and
``"model_type": "marian_ssru"``, and tensors named as Marian's, with ``ssru.in_proj`` and
``ssru.forget_proj`` where its decoder has self-attention. ``pretrained.load`` reads them back
exactly; ``transformers`` does not open them. Marian's own ``.bin`` files are read by
``steppe.models.marian_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.families import encoder_decoder
from steppe.models.families.names import Family, HeadNames, Name, dense, norm, table
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.sites import DECODER, ENCODER

LAYER = "decoder.layers.{}"
BODY: list[Name] = [
    *table("embed/word", "shared"),
    *encoder_decoder.stack(ENCODER),
    *encoder_decoder.stack(
        DECODER,
        [
            Name("decoder/layers/ssru/in/kernel", f"{LAYER}.ssru.in_proj.weight", transposed=True),
            *dense("decoder/layers/ssru/forget", f"{LAYER}.ssru.forget_proj"),
            *norm("decoder/layers/ssru_norm", f"{LAYER}.ssru_layer_norm"),
        ],
    ),
]


def read(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    """See ``Family.read``."""
    return encoder_decoder.read(
        raw,
        "marian_ssru",
        position_kind="timing",
        cell="ssru",
        head_bias="trained",
        epsilon=1e-6,
    )


FAMILY = Family(
    name="marian_ssru",
    prefix="model",
    base="MarianSSRUModel",
    body=BODY,
    heads={"lm": HeadNames("MarianSSRUForConditionalGeneration", encoder_decoder.bias)},
    read=read,
    write=encoder_decoder.write,
)
