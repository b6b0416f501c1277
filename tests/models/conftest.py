"""A tiny encoder that the tests of this room share."""

import dataclasses

import jax
import numpy as np
import pytest

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Parts

TINY = EncoderConfig(
    family="bert",
    vocab_size=50,
    width=16,
    layers=4,
    heads=2,
    ffn_width=24,
    positions=20,
    types=2,
    pooler=True,
    head=HeadConfig("classification", 3),
)


def jitted(model):
    """``model`` with its functions under jit: one compile a call beats one an operation."""

    def wrap(fn):
        def call(params, *args, **kwargs):
            return jax.jit(lambda p, *a: fn(p, *a, **kwargs))(params, *args)

        return call

    embed, layers, head = model.parts

    def run_layers(params, inputs, **kwargs):
        mask = inputs.mask
        return jax.jit(lambda p, x: layers(p, inputs._replace(hidden=x, mask=mask), **kwargs))(
            params, inputs.hidden
        )

    parts = Parts(embed, run_layers, head)
    return dataclasses.replace(model, apply=wrap(model.apply), parts=parts)


@pytest.fixture(scope="session")
def tiny():
    """(model, params) with every parameter away from its neutral initial value."""
    model = jitted(TINY.build())
    params = jax.jit(model.init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


@pytest.fixture(scope="session")
def batch():
    """Four sequences of 9 tokens, two of them padded."""
    rng = np.random.default_rng(0)
    mask = np.ones((4, 9), np.int32)
    mask[1, 5:] = 0
    mask[3, 2:] = 0
    return {
        "input_ids": rng.integers(1, 50, (4, 9)).astype(np.int32) * mask,
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (4, 9)).astype(np.int32),
    }
