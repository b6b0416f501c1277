"""Overlays: parameter-efficient methods on one seam, each its own file."""

from steppe.models.overlays import (
    adapter,
    bitfit,
    compacter,
    ia3,
    lora,
    prefix,
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
    "bitfit",
    "compacter",
    "compose",
    "ia3",
    "lora",
    "prefix",
    "prompt",
    "residual_prompt",
    "unipelt",
]
