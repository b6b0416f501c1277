"""A model, objectives and batches small enough that every test compiles them in a second."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.train.types import LossOut

VOCAB, WIDTH, LAYERS, CLASSES = 16, 8, 2, 4
ROWS, LENGTH = 32, 6

RULES = (
    ("embed/table", (None, "model")),
    ("layers/kernel", (None, None, "model")),
    ("layers/bias", (None, "model")),
    ("head/kernel", ("model", None)),
    ("head/bias", ()),
)


def init(key):
    """Parameters of an embedding, two stacked tanh layers and a linear head."""
    a, b, c = jax.random.split(key, 3)
    return {
        "embed": {"table": jax.random.normal(a, (VOCAB, WIDTH))},
        "layers": {
            "kernel": jax.random.normal(b, (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5,
            "bias": jnp.zeros((LAYERS, WIDTH)) + 0.1,
        },
        "head": {"kernel": jax.random.normal(c, (WIDTH, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }


MODEL = SimpleNamespace(init=init, trainable=(".*",), axes=RULES)


def logits(params, batch, key=None):
    """[B, T, C]; with a key, a tenth of the activations is dropped."""
    x = params["embed"]["table"][batch["input_ids"]]

    def layer(x, p):
        return jnp.tanh(x @ p["kernel"] + p["bias"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.9, x.shape).astype(x.dtype)
    return (x @ params["head"]["kernel"] + params["head"]["bias"]).astype(jnp.float32)


def ce(params, batch, key):
    """Cross entropy a token, in nats, with the accuracy beside it."""
    out = logits(params, batch)
    mask = batch["label_mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(out, batch["labels"])
    right = (out.argmax(-1) == batch["labels"]) * mask
    return LossOut((losses * mask).sum(), mask.sum(), {"accuracy": (right.sum(), mask.sum())})


def dropped(params, batch, key):
    """Cross entropy under dropout."""
    mask = batch["label_mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch, key), batch["labels"]
    )
    return LossOut((losses * mask).sum(), mask.sum())


def told(params, batch, key):
    """:func:`dropped`, its rows told apart."""
    mask = batch["label_mask"]
    out = logits(params, batch, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(out, batch["labels"]) * mask
    return LossOut(losses.sum(), mask.sum(), {}, (losses.sum(1), mask.sum(1)))


def two(params, batch, key):
    """Two components with weights of their own: tokens and rows."""
    first = ce(params, batch, key)
    pooled = logits(params, batch).mean(1)
    second = 0.3 * (pooled**2).sum()
    rows = jnp.float32(pooled.shape[0])
    return LossOut(
        {"ce": 0.7 * first.total, "l2": second}, {"ce": first.weight, "l2": rows}, first.aux
    )


def batch(seed=0, rows=ROWS):
    """Rows whose numbers of labelled tokens differ widely, so that means of means are wrong."""
    rng = np.random.default_rng(seed)
    lengths = np.where(np.arange(rows) < rows // 2, 1, LENGTH)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    return {
        "input_ids": rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": rng.integers(0, CLASSES, (rows, LENGTH)).astype(np.int32),
        "label_mask": mask,
    }


class Batches:
    """Endless batches, each a function of its number."""

    def __init__(self, rows=ROWS, delay=0.0, act=None):
        self.index = 0
        self.rows = rows
        self.delay = delay
        self.act = act or {}

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.delay)
        self.index += 1
        made = batch(self.index, self.rows)
        changed = self.act.get(self.index)
        return made if changed is None else changed(made)

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]
