"""Overlays: parameter-efficient methods on one seam, each its own file."""

from steppe.models.overlays import lora
from steppe.models.overlays.overlay import Merged, Overlay

__all__ = ["Merged", "Overlay", "lora"]
