"""A recurrent toy that fulfils the contract of ``Decode``, so small that all paths are cheap."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from steppe.models.model import Decode, Model, ModelOut

VOCAB, WIDTH = 29, 12


@dataclass(frozen=True)
class ToyConfig:
    max_length: int | None = 200
    vocab_size: int = VOCAB


@struct.dataclass
class ToyState:
    hidden: jax.Array  # [B, D]
    room: jax.Array  # scalar, steps that are left

    def take(self, rows):
        return ToyState(self.hidden[rows], self.room)


class Toy:
    """h_t = tanh(h_{t-1} W + E[x_t]), logits = h U; padding leaves h alone."""

    def __init__(self, vocab=VOCAB):
        self.vocab = vocab

    def init(self, key):
        keys = jax.random.split(key, 3)
        return {
            "embed": jax.random.normal(keys[0], (self.vocab, WIDTH)),
            "cell": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5,
            "out": 2 * jax.random.normal(keys[2], (WIDTH, self.vocab)),
        }

    def cell(self, params, hidden, tokens):
        return jnp.tanh(hidden @ params["cell"] + params["embed"][tokens])

    def read(self, params, batch):
        def one(hidden, x):
            token, real = x
            new = jnp.where(real[:, None] > 0, self.cell(params, hidden, token), hidden)
            return new, new

        ids = jnp.asarray(batch["input_ids"])
        mask = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids)))
        first = jnp.zeros((ids.shape[0], WIDTH))
        last, every = jax.lax.scan(one, first, (ids.T, mask.T))
        return last, every.swapaxes(0, 1)

    def apply(self, params, batch, *, sites=None, masks=None, **options):
        hidden = self.read(params, batch)[1]
        return ModelOut(hidden @ params["out"], hidden)

    def start(self, params, batch, more, *, sites=None, masks=None):
        hidden = self.read(params, batch)[0]
        return self.logits(params, hidden, sites), ToyState(hidden, jnp.int32(more))

    def step(self, params, tokens, state, *, sites=None, masks=None):
        hidden = self.cell(params, state.hidden, tokens)
        return self.logits(params, hidden, sites), ToyState(hidden, state.room - 1)

    def logits(self, params, hidden, sites):
        base = hidden @ params["out"]
        return (
            sites["logits"].fn(sites["logits"].delta, hidden, lambda h: base, None)
            if sites
            else base
        )


def build(vocab=VOCAB, max_length=200):
    toy = Toy(vocab)
    return Model(
        config=ToyConfig(max_length, vocab),
        init=toy.init,
        apply=toy.apply,
        axes=((".*", (None, None)),),
        sites=("logits",),
        decode=Decode(toy.start, toy.step),
    )


@functools.cache
def _jitted(decode):
    return jax.jit(decode.start, static_argnums=2), jax.jit(decode.step)


def steps(model, params, prompt):
    """The reference: ``push(token) -> logits [V]`` one row at a time, and the first logits."""
    batch = {"input_ids": np.array([prompt]), "attention_mask": np.ones((1, len(prompt)), int)}
    first, step = _jitted(model.decode)
    logits, state = first(params, batch, 64)
    held = [state]

    def push(token):
        logits, held[0] = step(params, np.array([token]), held[0])
        return np.asarray(logits[0], np.float32)

    return np.asarray(logits[0], np.float32), push


@pytest.fixture(scope="session")
def toy_build():
    return build


@pytest.fixture(scope="session")
def toy_steps():
    return steps


@pytest.fixture(scope="session")
def toy():
    """(model, params)."""
    model = build()
    return model, jax.jit(model.init)(jax.random.key(3))


@pytest.fixture(scope="session")
def prompts_ids():
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, n).tolist() for n in (3, 7, 1, 5)]
