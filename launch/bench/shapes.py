"""Encoders of a given size with random tensors, so that a benchmark needs no download."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from steppe.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Shapes:
    """Size of a BERT; the defaults are MiniLM-L6's.

    Attributes:
      vocab_size, width, layers, heads, ffn_width, positions: V, D, L, H, F, longest sequence.
    """

    vocab_size: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    ffn_width: int = 1536
    positions: int = 512

    def config(self, **overrides: Any) -> EncoderConfig:
        """The encoder with a classification head of two labels and no dropout."""
        from steppe.models.encoder import EncoderConfig
        from steppe.models.heads import HeadConfig

        return EncoderConfig(
            family="bert",
            vocab_size=self.vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            ffn_width=self.ffn_width,
            positions=self.positions,
            types=2,
            pooler=True,
            drop=0.0,
            attn_drop=0.0,
            head=HeadConfig("classification", 2, drop=0.0),
            **overrides,
        )


BERT_BASE = Shapes(width=768, layers=12, heads=12, ffn_width=3072)
TINY = Shapes(vocab_size=97, width=16, layers=2, heads=2, ffn_width=32, positions=32)


def export(directory: Path, source: Shapes | str | os.PathLike[str], seed: int = 0) -> Path:
    """Writes the model that both sides open: a classifier of two labels without dropout.

    Args:
      directory: where to write; must be new or empty.
      source: shapes, for random tensors, or a folder with a pretrained encoder.
    """
    import jax

    from steppe.models import pretrained
    from steppe.models.heads import HeadConfig

    key = jax.random.key(seed)
    if isinstance(source, Shapes):
        model = source.config().build()
        params = jax.jit(model.init)(key)
        return pretrained.save(directory, model, params)
    loaded = pretrained.load(
        source, head="classification", num_labels=2, key=key, drop=0.0, attn_drop=0.0
    )
    head = loaded.model.config.head
    assert isinstance(head, HeadConfig)
    if head.drop:
        head = dataclasses.replace(head, drop=0.0)
        loaded = pretrained.load(source, head=head, key=key, drop=0.0, attn_drop=0.0)
    return pretrained.save(directory, loaded.model, loaded.params)


def batches(
    count: int, batch: int, length: int, vocab_size: int, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Random batches, the same for everyone who asks with the same arguments.

    Rows have between a quarter and all of ``length`` tokens, the first row all of them, as
    the padded batches of real text do; labels are random bits.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        lengths = rng.integers(max(length // 4, 1), length + 1, batch)
        lengths[0] = length
        mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
        low = min(5, vocab_size - 1)  # past the special tokens
        ids = rng.integers(low, vocab_size, (batch, length)).astype(np.int32) * mask
        out.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(ids),
                "labels": rng.integers(0, 2, batch).astype(np.int32),
                "label_mask": np.ones(batch, np.float32),
            }
        )
    return out
