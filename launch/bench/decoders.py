"""Decoders of a given size with random tensors, and the batches that they are trained on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from steppe.models.decoder import DecoderConfig


@dataclass(frozen=True)
class DecoderShapes:
    """Size of a decoder; the defaults are SmolLM2-135M's.

    Attributes:
      family: llama (rotary, gated, RMS norms) or gpt2 (learned positions, biases, layer norms).
      vocab_size, width, layers, heads, kv_heads, ffn_width, positions: V, D, L, H, Hkv, F, and
        the longest sequence.
    """

    family: Literal["llama", "gpt2"] = "llama"
    vocab_size: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    ffn_width: int = 1536
    positions: int = 2048

    def config(self, **overrides: Any) -> DecoderConfig:
        """The decoder with a tied language-model head and no dropout."""
        from steppe.models.decoder import DecoderConfig
        from steppe.models.heads import HeadConfig

        values: dict[str, Any] = {"kv_heads": self.kv_heads}
        if self.family == "gpt2":
            values = {
                "rotary": None,
                "norm": "layer",
                "act": "gelu_tanh",
                "gated": False,
                "qkv_bias": True,
                "out_bias": True,
                "ffn_bias": True,
                "epsilon": 1e-5,
            }
        return DecoderConfig(
            family=self.family,
            vocab_size=self.vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            ffn_width=self.ffn_width,
            positions=self.positions,
            tied=True,
            head=HeadConfig("lm", 1, drop=0.0),
            **{**values, **overrides},
        )

    def matrices(self) -> int:
        """Parameters that enter a matrix product at every token, the output included."""
        groups = self.heads if self.family == "gpt2" else self.kv_heads
        attention = 2 * self.width**2 + 2 * self.width**2 * groups // self.heads
        ffn = (2 if self.family == "gpt2" else 3) * self.width * self.ffn_width
        return self.layers * (attention + ffn) + self.width * self.vocab_size


SMOLLM2 = DecoderShapes()
GPT2 = DecoderShapes("gpt2", 50257, 768, 12, 12, 12, 3072, 1024)
TINY = DecoderShapes(
    vocab_size=97, width=16, layers=2, heads=2, kv_heads=1, ffn_width=32, positions=64
)


def export(directory: Path, source: DecoderShapes | str | os.PathLike[str], seed: int = 0) -> Path:
    """Writes the model that both sides open, without dropout.

    Args:
      directory: where to write; must be new or empty.
      source: shapes, for random tensors, or a folder or ``.gguf`` file of a language model.
    """
    import jax

    from steppe.models import pretrained

    if isinstance(source, DecoderShapes):
        model = source.config().build()
        return pretrained.save(directory, model, jax.jit(model.init)(jax.random.key(seed)))
    loaded = pretrained.load(source, head="lm", drop=0.0, attn_drop=0.0)
    return pretrained.save(directory, loaded.model, loaded.params)


def batches(
    count: int, batch: int, length: int, vocab_size: int, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Random batches of full rows, as packing makes them; labels are the inputs."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        ids = rng.integers(min(5, vocab_size - 1), vocab_size, (batch, length)).astype(np.int32)
        out.append(
            {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "labels": ids,
                "label_mask": np.ones(ids.shape, np.float32),
            }
        )
    return out
