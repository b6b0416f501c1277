"""Overlays: parameter-efficient methods on one seam, each its own file."""

from steppe.models.overlays import (
    adapter,
    added_prompt,
    bitfit,
    compacter,
    ia3,
    idpg,
    lora,
    loramoe,
    lpt,
    mp2,
    o_lora,
    plugat,
    prefix,
    prefix_fixed,
    prompt,
    residual_prompt,
    unipelt,
)
from steppe.models.overlays.compose import compose
from steppe.models.overlays.overlay import Merged, Overlay

__all__ = [
    "Merged",
    "Overlay",
    "adapter",
    "added_prompt",
    "bitfit",
    "compacter",
    "compose",
    "ia3",
    "idpg",
    "lora",
    "loramoe",
    "lpt",
    "mp2",
    "o_lora",
    "plugat",
    "prefix",
    "prefix_fixed",
    "prompt",
    "residual_prompt",
    "unipelt",
]
