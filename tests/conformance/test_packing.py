"""Packed rows give the loss and the gradients of the documents on their own."""

import jax
import numpy as np
import pytest

from steppe.data.packing import pack_documents
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.rotary import Rotary
from steppe.train import objectives

POSITIONS = {"rotary": Rotary(), "learned": None}


@pytest.mark.parametrize("kind", POSITIONS)
def test_packing_does_not_change_the_loss(kind):
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 19, n) for n in generator.integers(2, 14, 20)]
    config = DecoderConfig(
        family="llama",
        vocab_size=19,
        width=16,
        layers=1,
        heads=2,
        ffn_width=32,
        positions=16,
        rotary=POSITIONS[kind],
        head=HeadConfig("lm"),
    )
    model = config.build()
    params = model.init(jax.random.key(0))
    objective = objectives.token_ce(model, shift=True)

    def loss(params, batch):
        out = objective(params, batch, None)
        return out.total, out.weight

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    forms = (
        pack_documents(documents, 16),
        pack_documents(documents, 16, alone=[True] * 20),
    )
    assert len(forms[0]["input_ids"]) < 13 < len(forms[1]["input_ids"]) == 20
    plain = {n: a for n, a in forms[1].items() if n not in ("segment_ids", "position_ids")}
    (packed, packed_weight), packed_gradient = gradient(params, forms[0])
    (alone, weight), expected = gradient(params, plain)
    assert packed_weight == weight == sum(len(d) - 1 for d in documents)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
