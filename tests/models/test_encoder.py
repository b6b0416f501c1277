"""Entry points of the encoder that methods need: masks, splits, embeddings, dtypes, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.encoder import EncoderConfig, relative_buckets
from steppe.models.heads import HeadConfig
from steppe.models.model import Masks

from .conftest import TINY


def test_neutral_masks_change_nothing(tiny, batch):
    model, params = tiny
    base = model.apply(params, batch).logits
    ones = Masks(head=jnp.ones((4, 2)), ffn=jnp.ones((4, 24)), layer=jnp.ones(4))
    np.testing.assert_allclose(model.apply(params, batch, masks=ones).logits, base, atol=1e-6)


def test_head_mask_equals_zero_rows_of_the_output_projection(tiny, batch):
    model, params = tiny
    mask = jnp.ones((4, 2)).at[2, 1].set(0.0)
    kernel = params["layers"]["attn"]["o"]["kernel"]
    cut = kernel.at[2, 8:16].set(0.0)  # head 1 of 2 owns rows 8..15
    expected = model.apply(tree.replace(params, {"layers/attn/o/kernel": cut}), batch).logits
    got = model.apply(params, batch, masks=Masks(head=mask)).logits
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_ffn_mask_equals_zero_rows_of_the_second_matrix(tiny, batch):
    model, params = tiny
    mask = jnp.ones((4, 24)).at[1, 3].set(0.0)
    cut = params["layers"]["ffn"]["out"]["kernel"].at[1, 3].set(0.0)
    expected = model.apply(tree.replace(params, {"layers/ffn/out/kernel": cut}), batch).logits
    got = model.apply(params, batch, masks=Masks(ffn=mask)).logits
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_layer_mask_zero_leaves_only_the_norms(tiny, batch):
    model, params = tiny
    inputs = model.parts.embed(params, batch)

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * p["scale"][0] + p["bias"][0]

    layers = params["layers"]
    expected = norm(norm(np.asarray(inputs.hidden), layers["attn_norm"]), layers["ffn_norm"])
    off = Masks(layer=jnp.zeros(4))
    got = model.parts.layers(params, inputs, stop=1, masks=off)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_the_stack_can_be_split_at_any_layer(tiny, batch, split):
    model, params = tiny
    whole = model.apply(params, batch, all_hidden=True)
    inputs = model.parts.embed(params, batch)
    below = model.parts.layers(params, inputs, stop=split)
    np.testing.assert_allclose(below, whole.hidden[split], atol=1e-6)
    above = model.parts.layers(params, inputs._replace(hidden=below), start=split)
    np.testing.assert_allclose(above, whole.hidden[-1], atol=1e-5)
    logits = model.parts.head(params, above, inputs)
    np.testing.assert_allclose(logits, whole.logits, atol=1e-5)


def test_a_range_outside_the_stack_is_refused(tiny, batch):
    model, params = tiny
    with pytest.raises(ValueError, match="layers 3:9 are not within a stack of 4"):
        model.parts.layers(params, model.parts.embed(params, batch), start=3, stop=9)


def test_embeddings_in_place_of_ids(tiny, batch, emitters):
    model, params = tiny
    embeds = params["embed"]["word"]["table"][batch["input_ids"]]
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    got = model.apply(params, rest, embeds=embeds).logits
    np.testing.assert_array_equal(got, model.apply(params, batch).logits)
    with pytest.raises(ValueError, match="no input_ids and no embeds"):
        model.apply(params, rest)


def test_position_ids_are_honoured(tiny, batch):
    model, params = tiny
    order = np.arange(9)[::-1].copy()
    moved = tree.replace(
        params,
        {
            "embed/position/table": params["embed"]["position"]["table"]
            .at[:9]
            .set(params["embed"]["position"]["table"][order])
        },
    )
    expected = model.apply(moved, batch).logits
    got = model.apply(params, {**batch, "position_ids": order}).logits
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_padding_does_not_reach_the_logits(tiny, batch):
    model, params = tiny
    longer = {k: np.pad(v, ((0, 0), (0, 6))) for k, v in batch.items()}
    longer["input_ids"][:, 9:] = 7
    np.testing.assert_allclose(
        model.apply(params, longer).logits, model.apply(params, batch).logits, atol=1e-5
    )


def test_bf16_computes_in_bf16_and_stays_close(tiny, batch):
    model, params = tiny
    exact = model.apply(params, batch).logits
    half = model.apply(tree.cast(params, jnp.bfloat16), batch)
    assert half.logits.dtype == half.hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.logits.astype(jnp.float32), exact, atol=0.06)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_changes_no_gradient(tiny, batch, remat):
    model, params = tiny
    other = dataclasses.replace(TINY, remat=remat).build()

    model = TINY.build()

    def grad(m):
        return jax.jit(jax.grad(lambda p: jnp.square(m.apply(p, batch).logits).sum()))(params)

    for a, b in zip(jax.tree.leaves(grad(model)), jax.tree.leaves(grad(other)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_dropout_needs_a_key_and_is_reproducible(tiny, batch):
    model, params = tiny
    with pytest.raises(ValueError, match="train=True with dropout needs rng"):
        model.apply(params, batch, train=True)
    net = TINY.build()
    run = jax.jit(lambda k: net.apply(params, batch, rng=k, train=True).logits)
    a, b, c = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    off = model.apply(params, batch, rng=jax.random.key(1), train=False).logits
    np.testing.assert_array_equal(off, model.apply(params, batch).logits)


def test_unused_entry_points_cost_nothing(tiny, batch):
    """No masks, no sites: the compiled program is the one without those arguments."""
    model, params = TINY.build(), tiny[1]

    def text(**kwargs):
        lowered = jax.jit(lambda p, b: model.apply(p, b, **kwargs).logits).lower(params, batch)
        return lowered.as_text()

    plain = text()
    assert text(sites={}, masks=Masks()) == plain
    assert text(sites=None, masks=None) == plain
    assert text(rng=jax.random.key(0), train=False) == plain


@pytest.mark.parametrize("case", ["plain", "dropout", "masks", "causal"])
def test_the_last_layer_at_the_first_token_changes_nothing(tiny, batch, case):
    """Logits and gradients equal those of the whole last layer, under the same dropout."""
    model, params = TINY.build(), tiny[1]
    more = {"dropout": {"rng": jax.random.key(4), "train": True}}.get(case, {})
    if case == "masks":
        more["masks"] = Masks(
            head=jnp.full((4, 2), 0.5), ffn=jnp.full((4, 24), 0.7), layer=jnp.full(4, 0.9)
        )
    if case == "causal":
        full = np.tril(np.ones((9, 9), np.int32)) * batch["attention_mask"][:, None]
        batch = {**batch, "attention_mask": full}

    def run(p, every):
        logits = model.apply(p, batch, all_hidden=every, **more).logits
        return jnp.square(logits).sum(), logits

    calls = [
        jax.jit(jax.value_and_grad(lambda p, e=every: run(p, e), has_aux=True))(params)
        for every in (False, True)
    ]
    ((_, logits), grads), ((_, expected), expected_grads) = calls
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_the_last_layer_is_cheaper_only_where_hidden_is_not_read(tiny, batch):
    model, params = TINY.build(), tiny[1]

    def flops(read):
        compiled = jax.jit(lambda p: read(model.apply(p, batch))).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    both = flops(lambda out: (out.logits, out.hidden))
    assert flops(lambda out: out.logits) < 0.93 * both


def test_depth_does_not_grow_the_program(batch):
    def size(layers):
        model = dataclasses.replace(TINY, layers=layers).build()
        params = model.abstract()
        grad = jax.grad(lambda p: model.apply(p, batch).logits.sum())
        return len(jax.jit(grad).lower(params).as_text().splitlines())

    assert size(48) == size(12)


def test_errors_of_the_config_and_the_inputs(tiny, batch):
    model, params = tiny
    with pytest.raises(ValueError, match="sequence of 21 tokens is longer than the model's 20"):
        model.apply(params, {"input_ids": np.ones((1, 21), np.int32)})
    with pytest.raises(ValueError, match="width 16 is not divisible by heads 3"):
        dataclasses.replace(TINY, heads=3)
    with pytest.raises(ValueError, match="layers must be >= 1, got 0"):
        dataclasses.replace(TINY, layers=0)
    with pytest.raises(ValueError, match="remat must be one of auto, dots, full, none, got 'some'"):
        dataclasses.replace(TINY, remat="some")
    with pytest.raises(ValueError, match="activation must be one of gelu"):
        dataclasses.replace(TINY, act="swish7")
    with pytest.raises(ValueError, match="head must be one of classification"):
        HeadConfig("ner")
    with pytest.raises(ValueError, match="a regression head has num_labels=1, got 2"):
        HeadConfig("regression", 2)
    with pytest.raises(ValueError, match="must have shape"):
        model.apply(params, {**batch, "attention_mask": np.ones(9, int)})


def test_relative_buckets_against_the_definition():
    """T5's formula, written out entry by entry."""
    got = np.asarray(relative_buckets(200, 32, 128))
    assert got.shape == (200, 200)
    for q, k in [
        (0, 0),
        (5, 5),
        (5, 4),
        (4, 5),
        (0, 7),
        (0, 8),
        (9, 0),
        (0, 100),
        (150, 0),
        (0, 199),
    ]:
        away = abs(k - q)
        if away < 8:
            bucket = away
        else:
            bucket = min(8 + int(np.log(away / 8) / np.log(128 / 8) * 8), 15)
        assert got[q, k] == bucket + (16 if k > q else 0), (q, k)


def test_the_config_is_a_value():
    assert TINY.with_head(None).head is None
    assert (
        EncoderConfig(**{f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}) == TINY
    )
    assert TINY.max_length == 20


def test_inputs_that_would_pass_in_silence(tiny, batch):
    """Wrong depths, shapes and dtypes that would otherwise broadcast or be cut off."""
    model, params = TINY.build(), tiny[1]
    shallow = dataclasses.replace(TINY, layers=3).build()
    with pytest.raises(ValueError, match="parameters hold 4 layers, the config 3"):
        shallow.apply(params, batch)
    for masks, says in [
        (Masks(layer=jnp.zeros(5)), r"masks.layer must be \[L\] with L = 4, got shape \(5,\)"),
        (Masks(head=jnp.zeros((5, 2))), r"masks.head must be \[L, H\]"),
        (Masks(head=jnp.zeros((4, 1))), "masks.head must have 2 heads a layer, got 1"),
        (Masks(ffn=jnp.zeros((4, 1))), "masks.ffn must have 24 units a layer, got 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            model.apply(params, batch, masks=masks)
    additive = (1.0 - batch["attention_mask"]) * -1e4
    with pytest.raises(ValueError, match="attention_mask must be boolean or integer"):
        model.apply(params, {**batch, "attention_mask": additive})
    for name in ("attention_mask", "token_type_ids"):
        with pytest.raises(ValueError, match=rf"'{name}'\] must have shape \(4, 9\), got \(4, 1\)"):
            model.apply(params, {**batch, name: np.ones((4, 1), np.int32)})
    with pytest.raises(ValueError, match="the batch is empty: 0 rows of 9 tokens"):
        model.apply(params, {"input_ids": np.zeros((0, 9), np.int32)})
    negative = np.full((1, 4), 3, np.int32)
    negative[0, 2] = -1
    assert np.isnan(model.apply(params, {"input_ids": negative}).logits).all()
