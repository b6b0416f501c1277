"""Encoder-decoders: T5, BART, Marian, and Marian students with an SSRU decoder.

One configuration describes all of them; what differs is data, not code. Parameters:

  embed/word/table                            shared by encoder, decoder and a tied head
  encoder/embed/{position/table, norm}        learned positions, BART's norm
  encoder/relative/table                      T5, [buckets, H], shared by all layers
  encoder/layers/{attn,ffn}, .../{attn,ffn}_norm    stacked over layers on axis 0
  encoder/norm                                pre-norm models
  decoder/...                                 the same, with layers/cross and, in a student,
                                              layers/ssru in place of layers/attn
  head/out/kernel, head/bias                  untied output, bias of the logits

Raffel et al. 2020 (arXiv 1910.10683), Shazeer 2020 (2002.05202) for T5 v1.1, Lewis et al. 2020
(1910.13461), Junczys-Dowmunt et al. 2018 (1804.00344).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from steppe.models import seq2seq_decode
from steppe.models.attention import Implementation
from steppe.models.heads import HeadConfig
from steppe.models.layers import activation
from steppe.models.model import Decode, Model, Rules
from steppe.models.seq2seq_block import LayerConfig
from steppe.models.seq2seq_net import Network, Seq2SeqMasks
from steppe.models.sites import DECODER, ENCODER
from steppe.models.stack import REMAT

__all__ = ["Seq2SeqConfig", "Seq2SeqMasks"]

# See ``encoder.RULES``: one all-reduce a sublayer. The table is split over its width: published
# vocabularies are often odd.
RULES: Rules = (
    (r"embed/word/table", (None, ("fsdp", "model"))),
    (r"(en|de)coder/embed/position/table", (None, None)),
    (r"(en|de)coder/relative/table", (None, None)),
    (r"(en|de)coder/layers/(attn|cross)/[qkv]/kernel", (None, "fsdp", "model")),
    (r"(en|de)coder/layers/(attn|cross)/o/kernel", (None, "model", "fsdp")),
    (r"decoder/layers/ssru/(in|forget)/kernel", (None, "fsdp", "model")),
    (r"(en|de)coder/layers/ffn/(in|gate)/kernel", (None, "fsdp", "model")),
    (r"(en|de)coder/layers/ffn/out/kernel", (None, "model", "fsdp")),
    (r"(en|de)coder/layers/((attn|cross)/[qkv]|ffn/(in|gate)|ssru/forget)/bias", (None, "model")),
    (r"(en|de)coder/layers/((attn|cross)/o|ffn/out)/bias", (None, None)),
    (r"(en|de)coder/layers/\w+_norm/(scale|bias)", (None, None)),
    (r"(en|de)coder/(embed/)?norm/(scale|bias)", (None,)),
    (r"head/out/kernel", ("fsdp", "model")),
    (r"head/bias", (None,)),
)
POSITIONS = ("relative", "learned", "sinusoidal", "timing")
CELLS = ("attention", "ssru")
BIASES = ("none", "fixed", "trained")


@dataclass(frozen=True)
class Seq2SeqConfig:
    """An encoder-decoder.

    Attributes:
      family: name of the family whose files it reads and writes.
      vocab_size, width, heads, ffn_width: V, D, H, F.
      encoder_layers, decoder_layers: depths of the two stacks.
      decoder_heads, decoder_ffn_width: where they differ from the encoder's.
      head_dim: Dh; default D / H.
      positions: tokens that learned or computed positions can serve; for relative ones, which
        have no limit, the length that the model was trained with.
      position_kind: "relative" (T5's bias), "learned", "sinusoidal" (D/2 sines, then cosines, of
        wavelengths 2 pi ... 10000^(1 - 2/D) 2 pi), or "timing" (up to 10000 * 2 pi itself).
      position_offset: row of the first learned position (BART: 2).
      buckets, distance: of relative positions.
      embed_scale: factor of the word embeddings.
      embed_norm: whether a norm follows the embeddings.
      cell: "attention", or "ssru" for a recurrent cell in place of the decoder's self-attention.
      pre_norm, rms, use_bias, gated, act, epsilon, scale: see ``LayerConfig``.
      tied: whether the output is the word table.
      head_scale: factor of the hidden states before the output.
      head_bias: "none"; "fixed", which stays out of training by default (a buffer in the
        published classes); or "trained".
      pad_id, eos_id: of the vocabulary.
      start_id: the token that the decoder reads first; below 0 = a vector of zeros.
      drop, attn_drop, ffn_drop: dropout rates of embeddings and branches, attention
        probabilities, activations.
      head: the head "lm", or None for a model that gives hidden states.
      remat, unroll, attention: as in ``EncoderConfig``.
    """

    family: str
    vocab_size: int
    width: int
    heads: int
    ffn_width: int
    encoder_layers: int
    decoder_layers: int
    decoder_heads: int | None = None
    decoder_ffn_width: int | None = None
    head_dim: int | None = None
    positions: int = 512
    position_kind: str = "relative"
    position_offset: int = 0
    buckets: int = 32
    distance: int = 128
    embed_scale: float = 1.0
    embed_norm: bool = False
    cell: str = "attention"
    pre_norm: bool = True
    rms: bool = True
    use_bias: bool = False
    gated: bool = False
    act: str = "relu"
    epsilon: float = 1e-6
    scale: float | None = None
    tied: bool = True
    head_scale: float = 1.0
    head_bias: str = "none"
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0
    drop: float = 0.1
    attn_drop: float = 0.0
    ffn_drop: float = 0.0
    head: HeadConfig | None = None
    remat: str = "auto"
    unroll: int = 6
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        counts = ("vocab_size", "width", "heads", "ffn_width", "encoder_layers", "decoder_layers")
        for name in (*counts, "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.head_dim is None:
            for heads in (self.heads, self.decoder_heads or self.heads):
                if self.width % heads:
                    raise ValueError(f"width {self.width} is not divisible by heads {heads}")
        for name, known in (
            ("position_kind", POSITIONS),
            ("cell", CELLS),
            ("head_bias", BIASES),
            ("remat", REMAT),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.head is not None and self.head.kind != "lm":
            raise ValueError(f"an encoder-decoder has the head 'lm' only, got {self.head.kind!r}")
        activation(self.act)

    @property
    def max_length(self) -> int:
        """Longest source or target, in tokens (with relative positions: in training)."""
        return self.positions

    def with_head(self, head: HeadConfig | None) -> Seq2SeqConfig:
        """The same network under another head."""
        return dataclasses.replace(self, head=head)

    def layer(self, part: str) -> LayerConfig:
        """The layers of one stack."""
        decoder = part == DECODER
        heads = (self.decoder_heads if decoder else None) or self.heads
        return LayerConfig(
            width=self.width,
            heads=heads,
            head_dim=self.head_dim or self.width // heads,
            ffn_width=(self.decoder_ffn_width if decoder else None) or self.ffn_width,
            act=self.act,
            gated=self.gated,
            use_bias=self.use_bias,
            pre_norm=self.pre_norm,
            rms=self.rms,
            epsilon=self.epsilon,
            scale=self.scale,
            drop=self.drop,
            attn_drop=self.attn_drop,
            ffn_drop=self.ffn_drop,
            cross=decoder,
            ssru=decoder and self.cell == "ssru",
            attention=self.attention,
        )

    def depth(self, part: str) -> int:
        """Number of layers of one stack."""
        return self.encoder_layers if part == ENCODER else self.decoder_layers

    def build(self) -> Model:
        """The model of this configuration."""
        net = Network(self)
        fixed = self.head is not None and self.head_bias == "fixed"
        return Model(
            config=self,
            init=net.init,
            apply=net.apply,
            axes=RULES,
            sites=net.sites,
            trainable=(r"(?!head/bias$).*",) if fixed else (".*",),
            decode=None if self.head is None else Decode(*seq2seq_decode.functions(net)),
        )
