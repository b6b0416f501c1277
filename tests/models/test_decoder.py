"""Decoders: masks, packing, heads, parts, sites; and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Masks
from steppe.models.rotary import Rotary
from steppe.models.sites import Site

LM = HeadConfig("lm")
TINY = DecoderConfig(
    "llama",
    vocab_size=40,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    ffn_width=24,
    positions=32,
    head=LM,
)
LOCAL = dataclasses.replace(
    TINY, window=3, windowed=(True, False, True), local_rotary=Rotary(base=100.0), tied=True
)
LEARNED = dataclasses.replace(
    TINY, rotary=None, norm="layer", gated=False, act="gelu_tanh", qkv_bias=True, out_bias=True,
    ffn_bias=True, tied=True,
)  # fmt: skip


def made(config):
    model = config.build()
    params = jax.jit(model.init)(jax.random.key(0))
    # Nothing at its neutral initial value, and activations that differ.
    return model, jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


@pytest.fixture(scope="module")
def tiny():
    return made(TINY)


def ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(1, 40, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("config", [TINY, LOCAL, LEARNED], ids=["llama", "local", "learned"])
def test_padding_on_either_side_and_packing_change_nothing(config):
    model, params = made(config)
    apply = jax.jit(model.apply)
    a, b = ids(1, 7), ids(1, 5, 1)
    alone = [np.asarray(apply(params, {"input_ids": x}).logits[0]) for x in (a, b)]
    zeros = np.zeros((1, 2), np.int32)
    left = np.concatenate([a, np.concatenate([zeros, b], 1)])
    right = np.concatenate([a, np.concatenate([b, zeros], 1)])
    for batch, cut in ((left, slice(2, 7)), (right, slice(0, 5))):
        got = apply(params, {"input_ids": batch, "attention_mask": (batch > 0).astype(np.int32)})
        np.testing.assert_allclose(got.logits[0], alone[0], atol=1e-5)
        np.testing.assert_allclose(got.logits[1, cut], alone[1], atol=1e-5)
    packed = {
        "input_ids": np.concatenate([a, b, zeros], 1),
        "segment_ids": np.array([[1] * 7 + [2] * 5 + [0] * 2]),
    }
    got = apply(params, packed).logits[0]
    np.testing.assert_allclose(got[:7], alone[0], atol=1e-5)
    np.testing.assert_allclose(got[7:12], alone[1], atol=1e-5)
    assert np.isfinite(got).all()


def test_the_future_does_not_matter_nor_what_left_the_window(tiny):
    model, params = tiny
    apply = jax.jit(model.apply)
    x = ids(1, 9)
    y = x.copy()
    y[0, 5] += 1
    a, b = (apply(params, {"input_ids": t}).logits[0] for t in (x, y))
    np.testing.assert_array_equal(a[:5], b[:5])
    assert (np.abs(a[5:] - b[5:]).max(-1) > 1e-4).all()
    model, params = made(dataclasses.replace(TINY, window=2, layers=2))
    a, b = (jax.jit(model.apply)(params, {"input_ids": t}).logits[0] for t in (x, y))
    # Two layers that look one token back reach two tokens.
    np.testing.assert_allclose(a[8:], b[8:], atol=1e-6)
    assert (np.abs(a[5:8] - b[5:8]).max(-1) > 1e-4).all()


def test_parts_are_the_whole_and_masks_work(tiny):
    model, params = tiny
    batch = {"input_ids": ids(2, 6)}

    @jax.jit
    def parts(params):
        inputs = model.parts.embed(params, batch)
        hidden = model.parts.layers(params, inputs, stop=2)
        hidden = model.parts.layers(params, inputs._replace(hidden=hidden), start=2)
        return model.parts.head(params, hidden, inputs)

    @jax.jit
    def whole(params):
        out = model.apply(params, batch)
        every = model.apply(params, batch, all_hidden=True)
        return out.logits, out.hidden, every.hidden

    logits, hidden, every = whole(params)
    np.testing.assert_allclose(parts(params), logits, atol=1e-5)
    np.testing.assert_allclose(every[-1], hidden, atol=1e-6)
    assert every.shape == (4, 2, 6, 16)

    @jax.jit
    def masked(masks):
        return model.apply(params, batch, masks=masks).logits

    ones = Masks(np.ones((3, 4)), np.ones((3, 24)), np.ones(3))
    np.testing.assert_allclose(masked(ones), logits, atol=1e-6)
    skip = Masks(np.ones((3, 4)), np.ones((3, 24)), np.array([1.0, 1, 0]))

    @jax.jit
    def two(params):
        inputs = model.parts.embed(params, batch)
        return model.parts.head(params, model.parts.layers(params, inputs, stop=2), inputs)

    np.testing.assert_allclose(masked(skip), two(params), atol=1e-5)
    for field, shape in (("head", (3, 4)), ("ffn", (3, 24))):
        off = np.ones(shape)
        off[1, 1] = 0
        assert np.abs(masked(ones._replace(**{field: off})) - logits).max() > 1e-4


def test_the_gate_is_a_site_where_there_is_one(tiny):
    model, params = tiny
    assert "ffn.gate" in model.sites
    assert "ffn.gate" not in LEARNED.build().sites
    site = Site(lambda d, x, base, ctx: base(x) * d, jnp.full((3,), 2.0))
    batch = {"input_ids": ids(1, 4)}
    out = model.apply(params, batch, sites={"ffn.gate": site}).logits
    gate = params["layers"]["ffn"]["gate"]["kernel"] * 2
    layers = {**params["layers"], "ffn": {**params["layers"]["ffn"], "gate": {"kernel": gate}}}
    np.testing.assert_allclose(
        out, model.apply({**params, "layers": layers}, batch).logits, atol=1e-5
    )


def test_heads():
    rows = ids(2, 5)
    mask = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for head, shape in ((HeadConfig("classification", 3, drop=0.0), (2, 3)),
                        (HeadConfig("regression", 1, drop=0.0), (2,))):  # fmt: skip
        model, params = made(TINY.with_head(head))
        out = model.apply(params, {"input_ids": rows, "attention_mask": mask})
        assert out.logits.shape == shape
        short = model.apply(params, {"input_ids": rows[:1, :3]}).logits
        np.testing.assert_allclose(out.logits[0], short[0], atol=1e-5)
    model, params = made(TINY.with_head(None))
    assert model.apply(params, {"input_ids": rows}).logits is None
    assert "head" not in params


def test_dropout_needs_a_key_and_is_random():
    model, params = made(dataclasses.replace(TINY, drop=0.2, attn_drop=0.2))
    batch = {"input_ids": ids(2, 5)}
    with pytest.raises(ValueError, match="needs rng"):
        model.apply(params, batch, train=True)
    run = jax.jit(lambda key: model.apply(params, batch, rng=key, train=True).logits)
    a, b, c = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "not divisible by kv_heads 3"),
        ({"heads": 3, "kv_heads": None}, "not divisible by heads 3"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"window": 0}, "window must be >= 1"),
        ({"windowed": (True,)}, "for 3 layers, got 1"),
        ({"remat": "some"}, "remat must be one of"),
        ({"layers": 0}, "layers must be >= 1"),
        ({"head": HeadConfig("mlm")}, "must be one of lm, classification, regression"),
        ({"rotary": None, "local_rotary": Rotary()}, "local_rotary needs rotary"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_batches(tiny):
    model, params = tiny
    for batch, message in (
        ({"input_ids": ids(1, 33)}, "33 tokens is longer than the model's 32"),
        ({"input_ids": np.zeros((0, 4), int)}, "batch is empty"),
        ({}, "no input_ids"),
        ({"input_ids": ids(1, 4), "attention_mask": np.ones((2, 4), int)}, "must have shape"),
        ({"input_ids": ids(1, 4), "segment_ids": np.ones((1, 3), int)}, "segment_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda b=batch: model.apply(params, b).logits)
