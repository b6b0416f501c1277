"""Learning from where GPTQ ends: float kernels that round to its integers, under its steps."""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import fake_quant as fq
from steppe.models import integer, packed, quantized, tree
from steppe.train import quantize
from steppe.train.quantize import calibrate, generator, zsaq

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
BERT = small.teacher(small.encoder())
MODEL, PARAMS = BERT.model, BERT.params
DATA = small.batches()
W3A8 = quantized.parse("w3a8")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def grams():
    return calibrate.grams(MODEL, PARAMS, DATA)


@pytest.fixture(scope="module")
def begun(grams):
    return quantize.start(PARAMS, grams, W3A8)


def test_rows_are_what_they_were_when_they_were_rounded():
    """Against a loop in float64: the error of a row goes to those below, itself it stays."""
    mix = RNG.normal(size=(12, 12))
    x = RNG.normal(size=(100, 12)) @ mix
    w = RNG.normal(size=(12, 5))
    gram = x.T @ x / len(x)
    s = np.abs(w).max(0) / 7
    live, h = w.copy(), gram + 0.01 * np.mean(np.diag(gram)) * np.eye(12)
    for i in range(12):
        inverse = np.linalg.inv(h[i:, i:])
        error = live[i] - s * np.clip(np.round(live[i] / s), -7, 7)
        live[i + 1 :] -= np.outer(inverse[1:, 0] / inverse[0, 0], error)
    found, grid = quantize.compensated(
        jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), bits=4
    )
    np.testing.assert_allclose(found, live, atol=1e-3)
    np.testing.assert_array_equal(fq.quantize(found, 4, scale=grid.scale).q, grid.q)
    assert np.abs(np.asarray(fq.dequantize(*grid)) - found).max() > 0.1 * s.min()


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("w3a8", {}),
        ("w4a16", {}),
        ("w3a8-g8", {}),
        ("w3a8-g8", {"act_order": True}),
        ("w4a8", {"fit": "mse"}),
    ],
)
def test_it_rounds_to_gptq_bit_for_bit(grams, scheme, options):
    options = dict(options)
    rules = quantized.parse(scheme, fit=options.pop("fit", "absmax"))
    params, fixed = quantize.start(PARAMS, grams, rules, **options)
    made, there = quantized.quantize(params, fixed), quantize.gptq(PARAMS, grams, rules, **options)
    tree.same_structure(made, there, ("start", "gptq"))
    assert quantized.QUANT not in made
    assert all(map(np.array_equal, jax.tree.leaves(made), jax.tree.leaves(there)))


def test_the_student_answers_like_gptq_and_so_do_its_files(grams, begun, tmp_path):
    params, rules = begun
    student = quantized.wrap(MODEL, rules)
    there = quantized.dequantize(quantize.gptq(PARAMS, grams, W3A8))
    answer = small.logits(student, params, DATA[0])
    still = quantized.wrap(MODEL, W3A8, weights=False)
    np.testing.assert_array_equal(answer, small.logits(still, there, DATA[0]))
    made = quantized.quantize(params, rules)
    whole = integer.wrap(MODEL, rules)
    np.testing.assert_allclose(small.logits(whole, made, DATA[0]), answer, atol=2e-4)
    packed.save(tmp_path / "a", MODEL, made, rules)
    opened = packed.load(tmp_path / "a")
    np.testing.assert_array_equal(small.logits(opened.model, opened.params, DATA[0]), answer)


def test_a_game_moves_the_kernels_and_not_the_steps(begun):
    params, rules = begun
    student = quantized.wrap(MODEL, rules)
    made = generator.random_tokens(MODEL, rows=4, length=6)
    opt = zsaq.players(0.01, 2, student_lr=3e-2, freeze_generator=True)
    state = zsaq.init(jax.random.key(0), student, BERT, made, opt, params=params)
    train = zsaq.make_zsaq_step(student, MODEL, made, opt, steps=3)
    for _ in range(3):
        state, _ = train(state, {})
    after = zsaq.result(state, best=False)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))
    same = jax.tree.map(np.array_equal, after[quantized.QUANT], params[quantized.QUANT])
    assert all(jax.tree.leaves(same))
    before, learnt = (quantized.quantize(p, rules) for p in (params, after))
    path = "layers/attn/q/kernel"
    assert not np.array_equal(tree.get(before, f"{path}/q"), tree.get(learnt, f"{path}/q"))
    scales = [tree.get(p, f"{path}/scale") for p in (before, learnt)]
    np.testing.assert_array_equal(*scales)


def test_what_has_no_gram_keeps_its_rule(grams):
    rules = quantized.rules(W3A8, quantize_head=True)
    params, fixed = quantize.start(PARAMS, grams, rules)
    chosen = quantized.resolve(params, fixed)
    kinds = {path: config.fit for path, config in chosen.items()}
    assert kinds.pop("layers/attn/q/kernel") == "fixed"
    others = {path for path, fit in kinds.items() if fit != "fixed"}
    assert others
    assert all(path.startswith(("head/", "pooler/")) for path in others)
    made = quantized.quantize(params, fixed)
    plain = quantized.quantize(PARAMS, rules)
    for path in others:
        np.testing.assert_array_equal(tree.get(made, f"{path}/q"), tree.get(plain, f"{path}/q"))


def test_mistakes(grams):
    with pytest.raises(ValueError, match="rules smooth 'layers/attn/k/kernel'.*smooth=False"):
        quantize.start(PARAMS, grams, dataclasses.replace(W3A8, smooth=True))
    with pytest.raises(ValueError, match="damping must be > 0"):
        quantize.start(PARAMS, grams, W3A8, damping=0.0)
    with pytest.raises(ValueError, match="grams hold none of the kernels"):
        quantize.start(PARAMS, {}, W3A8)
    fixed = dataclasses.replace(W3A8, fit="fixed")
    with pytest.raises(ValueError, match="no site at the input of 'head/"):
        quantized.wrap(MODEL, ((quantized.STACKED, fixed), (r"head/.*kernel", fixed)))
    with pytest.raises(ValueError, match="fit='fixed' has steps already"):
        quantize.start(PARAMS, grams, fixed)
    student = quantized.wrap(MODEL, fixed)
    with pytest.raises(ValueError, match="hold no quant/layers/attn.k/step: calibrate first"):
        student.apply(PARAMS, DATA[0])
    # Fresh steps are NaN, so that nobody takes them for some.
    params = {**PARAMS, quantized.QUANT: student.init(jax.random.key(0))[quantized.QUANT]}
    assert np.isnan(small.logits(student, params, DATA[0])).all()
    assert params[quantized.QUANT]["layers"]["ffn.in"]["step"].shape == (2, 1, 24)
