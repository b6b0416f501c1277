"""Models: pure functions (params, inputs) -> outputs, and what attaches to them."""

from steppe.models import decoding, integer, overlays, packed, pretrained, quantized, tree
from steppe.models.clip import ClipConfig
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Decode, Inputs, Masks, Model, ModelOut
from steppe.models.quantized import QuantConfig
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.sites import Site, SiteContext
from steppe.models.vision import VisionConfig

__all__ = [
    "ClipConfig",
    "Decode",
    "DecoderConfig",
    "EncoderConfig",
    "HeadConfig",
    "Inputs",
    "Masks",
    "Model",
    "ModelOut",
    "QuantConfig",
    "Seq2SeqConfig",
    "Site",
    "SiteContext",
    "VisionConfig",
    "decoding",
    "integer",
    "overlays",
    "packed",
    "pretrained",
    "quantized",
    "tree",
]
