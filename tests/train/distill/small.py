"""Models and batches small enough that every test of distillation compiles them in a second."""

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Model, ModelOut
from steppe.train import distill

VOCAB, ROWS, LENGTH = 24, 4, 8
BOS, EOS = 1, 2


def decoder(width=8, layers=1, *, vocab=VOCAB, tied=False, **more) -> Model:
    return DecoderConfig(
        "llama",
        vocab_size=vocab,
        width=width,
        layers=layers,
        heads=2,
        ffn_width=12,
        positions=16,
        tied=tied,
        head=HeadConfig("lm"),
        **more,
    ).build()


def encoder(width=8, layers=2, *, heads=2, head="mlm", drop=0.0, **more) -> Model:
    return EncoderConfig(
        "bert",
        vocab_size=VOCAB,
        width=width,
        layers=layers,
        heads=heads,
        ffn_width=12,
        positions=16,
        drop=drop,
        attn_drop=drop,
        head=None if head is None else HeadConfig(head, num_labels=3, drop=drop),
        **more,
    ).build()


def start(model, seed=0, scale=8.0):
    """Parameters whose logits are far from uniform."""
    params = jax.jit(model.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


def teacher(seed=7, **options) -> distill.Teacher:
    model = decoder(width=12, **options)
    return distill.Teacher(model, start(model, seed))


def batch(seed=0, rows=ROWS, length=LENGTH, prompt=2):
    """Texts of very different lengths: prompt, answer, one end token, padding."""
    rng = np.random.default_rng(seed)
    sizes = np.where(np.arange(rows) % 2 == 0, prompt + 2, length)
    column = np.arange(length)
    there = (column < sizes[:, None]).astype(np.int32)
    ids = rng.integers(3, VOCAB, (rows, length)).astype(np.int32)
    ids[:, 0] = BOS
    ids[np.arange(rows), sizes - 1] = EOS
    ids = ids * there
    return {
        "input_ids": ids,
        "attention_mask": there,
        "labels": ids,
        "label_mask": there * (column >= prompt).astype(np.float32),
    }


def masked(seed=0, rows=ROWS, length=LENGTH):
    """A batch of masked language modelling."""
    made = batch(seed, rows, length)
    rng = np.random.default_rng(seed + 1)
    chosen = (rng.random((rows, length)) < 0.4) & (made["attention_mask"] > 0)
    chosen[:, 1] = True
    return {
        **made,
        "input_ids": np.where(chosen, 3, made["input_ids"]).astype(np.int32),
        "label_mask": chosen.astype(np.float32),
    }


def table(shape=(ROWS, LENGTH, VOCAB)) -> Model:
    """A network whose logits are a parameter, so that the loss alone is under test."""

    def init(key):
        return {"logits": jax.random.normal(key, shape)}

    def apply(params, batch, **_):
        return ModelOut(params["logits"], None)

    return Model(config=None, init=init, apply=apply, axes=((".*", ()),))


def value(objective, params, batch, key=None):
    """(loss, gradient) of the whole batch, compiled."""

    def loss(params):
        out = objective(params, batch, key)
        if not isinstance(out.total, dict):
            return out.total / out.weight
        return sum(out.total[k] / jnp.maximum(out.weight[k], 1.0) for k in out.total)

    return jax.jit(jax.value_and_grad(loss))(params)


def largest(a, b):
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.array(x) - y).max()), a, b))
    )
