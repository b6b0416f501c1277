"""Models: pure functions (params, inputs) -> outputs, and what attaches to them."""

from steppe.models import overlays, pretrained, tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Inputs, Masks, Model, ModelOut
from steppe.models.sites import Site, SiteContext

__all__ = [
    "EncoderConfig",
    "HeadConfig",
    "Inputs",
    "Masks",
    "Model",
    "ModelOut",
    "Site",
    "SiteContext",
    "overlays",
    "pretrained",
    "tree",
]
