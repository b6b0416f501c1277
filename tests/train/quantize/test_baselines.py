"""Baselines: against loops and brute force, and the inequalities that they promise."""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import fake_quant as fq
from steppe.models import integer, quantized, tree
from steppe.models.quantized import QuantConfig
from steppe.train import objectives, quantize, step
from steppe.train.quantize import baselines, calibrate, generator
from steppe.train.quantize.gptq import compensated

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
BERT = small.teacher(small.encoder())
MODEL, PARAMS = BERT.model, BERT.params
DATA = small.batches()
W3A8 = quantized.parse("w3a8")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def grams():
    return calibrate.grams(MODEL, PARAMS, DATA)


def correlated(inputs=24, outputs=10, rows=200):
    """A kernel and inputs some of which say nearly the same."""
    mix = RNG.normal(size=(inputs, inputs)) * (RNG.random((inputs, 1)) * 3)
    x = (RNG.normal(size=(rows, inputs)) @ mix).astype(np.float32)
    return RNG.normal(size=(inputs, outputs)).astype(np.float32), x


def brute(w, gram, bits, damping=0.01):
    """GPTQ as its paper tells it: invert, round a row, spread its error, drop it, float64."""
    w = w.astype(np.float64).copy()
    top = 2 ** (bits - 1) - 1
    s = np.abs(w).max(0) / top
    h = gram.astype(np.float64) + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    q = np.zeros_like(w)
    for i in range(len(w)):
        inverse = np.linalg.inv(h[i:, i:])
        q[i] = np.clip(np.round(w[i] / s), -top, top)
        w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - q[i] * s)
    return q, s


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_against_brute_force(bits):
    w, x = correlated()
    gram = x.T @ x / len(x)
    q, s = brute(w, gram, bits)
    _, found = compensated(jnp.asarray(w), jnp.asarray(gram), bits=bits)
    np.testing.assert_allclose(found.scale[0], s, rtol=1e-5)
    # A weight at the border of two integers may fall to either side in float32.
    assert (np.asarray(found.q) != q).mean() < 0.02


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"group": 8},
                                     {"group": 8, "act_order": True}, {"fit": "mse"}])  # fmt: skip
def test_gptq_lowers_the_output_error(options):
    w, x = correlated()
    gram = jnp.asarray(x.T @ x / len(x))
    shape = {name: value for name, value in options.items() if name != "act_order"}
    plain = fq.quantize(jnp.asarray(w), 3, **shape)
    _, better = compensated(jnp.asarray(w), gram, bits=3, **options)
    errors = [
        float(baselines.output_error(w, fq.dequantize(*grid), gram)) for grid in (plain, better)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert better.q.dtype == jnp.int8


def test_gptq_of_inputs_without_correlation_is_rounding():
    w, _ = correlated()
    gram = jnp.diag(jnp.asarray(RNG.random(24) + 0.5, jnp.float32)).at[3, 3].set(0.0)
    (_, found), plain = compensated(jnp.asarray(w), gram, bits=4), fq.quantize(jnp.asarray(w), 4)
    np.testing.assert_array_equal(found.q, plain.q)
    np.testing.assert_array_equal(found.scale, plain.scale)


def test_gptq_of_a_model(grams):
    made = quantize.gptq(PARAMS, grams, W3A8)
    plain = quantize.rtn(PARAMS, W3A8)
    tree.same_structure(made, plain, ("gptq", "rtn"))
    flat = tree.flatten(grams)
    for path, gram in flat.items():
        w = tree.get(PARAMS, path)
        errors = [
            baselines.output_error(w, fq.dequantize(**tree.get(grids, path)), gram)
            for grids in (plain, made)
        ]
        assert bool((errors[1] <= errors[0] * 1.001).all()), path
    model = integer.wrap(MODEL, W3A8)
    assert bool(jnp.isfinite(small.logits(model, made, DATA[0])).all())


def test_rounding_to_nearest_and_its_clipping():
    plain, clipped = quantize.rtn(PARAMS, W3A8), quantize.rtn(PARAMS, W3A8, clip="mse")
    expected = quantized.quantize(PARAMS, W3A8)
    assert small.largest(plain, expected) == 0
    ruled = quantize.rtn(PARAMS, dataclasses.replace(W3A8, fit="mse"))
    assert small.largest(clipped, ruled) == 0
    before, after = (quantize.errors(PARAMS, grids) for grids in (plain, clipped))
    assert set(before) == {
        f"layers.{n}/{p}/kernel" for n in (0, 1)
        for p in ("attn/q", "attn/k", "attn/v", "attn/o", "ffn/in", "ffn/out")
    }  # fmt: skip
    for name, error in before.items():
        assert after[name].mse <= error.mse
        assert after[name].sqnr >= error.sqnr
    w = np.asarray(PARAMS["layers"]["ffn"]["in"]["kernel"][1])
    made = fq.dequantize(**plain["layers"]["ffn"]["in"]["kernel"])[1]
    noise = np.square(made - w)
    np.testing.assert_allclose(before["layers.1/ffn/in/kernel"].mse, noise.mean(), rtol=1e-4)
    sqnr = 10 * np.log10(np.square(w).sum() / noise.sum())
    np.testing.assert_allclose(before["layers.1/ffn/in/kernel"].sqnr, sqnr, rtol=1e-4)


def outliers(params, factor=30.0):
    """A channel of the first norm's output that dwarfs the others, undone in the kernels."""
    norm = params["layers"]["attn_norm"]
    wide = {n: norm[n].at[:, 3].multiply(factor) for n in ("scale", "bias")}
    kernel = params["layers"]["ffn"]["in"]["kernel"].at[:, 3].divide(factor)
    return tree.replace(params, {
        "layers/attn_norm/scale": wide["scale"], "layers/attn_norm/bias": wide["bias"],
        "layers/ffn/in/kernel": kernel,
    })  # fmt: skip


def test_smoothing_helps_where_a_channel_dwarfs_the_others():
    params = outliers(PARAMS)
    plain, scaled = QuantConfig(8, 4), QuantConfig(8, 4, smooth=True)
    own = ((r".*ffn/in/kernel", plain),)
    rules = ((r".*ffn/in/kernel", scaled),)
    sizes = calibrate.magnitudes(MODEL, params, DATA, ["ffn.in"])
    assert sizes["ffn.in"].shape == (2, 16)
    made = quantize.smooth(params, sizes, rules)

    def gap(model, params):
        run = jax.jit(lambda p, b: model.apply(p, b).logits)
        return sum(float(jnp.square(run(params, b) - w).sum()) for b, w in zip(DATA, whole))

    plain_run = jax.jit(lambda b: MODEL.apply(params, b).logits)
    whole = [plain_run(b) for b in DATA]
    before = gap(quantized.wrap(MODEL, own), params)
    after = gap(quantized.wrap(MODEL, rules), made)
    assert after < before / 2
    # The factors are folded into the integers, and errors are told in the kernel's own units.
    grids = quantize.rtn(made, rules)
    held = quantized.wrap(MODEL, rules, weights=False)
    np.testing.assert_allclose(
        small.logits(held, quantized.dequantize(grids), DATA[0]),
        small.logits(quantized.wrap(MODEL, rules), made, DATA[0]),
        atol=1e-4,
    )  # fmt: skip
    assert quantize.errors(params, grids)["layers.0/ffn/in/kernel"].sqnr > 20


def test_awq_is_never_worse_on_its_own_data(grams):
    config = QuantConfig(3, 32, smooth=True)
    made = quantize.awq(PARAMS, grams, config)
    plain = quantize.rtn(PARAMS, QuantConfig(3, 32))
    grids = quantize.rtn(made, config)
    gained = 0
    for path, gram in tree.flatten(grams).items():
        w = tree.get(PARAMS, path)
        s = made["quant"]["layers"][quantized.site_of(path)]["smooth"][..., None]
        before = baselines.output_error(w, fq.dequantize(**tree.get(plain, path)), gram)
        after = baselines.output_error(w, fq.dequantize(**tree.get(grids, path)) / s, gram)
        assert bool((after <= before * 1.0001).all()), path
        gained += int((after < 0.99 * before).sum())
    assert gained > 0
    second = quantize.gptq(made, grams, config)
    assert bool(jnp.isfinite(quantized.dequantize(second)["layers"]["ffn"]["in"]["kernel"]).all())


@pytest.mark.parametrize("method", ["absmax", "ema", "percentile"])
def test_static_ranges(method):
    rules = QuantConfig(32, 8, a_mode="static")
    percentile = 90 if method == "percentile" else 99.9
    made = calibrate.ranges(
        MODEL, PARAMS, DATA, rules, method=method, decay=0.5, percentile=percentile
    )
    found = made["quant"]["layers"]["attn.q"]
    hiddens = jax.jit(lambda b: MODEL.apply(PARAMS, b, all_hidden=True).hidden)
    every = []
    for batch in DATA:
        hidden = hiddens(batch)
        every.append([np.asarray(h)[batch["attention_mask"] > 0] for h in hidden[:-1]])
    low, high = [], []
    for layer in range(2):
        x = [e[layer] for e in every]
        if method == "absmax":
            pair = min(v.min() for v in x), max(v.max() for v in x)
        elif method == "percentile":
            pair = np.mean([np.percentile(v, [10, 90]) for v in x], axis=0)
        else:
            pair = [v * 0.25 + w * 0.25 + u * 0.5 for v, w, u in (
                [f(v) for v in x] for f in (np.min, np.max))]  # fmt: skip
        low.append(pair[0])
        high.append(pair[1])
    np.testing.assert_allclose(found["low"], low, rtol=1e-4)
    np.testing.assert_allclose(found["high"], high, rtol=1e-4)
    if method == "absmax":
        made_logits = small.logits(quantized.wrap(MODEL, rules), made, DATA[0])
        whole = small.logits(MODEL, PARAMS, DATA[0])
        assert float(jnp.abs(made_logits - whole).max()) < 0.2 * float(jnp.abs(whole).max())


def test_calibration_on_what_a_generator_makes():
    gen = generator.random_tokens(MODEL, rows=4, length=6)
    data = generator.batches(gen, {}, PARAMS, jax.random.key(0), 2)
    fed = generator.feeding(MODEL)
    grams = calibrate.grams(fed, PARAMS, data)
    made = quantize.gptq(PARAMS, grams, W3A8)
    assert made["layers"]["attn"]["q"]["kernel"]["q"].dtype == jnp.int8
    ranges = calibrate.ranges(fed, PARAMS, data, QuantConfig(8, 8, a_mode="static"))
    assert bool(jnp.isfinite(ranges["quant"]["layers"]["ffn.out"]["low"]).all())


def test_quantization_aware_fine_tuning_in_the_ordinary_step():
    rules = quantized.parse("w2a8")
    objective = baselines.qat(MODEL, rules, objectives.classification_ce)
    batch = {**DATA[0], "labels": np.array([0, 1, 2, 0, 1, 2], np.int32)}
    tx = optax.adam(1e-2)
    state = step.init(jax.random.key(0), MODEL, tx, params=PARAMS)
    run = step.make(objective, tx)
    losses = []
    for _ in range(25):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]
    # What was trained is what is stored.
    grids = quantize.rtn(state.params, rules)
    student = quantized.wrap(MODEL, rules)
    held = quantized.wrap(MODEL, rules, weights=False)
    np.testing.assert_allclose(
        small.logits(held, quantized.dequantize(grids), batch),
        small.logits(student, state.params, batch),
        atol=1e-4,
    )  # fmt: skip


def test_bad_input(grams):
    with pytest.raises(ValueError, match="clip must be 'absmax' or 'mse', got 'best'"):
        quantize.rtn(PARAMS, W3A8, clip="best")
    with pytest.raises(ValueError, match="damping must be > 0, got 0"):
        quantize.gptq(PARAMS, grams, W3A8, damping=0)
    with pytest.raises(ValueError, match="grams hold none of the kernels"):
        quantize.gptq(PARAMS, {}, W3A8)
    short = tree.map_with_path(lambda _, g: g[:, 1:, 1:], grams)
    with pytest.raises(ValueError, match=r"the Gram at 'layers/attn/./kernel' must be \(2, 16"):
        quantize.gptq(PARAMS, short, W3A8)
    static = QuantConfig(8, 8, a_mode="static")
    with pytest.raises(ValueError, match="method must be one of ema, absmax, .*, got 'max'"):
        calibrate.ranges(MODEL, PARAMS, DATA, static, method="max")
    with pytest.raises(ValueError, match=r"percentile must lie in \(50, 100\], got 0.999"):
        calibrate.ranges(MODEL, PARAMS, DATA, static, percentile=0.999)
    with pytest.raises(ValueError, match="no a_mode='static' layer"):
        calibrate.ranges(MODEL, PARAMS, DATA, W3A8)
    with pytest.raises(ValueError, match="batches must not be empty"):
        calibrate.ranges(MODEL, PARAMS, [], static)
    bad = tree.replace(PARAMS, {
        "layers/ffn/out/bias": PARAMS["layers"]["ffn"]["out"]["bias"].at[0, 2].set(jnp.inf)
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"'attn\.\w' holds NaN or infinity in layer 1"):
        calibrate.ranges(MODEL, bad, DATA, static)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        quantize.smooth(PARAMS, {}, QuantConfig(smooth=True), alpha=2)
    with pytest.raises(ValueError, match=r"magnitudes lack the site 'attn\.\w'"):
        quantize.smooth(PARAMS, {}, QuantConfig(smooth=True))
    with pytest.raises(ValueError, match="no layer with smooth=True"):
        quantize.awq(PARAMS, grams, W3A8)


def test_smoothing_reaches_kernels_that_stay_in_float():
    rules = quantized.rules(quantized.parse("w16a8", smooth=True))
    scaled = baselines.smooth(PARAMS, calibrate.magnitudes(MODEL, PARAMS, DATA), rules)
    held = quantized.quantize(scaled, rules)
    still = quantized.wrap(MODEL, rules, weights=False)
    live = quantized.wrap(MODEL, rules).apply(scaled, DATA[0]).logits
    for made in (
        still.apply(quantized.dequantize(held), DATA[0]),
        still.apply(baselines.rtn(scaled, rules, clip="mse"), DATA[0]),
        integer.wrap(MODEL, rules).apply(held, DATA[0]),
    ):
        np.testing.assert_allclose(made.logits, live, atol=1e-5)


def test_inputs_that_are_no_numbers_are_named_by_layer(grams):
    path = "layers/ffn/out/kernel"
    bad = tree.replace(grams, {path: tree.get(grams, path).at[1, 0, 0].set(jnp.nan)})
    both = quantized.parse("w3a8", smooth=True)
    says = r"the input of 'ffn\.out' holds NaN or infinity in layer 1: look at the parameters and"
    with pytest.raises(ValueError, match=says):
        baselines.awq(PARAMS, bad, both)
    with pytest.raises(ValueError, match=says):
        quantize.gptq(PARAMS, bad, W3A8)
    seen = {quantized.site_of(p): jnp.ones(w.shape[:-1]) for p, w in tree.flatten(grams).items()}
    with pytest.raises(ValueError, match=says):
        baselines.smooth(PARAMS, {**seen, "ffn.out": seen["ffn.out"].at[1, 0].set(jnp.inf)}, both)
    word = PARAMS["embed"]["word"]["table"].at[DATA[0]["input_ids"][0, 0]].set(jnp.nan)
    nan = tree.replace(PARAMS, {"embed/word/table": word})
    with pytest.raises(ValueError, match=r"the input of '.*' holds NaN or infinity in layer 0"):
        calibrate.grams(MODEL, nan, DATA)
