"""Models that round: by hand, under the scan, in integers, beside overlays; rules and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import fake_quant as fq
from steppe.models import integer, quantized, tree
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import lora
from steppe.models.quantized import QuantConfig
from steppe.models.sites import Site, SiteContext

from .conftest import TINY

MODEL = TINY.build()
DENSE = ("attn/q", "attn/k", "attn/v", "attn/o", "ffn/in", "ffn/out")
KERNELS = [f"layers/{path}/kernel" for path in DENSE]
W8A8, W4A8 = quantized.parse("w8a8"), quantized.parse("w4a8")


def logits(model, params, batch, **options):
    return jax.jit(lambda p: model.apply(p, batch, **options).logits)(params)


def by_hand(params, x, config):
    """One dense layer of numpy arrays, as the modules define it."""
    w = np.asarray(fq.fake_quant(params["kernel"], config.w_bits, 1, group=config.group))
    made = np.asarray(fq.fake_quant(x, config.a_bits, tuple(range(x.ndim - 1)), symmetric=False))
    return made @ w + params["bias"]


def test_one_layer_by_hand(tiny, batch):
    """The output of a layer of the first site, caught by an overlay around it."""
    _, params = tiny
    seen = {}

    def catch(delta, x, base, context):
        y = base(x)
        jax.debug.callback(lambda i, a, b: seen.update({int(i): (a, b)}), context.layer, x, y)
        return y

    student = quantized.wrap(MODEL, W4A8)
    logits(student, params, batch, sites={"ffn.in": Site(catch, ())})
    x, y = seen[2]
    layer = jax.tree.map(lambda a: np.asarray(a[2]), params["layers"]["ffn"]["in"])
    np.testing.assert_allclose(y, by_hand(layer, x, W4A8), atol=1e-5)


def test_bypass_is_the_model_and_leaves_no_trace(tiny, batch):
    _, params = tiny
    student = quantized.wrap(MODEL, QuantConfig(32, 32))
    plain = jax.jit(lambda p: MODEL.apply(p, batch).logits).lower(params)
    wrapped = jax.jit(lambda p: student.apply(p, batch).logits).lower(params)
    assert wrapped.as_text() == plain.as_text()


def test_only_what_the_rules_name_changes(tiny, batch):
    _, params = tiny
    student = quantized.wrap(MODEL, ((r"layers/ffn/.*/kernel", QuantConfig(2, 32)),))
    assert set(student.chosen) == set(KERNELS[4:])
    half = {p: tree.get(params, p) for p in KERNELS[4:]}
    made = {p: fq.fake_quant(w, 2, (0, 2)) for p, w in half.items()}
    np.testing.assert_allclose(
        logits(student, params, batch), logits(MODEL, tree.replace(params, made), batch), atol=1e-6
    )
    mixed = ((r".*/attn/.*", None), (quantized.STACKED, W8A8))
    assert set(quantized.wrap(MODEL, mixed).chosen) == set(KERNELS[4:])


def test_head_and_embeddings_only_by_their_flags(tiny, batch):
    _, params = tiny
    chosen = quantized.resolve(MODEL, quantized.rules(W4A8))
    assert set(chosen) == set(KERNELS)
    every = quantized.rules(W4A8, quantize_embed=True, quantize_head=True)
    more = set(quantized.resolve(MODEL, every)) - set(KERNELS)
    assert more == {
        "embed/word/table", "embed/position/table", "embed/type/table", "pooler/dense/kernel",
        "head/out/kernel",
    }  # fmt: skip
    assert logits(quantized.wrap(MODEL, every), params, batch).shape == (4, 3)
    # The groups of kernels are none of words, positions and types.
    grouped = quantized.rules(quantized.parse("w4a8-g8"), quantize_embed=True)
    chosen = quantized.resolve(MODEL, grouped)
    assert {c.group for p, c in chosen.items() if p.startswith("embed/")} == {None}
    assert {chosen[path].group for path in KERNELS} == {8}


def test_more_bits_are_closer(tiny, batch):
    _, params = tiny
    whole = logits(MODEL, params, batch)
    gaps = []
    for scheme in ("w8a8", "w4a8", "w2a8"):
        made = logits(quantized.wrap(MODEL, quantized.parse(scheme)), params, batch)
        gaps.append(float(jnp.abs(made - whole).max()))
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] < 0.05


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g8", "w3a32", "w32a8", "mse"])
def test_rounded_and_integer_parameters_are_the_fake_quantised_model(tiny, batch, scheme):
    """Looped layers: the scan carries integers and steps."""
    _, params = tiny
    model = dataclasses.replace(TINY, unroll=1).build()
    if scheme in ("w3a32", "mse"):
        config = QuantConfig(3, 32) if scheme == "w3a32" else QuantConfig(2, 8, fit="mse")
    else:
        config = QuantConfig(32, 8) if scheme == "w32a8" else quantized.parse(scheme)
    fake = logits(quantized.wrap(model, config), params, batch)
    grids = quantized.quantize(params, config)
    still = logits(quantized.wrap(model, config, weights=False), quantized.dequantize(grids), batch)
    np.testing.assert_allclose(still, fake, atol=1e-5)
    integers = logits(integer.wrap(model, config), grids, batch)
    # A sum that rounds in another order may move an input of the next layer by one step.
    np.testing.assert_allclose(integers, fake, atol=5e-3)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_integer_layer_is_the_fake_quantised_one_to_rounding(group, bits):
    w = jax.random.normal(jax.random.key(0), (64, 24)) * 0.1
    x = jax.random.normal(jax.random.key(1), (2, 5, 64)) + 0.5
    x = x.at[0, 0].set(0.0).at[0, 1].set(3.0)
    q, scale = fq.quantize(w, bits, group=group)
    made = integer.dense(x, q, scale, 8)
    expected = fq.fake_quant(x, 8, (0, 1), symmetric=False) @ fq.fake_quant(w, bits, 1, group=group)
    np.testing.assert_allclose(made, expected, atol=2e-5)
    text = jax.jit(lambda x: integer.dense(x, q, scale, 8)).lower(x).as_text()
    assert "xi8>" in text
    assert "xi32>" in text


def test_integers_show_what_is_not_finite():
    q, scale = fq.quantize(jnp.ones((4, 2)), 8)
    x = jnp.ones((3, 4)).at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
    for limits in (None, (jnp.float32(-1), jnp.float32(2))):
        made = integer.dense(x, q, scale, 8, limits)
        assert bool(jnp.isfinite(made[0]).all())
        assert bool(jnp.isnan(made[1:]).all())


def test_gradients_reach_the_float_kernels(tiny, batch):
    _, params = tiny
    student = quantized.wrap(MODEL, W4A8)

    def loss(p):
        return jnp.square(student.apply(p, batch).logits).sum()

    grads = jax.jit(jax.grad(loss))(params)
    for path, g in tree.flatten(grads).items():
        assert bool(jnp.isfinite(g).all()), path
    assert all(float(jnp.abs(tree.get(grads, path)).max()) > 0 for path in KERNELS)


def test_a_range_of_the_batch_leaves_padding_out(tiny, batch):
    _, params = tiny
    x = jax.random.normal(jax.random.key(0), (2, 3, 4)).at[1, 2].set(100.0)
    config = QuantConfig(8, 8, a_mode="tensor")
    context = SiteContext(mask=jnp.array([[1, 1, 1], [1, 1, 0]]))
    _, high = quantized.input_limits(x, config, {}, context)
    assert float(high.max()) < 10
    assert float(quantized.input_limits(x, config, {}, SiteContext())[1].max()) == 100
    student = quantized.wrap(MODEL, config)
    # What stands at hidden places does not reach the logits.
    changed = {**batch, "input_ids": np.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    np.testing.assert_allclose(
        logits(student, params, batch), logits(student, params, changed), atol=1e-5
    )


def test_a_static_range_is_a_parameter(tiny, batch):
    _, params = tiny
    config = QuantConfig(8, 8, a_mode="static")
    student = quantized.wrap(MODEL, config)
    fresh = jax.jit(student.init)(jax.random.key(0))
    assert fresh["quant"]["layers"]["attn.q"]["low"].shape == (4,)
    assert bool(jnp.isnan(logits(student, fresh, batch)).all())
    wide = jax.tree.map(lambda x: jnp.full_like(x, 6.0), fresh["quant"])
    for site in wide["layers"].values():
        site["low"] = -site["low"]
    made = logits(student, {**params, "quant": wide}, batch)
    np.testing.assert_allclose(made, logits(MODEL, params, batch), atol=0.3)
    assert not tree.matches("quant/layers/attn.q/low", student.trainable)
    assert tree.matches("layers/attn/q/kernel", student.trainable)
    with pytest.raises(ValueError, match=r"params hold no quant/layers.*low: calibrate first"):
        logits(student, params, batch)


def test_smooth_factors_cancel_where_nothing_is_rounded(tiny, batch):
    _, params = tiny
    config = QuantConfig(32, 32, smooth=True)
    student = quantized.wrap(MODEL, config)
    fresh = jax.eval_shape(student.init, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(5), 10))
    factors = jax.tree.map(
        lambda x: jnp.exp(jax.random.normal(next(keys), x.shape)), fresh["quant"]
    )
    made = logits(student, {**params, "quant": factors}, batch)
    np.testing.assert_allclose(made, logits(MODEL, params, batch), atol=1e-4)


def test_an_overlay_wraps_a_rounded_base(tiny, batch):
    """LoRA on a rounded base: it sees inputs that are not rounded, and starts as the base."""
    _, params = tiny
    student = quantized.wrap(MODEL, W4A8)
    bound = lora.overlay(rank=2).bind(student, frozen=params)
    full = tree.merge(bound.init(jax.random.key(0)), bound.given)
    np.testing.assert_allclose(
        logits(bound, full, batch), logits(student, params, batch), atol=1e-6
    )


def test_the_parts_of_a_model_round_too(tiny, batch):
    _, params = tiny
    student = quantized.wrap(MODEL, W4A8)

    @jax.jit
    def parts(p):
        inputs = student.parts.embed(p, batch)
        return student.parts.head(p, student.parts.layers(p, inputs), inputs)

    np.testing.assert_allclose(parts(params), logits(student, params, batch), atol=1e-5)


DECODER = DecoderConfig(
    "llama", vocab_size=40, width=16, layers=2, heads=2, ffn_width=24, positions=16, tied=True,
    head=HeadConfig("lm"),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["float", "integer"])
def test_a_decoder_generates_what_it_scores(kind):
    model = DECODER.build()
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)
    if kind == "float":
        student = quantized.wrap(model, W8A8)
    else:
        student, params = integer.wrap(model, W8A8), quantized.quantize(params, W8A8)
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, 40)
    whole = logits(student, params, {"input_ids": ids})

    @jax.jit
    def decode(p):
        first, state = student.decode.start(p, {"input_ids": ids[:, :4]}, 2)
        second, state = student.decode.step(p, ids[:, 4], state)
        return first, second

    first, second = decode(params)
    np.testing.assert_allclose(first, whole[:, 3], atol=1e-3)
    np.testing.assert_allclose(second, whole[:, 4], atol=1e-3)


def test_schemes():
    assert quantized.parse("W4A16") == QuantConfig(4, 32)
    assert quantized.parse("w3a8-g64", a_mode="tensor") == QuantConfig(3, 8, 64, "tensor")
    for bad in ("int8", "w8", "w4a8g", "8a8", "w08a08", "w4a8-g064", ""):
        with pytest.raises(ValueError, match="scheme must look like w8a8"):
            quantized.parse(bad)
    with pytest.raises(ValueError, match="w_bits must be 2 to 8, or 32 .*got 1"):
        quantized.parse("w1a8")
    with pytest.raises(ValueError, match="a_bits must be 2 to 8, or 32 .*got 12"):
        QuantConfig(8, 12)
    with pytest.raises(ValueError, match="a_mode must be one of token, tensor, static, got 'row'"):
        QuantConfig(a_mode="row")
    with pytest.raises(ValueError, match="group must be a whole number >= 1, or None, got 0"):
        QuantConfig(group=0)
    with pytest.raises(ValueError, match="fit must be 'absmax' or 'mse', got 'l2'"):
        QuantConfig(fit="l2")


def test_bad_input(tiny):
    _, params = tiny
    with pytest.raises(ValueError, match=r"rule 'layers/attn/x/kernel' matches no kernel; there"):
        quantized.wrap(MODEL, (("layers/attn/x/kernel", W8A8),))
    with pytest.raises(ValueError, match=r"group must divide the 16 inputs \(axis -2\) of"):
        quantized.wrap(MODEL, quantized.parse("w4a8-g32"))
    with pytest.raises(ValueError, match="the model is quantized already: wrap its base"):
        quantized.wrap(quantized.wrap(MODEL, W8A8), W8A8)
    with pytest.raises(ValueError, match="quantized already"):
        integer.wrap(integer.wrap(MODEL, W8A8), W8A8)
    with pytest.raises(ValueError, match="quantized already"):
        quantized.quantize(quantized.quantize(params, W8A8), W8A8)
    with pytest.raises(ValueError, match="bound to an overlay: quantize its base, then bind"):
        quantized.wrap(lora.overlay(rank=1).bind(MODEL, frozen=params), W8A8)
    with pytest.raises(ValueError, match="no site at the input of 'pooler/dense/ker.*a_bits=32"):
        quantized.wrap(MODEL, (("pooler/dense/kernel", W8A8),))
    with pytest.raises(ValueError, match=r"'layers/attn/q/bias' of shape .*is no matrix"):
        quantized.wrap(MODEL, (("layers/attn/q/bias", QuantConfig(8, 32)),))
    with pytest.raises(ValueError, match="rules must hold at least one"):
        quantized.wrap(MODEL, ())
    with pytest.raises(ValueError, match=r"use parse\('w8a8'\)"):
        quantized.wrap(MODEL, "w8a8")
    bad = tree.replace(params, {KERNELS[0]: tree.get(params, KERNELS[0]).at[1, 2, 3].set(jnp.nan)})
    with pytest.raises(ValueError, match="'layers/attn/q/kernel' holds NaN or infinity"):
        quantized.quantize(bad, W8A8)
    with pytest.raises(ValueError, match="is not in integers: give the parameters of"):
        integer.wrap(MODEL, W8A8).apply(params, {"input_ids": jnp.ones((1, 2), jnp.int32)})
