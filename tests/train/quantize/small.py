"""Models and data small enough that every test of quantization compiles them in a second."""

import jax
import numpy as np

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.vision import VisionConfig
from steppe.train import distill

VOCAB, LENGTH = 24, 8


def encoder(head="classification", **more):
    """Without dropout: a split of the batch is to give the same numbers."""
    return EncoderConfig(
        "bert",
        vocab_size=VOCAB,
        width=16,
        layers=2,
        heads=2,
        ffn_width=24,
        positions=16,
        drop=0.0,
        attn_drop=0.0,
        head=HeadConfig(head, num_labels=1 if head == "regression" else 3, drop=0.0),
        **more,
    ).build()


def decoder(width=16, vocab=VOCAB, **more):
    return DecoderConfig(
        "llama", vocab_size=vocab, width=width, layers=1, heads=2, ffn_width=24, positions=16,
        head=HeadConfig("lm"), **more,
    ).build()  # fmt: skip


def vision():
    return VisionConfig(
        "vit", image_size=8, patch=4, width=16, layers=1, heads=2, ffn_width=24,
        head=HeadConfig("classification", 3),
    ).build()  # fmt: skip


def teacher(model, seed=0, scale=6.0):
    """Parameters whose logits are far from uniform."""
    params = jax.jit(model.init)(jax.random.key(seed))

    def scaled(path, leaf):
        return leaf * scale if path.endswith(("kernel", "table")) else leaf

    return distill.Teacher(model, tree.map_with_path(scaled, params))


def logits(model, params, batch):
    """Compiled: op by op every shape is a program of its own."""
    return jax.jit(lambda p: model.apply(p, batch).logits)(params)


def batches(count=3, rows=6, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        there = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (rows, 1))).astype(np.int32)
        ids = rng.integers(1, VOCAB, (rows, LENGTH)).astype(np.int32) * there
        made.append({"input_ids": ids, "attention_mask": there})
    return made


def largest(a, b):
    gaps = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)
    return max(jax.tree.leaves(gaps))
