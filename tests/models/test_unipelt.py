"""UniPELT: its gates, their limits, and the union of its parts."""

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.models.overlays import adapter, compose, lora, prefix, unipelt

from .test_overlays import KEY, MODEL, logits, moved, plain


def gates(delta, bias, weight=None):
    """All gates set to sigmoid(bias)."""

    def one(path, leaf):
        if path.endswith("gate/b"):
            return jnp.full_like(leaf, bias)
        return jnp.zeros_like(leaf) if path.endswith("gate/w") else leaf

    return tree.map_with_path(one, delta)


def test_unipelt_with_open_gates_is_the_union_and_with_shut_ones_zero_rows(tiny, batch):
    _, params = tiny
    overlay = unipelt.overlay(rank=2, length=3, reduction=4)
    delta = moved(overlay, params)
    own = delta["layers"]
    union = unipelt.overlay(rank=2, alpha=2.0, length=3, reduction=4, gated=False)
    without = jax.tree.map(lambda x: x, own)
    for site in without.values():
        site.pop("gate")
    wanted = logits(union, params, {"layers": without}, batch)
    np.testing.assert_allclose(
        logits(overlay, params, gates(delta, 40.0), batch), wanted, atol=1e-5
    )
    # Shut: LoRA and adapter are gone, the prefix is rows of zero keys and values.
    zeros = {"layers": {"attn.kv_prefix": {n: jnp.zeros((4, 3, 16)) for n in "kv"}}}
    wanted = logits(prefix.overlay(length=3), params, zeros, batch)
    got = logits(overlay, params, gates(delta, -40.0), batch)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(got - plain(params, batch)).max() > 1e-4
    # The union is what its parts are together.
    parts = compose(
        lora.overlay(rank=2, alpha=2.0),
        prefix.overlay(length=3),
        adapter.overlay(kind="pfeiffer", reduction=4),
    )
    same = {
        "lora": {"layers": {n: without[n] for n in ("attn.q", "attn.v")}},
        "prefix": {"layers": {"attn.kv_prefix": without["attn.kv_prefix"]}},
        "adapter-pfeiffer": {"layers": {"ffn.out": without["ffn.out"]}},
    }
    np.testing.assert_allclose(
        logits(parts, params, same, batch),
        logits(union, params, {"layers": without}, batch),
        atol=1e-5,
    )


def test_gates_pool_real_tokens(tiny, batch):
    _, params = tiny
    gate = {"w": 0.5 * jax.random.normal(KEY, (16,)), "b": jnp.float32(0.2)}
    x = jax.random.normal(jax.random.key(1), (4, 9, 16))
    mask = batch["attention_mask"]
    score = 1 / (1 + np.exp(-(np.asarray(x, np.float64) @ np.asarray(gate["w"]) + 0.2)))
    wanted = (score * mask).sum(1) / mask.sum(1)
    got = unipelt.gate_of(gate, x, mask)
    assert got.shape == (4, 1, 1)
    np.testing.assert_allclose(got[:, 0, 0], wanted, atol=1e-6)
    zero = {"w": jnp.zeros(16), "b": jnp.float32(0)}
    np.testing.assert_array_equal(unipelt.gate_of(zero, x, mask), np.full((4, 1, 1), 0.5))
    # More padding changes nothing with pool="mask", and something with pool="all".
    longer = {n: np.pad(v, ((0, 0), (0, 3))) for n, v in batch.items()}
    for pool, same in (("mask", True), ("all", False)):
        overlay = unipelt.overlay(rank=2, length=3, reduction=4, pool=pool)
        delta = moved(overlay, params, by=0.5)
        away = np.abs(
            logits(overlay, params, delta, batch) - logits(overlay, params, delta, longer)
        ).max()
        assert (away < 1e-5) == same


def test_first_gradients_of_unipelt(tiny, batch):
    """Of LoRA's gates 0 as B is 0; of the others not."""
    _, params = tiny
    overlay = unipelt.overlay(rank=2, length=3, reduction=4, shared=True)
    bound = overlay.bind(MODEL)
    delta = overlay.init(KEY, params)
    assert "gate" not in delta["layers"]["attn.v"]

    def loss(d):
        return jnp.square(bound.apply({"base": params, "overlay": d}, batch).logits).sum()

    found = jax.jit(jax.grad(loss))(delta)["layers"]
    assert not np.asarray(found["attn.q"]["gate"]["w"]).any()
    for site in ("attn.kv_prefix", "ffn.out"):
        assert np.abs(found[site]["gate"]["w"]).max() > 0
