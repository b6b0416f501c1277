"""Decoder-only language models: Llama, Qwen2, Mistral, Gemma 3 and GPT-2.

One configuration describes all five; what differs is data, not code. Parameters:

  embed/word/table, embed/position/table      the second where nothing rotates (GPT-2)
  layers/attn_norm, layers/attn/{q,k,v,o}     stacked over layers on axis 0
  layers/attn/{q,k}_norm                      Gemma 3
  layers/ffn_norm, layers/ffn/{in,gate,out}
  layers/{attn,ffn}_post_norm                 Gemma 3
  norm                                        after the last layer
  head/out                                    untied language-model heads, and classifiers

Radford et al. 2019 (GPT-2), Touvron et al. 2023 (arXiv 2307.09288), Jiang et al. 2023
(2310.06825), Yang et al. 2024 (2407.10671), Gemma Team 2025 (2503.19786).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from steppe.models.attention import Implementation
from steppe.models.heads import HeadConfig
from steppe.models.layers import activation
from steppe.models.model import Model, Rules
from steppe.models.rotary import Rotary
from steppe.models.stack import REMAT

# As for encoders; the vocabulary is split over "model", because the logits are as wide as it is.
RULES: Rules = (
    (r"embed/word/table", ("model", "fsdp")),
    (r"embed/position/table", (None, None)),
    (r"layers/attn/[qkv]/kernel", (None, "fsdp", "model")),
    (r"layers/attn/o/kernel", (None, "model", "fsdp")),
    (r"layers/ffn/(in|gate)/kernel", (None, "fsdp", "model")),
    (r"layers/ffn/out/kernel", (None, "model", "fsdp")),
    (r"layers/(attn/[qkv]|ffn/(in|gate))/bias", (None, "model")),
    (r"layers/(attn/o|ffn/out)/bias", (None, None)),
    (r"layers/(attn/)?\w+_norm/(scale|bias)", (None, None)),
    (r"norm/(scale|bias)", (None,)),
    (r"head/out/kernel", ("fsdp", "model")),
)
PLAIN = Rotary()
NORMS = ("rms", "rms1", "layer")
HEADS = ("lm", "classification", "regression")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder.

    Attributes:
      family: name of the family whose files it reads and writes.
      vocab_size, width, layers, heads, ffn_width: V, D, L, H, F.
      positions: longest sequence, in tokens.
      kv_heads: Hkv, heads of keys and values; None = H.
      head_dim: Dh; None = D / H.
      norm: "rms", "rms1" (RMS norm times 1 + scale, Gemma) or "layer".
      epsilon: of the norms.
      act, gated: of the feed-forward network.
      qkv_bias, out_bias, ffn_bias: whether those projections have biases.
      rotary: rotary embedding, or None for learned positions.
      window: how many tokens a query sees in windowed layers, itself included; None = all.
      windowed: by layer, whether it looks through the window; None = every layer does.
      local_rotary: rotary embedding of the windowed layers; None = that of the others.
      qk_norm: norms on queries and keys, head by head.
      post_norms: norms on the outputs of the sublayers.
      embed_scale: what word embeddings are multiplied by.
      query_scale: of the scores; None = 1 / sqrt(Dh).
      softcap: c in logits = c tanh(logits / c); None = as they are.
      tied: whether the language-model head is the word table.
      drop, attn_drop: dropout rates of embeddings and branches, and of attention probabilities.
      head: a head of the kinds "lm", "classification", "regression", or None.
      remat: see ``run_stack``.
      unroll: a stack of at most so many layers is written out, a deeper one is looped over.
      attention: implementation, see ``attend``.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    ffn_width: int
    positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "rms"
    epsilon: float = 1e-6
    act: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    rotary: Rotary | None = PLAIN
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    local_rotary: Rotary | None = None
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    softcap: float | None = None
    tied: bool = False
    drop: float = 0.0
    attn_drop: float = 0.0
    head: HeadConfig | None = None
    remat: str = "auto"
    unroll: int = 6
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "ffn_width", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"heads {self.heads} are not divisible by kv_heads {self.kv_heads}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be >= 1 token or None, got {self.window}")
        if self.windowed is not None and len(self.windowed) != self.layers:
            raise ValueError(
                f"windowed must say yes or no for {self.layers} layers, got {len(self.windowed)}"
            )
        if self.local_rotary is not None and self.rotary is None:
            raise ValueError("local_rotary needs rotary; give both or neither")
        if self.head is not None and self.head.kind not in HEADS:
            raise ValueError(
                f"a decoder's head must be one of {', '.join(HEADS)}, got {self.head.kind!r}"
            )
        activation(self.act)

    @property
    def max_length(self) -> int:
        """Longest sequence, prompt and answer together, in tokens."""
        return self.positions

    @property
    def dim(self) -> int:
        """Dh, dimensions of a head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def groups(self) -> int:
        """Hkv, heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def local(self) -> tuple[bool, ...]:
        """By layer: whether it looks through the window."""
        if self.window is None:
            return (False,) * self.layers
        return (True,) * self.layers if self.windowed is None else self.windowed

    def with_head(self, head: HeadConfig | None) -> DecoderConfig:
        """The same decoder under another head."""
        return dataclasses.replace(self, head=head)

    def build(self) -> Model:
        """The model of this configuration."""
        from steppe.models.decoder_net import build

        return build(self)
