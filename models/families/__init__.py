"""Families of published checkpoints; a new one is one small file of name maps, listed here."""

from steppe.models.families import (
    bart,
    bert,
    clip,
    dinov2,
    distilbert,
    gemma3,
    gpt2,
    llama,
    marian,
    marian_ssru,
    mistral,
    mpnet,
    qwen2,
    roberta,
    t5,
    vit,
)
from steppe.models.families.names import Family

_ALL: tuple[Family, ...] = (
    # Encoders.
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
    mpnet.FAMILY,
    # Decoders.
    llama.FAMILY,
    qwen2.FAMILY,
    mistral.FAMILY,
    gemma3.FAMILY,
    gpt2.FAMILY,
    # Encoder-decoders.
    t5.FAMILY,
    bart.FAMILY,
    marian.FAMILY,
    marian_ssru.FAMILY,
    # Vision.
    vit.FAMILY,
    dinov2.FAMILY,
    dinov2.WITH_REGISTERS,
    clip.FAMILY,
    clip.IMAGE_TOWER,
    clip.TEXT_TOWER,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def family(name: str) -> Family:
    """The family whose ``model_type`` is ``name``.

    Raises:
      ValueError: it is not known; lists those that are.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {name!r} is not known; known families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
