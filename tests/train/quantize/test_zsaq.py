"""The game on networks: its value, its two players, the champion, and what must not happen."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import quantized, tree
from steppe.models.quantized import QuantConfig
from steppe.optim import minimax
from steppe.train import distill, loop
from steppe.train.quantize import Terms, discrepancy, game, generator, zsaq

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
KEY = jax.random.key(3)
BERT = small.teacher(small.encoder())
GEN = generator.noise(BERT.model, rows=6, length=5, width=12, hidden=16)
W3A8 = quantized.parse("w3a8")
STUDENT = quantized.wrap(BERT.model, W3A8)
Y = jax.jit(GEN.init)(jax.random.key(0))


@pytest.mark.parametrize("kind", ["kl", "l1", "mse", "reverse_kl"])
def test_divergences_by_hand(kind):
    p, q = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    valid = np.array([[1, 1, 0, 1]] * 3)
    found = discrepancy(kind, jnp.asarray(p), jnp.asarray(q), valid)
    if kind == "l1":
        values = np.abs(p - q).mean(-1)
    elif kind == "mse":
        values = ((p - q) ** 2).mean(-1)
    else:
        name = "forward_kl" if kind == "kl" else kind
        values = distill.token_divergence(name, q, p)
    np.testing.assert_allclose(found, (values * valid).sum() / valid.sum(), rtol=1e-5)


def test_gradients_reach_both_sides_of_a_divergence():
    p, q = jax.random.normal(KEY, (2, 3, 5))
    for kind in ("kl", "l1", "mse"):
        grads = jax.grad(lambda p, q, k=kind: discrepancy(k, p, q), argnums=(0, 1))(p, q)
        assert all(float(jnp.abs(g).max()) > 0 for g in grads)


def values(student, terms=None, gen=GEN, y=Y, teacher=BERT):
    """f and both gradients at the teacher's own weights."""
    f = game(student, teacher.model, gen, teacher.params, None, terms)

    def total(x, y):
        return f.value(x, f.prepare(y, KEY))[0]

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(teacher.params, y)


def test_without_rounding_there_is_nothing_to_play_for():
    value, (gx, gy) = values(quantized.wrap(BERT.model, QuantConfig(32, 32)))
    assert abs(float(value)) < 1e-6
    zeros = (jax.tree.map(jnp.zeros_like, gx), jax.tree.map(jnp.zeros_like, gy))
    assert small.largest(gx, zeros[0]) < 1e-5
    assert small.largest(gy, zeros[1]) < 1e-5


def test_the_terms_add_up():
    plain = float(values(STUDENT)[0])
    assert plain > 1e-4
    bonus = float(values(STUDENT, Terms(act_bonus=0.5))[0]) - plain
    out = jax.jit(GEN.apply)(Y, BERT.params, KEY)

    def states(model):
        run = jax.jit(lambda p, o: model.apply(p, o.batch, embeds=o.embeds, all_hidden=True))
        return run(BERT.params, out).hidden

    every = [states(m) for m in (BERT.model, STUDENT)]
    hidden = every[0][-1]
    np.testing.assert_allclose(bonus, 0.5 * jnp.abs(hidden).mean(), rtol=1e-4)
    inner = float(values(STUDENT, Terms(inter_layer=2.0))[0]) - plain
    unit = [h[1:] / jnp.linalg.norm(h[1:], axis=-1, keepdims=True) for h in every]
    expected = 2 * jnp.abs(unit[0] - unit[1]).mean((1, 2, 3)).sum()
    np.testing.assert_allclose(inner, expected, rtol=1e-3)


@pytest.mark.parametrize("term", ["act_bonus", "info_bonus"])
def test_the_bonus_does_not_move_the_student(term):
    plain, bonus = (values(STUDENT, Terms(**{term: b}))[1] for b in (0.0, 0.5))
    assert small.largest(plain[0], bonus[0]) < 1e-6
    assert small.largest(plain[1], bonus[1]) > 1e-6


def test_what_answers_tell_of_inputs():
    """H(mean p) - mean H(p) in float64: 0 where all answers are one, log C where all differ."""
    logits = np.random.default_rng(0).normal(size=(7, 3)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mean = p.mean(0)
    expected = -(mean * np.log(mean)).sum() + (p * np.log(p)).sum(1).mean()
    np.testing.assert_allclose(generator.information(jnp.asarray(logits)), expected, rtol=1e-5)
    assert abs(float(generator.information(jnp.ones((5, 3)) * 4.0))) < 1e-6
    sure = generator.information(100.0 * jnp.eye(3))
    np.testing.assert_allclose(sure, np.log(3), rtol=1e-6)
    out = jax.jit(GEN.apply)(Y, BERT.params, KEY)
    answers = jax.jit(lambda p, o: BERT.model.apply(p, o.batch, embeds=o.embeds).logits)
    told = generator.information(answers(BERT.params, out))
    found = float(values(STUDENT, Terms(info_bonus=2.0))[0] - values(STUDENT)[0])
    np.testing.assert_allclose(found, 2.0 * told, rtol=1e-3, atol=1e-6)


def test_a_step_of_the_generator_raises_f_on_its_noise():
    # Rounded inputs would make f a staircase in y.
    student = quantized.wrap(BERT.model, QuantConfig(3, 32))
    f = game(student, BERT.model, GEN, BERT.params, None, Terms("l1"))
    x = BERT.params

    @jax.jit
    def both(y):
        def total(y):
            return f.value(x, f.prepare(y, KEY))[0]

        value, up = jax.value_and_grad(total)(y)
        step = 0.02 / optax.global_norm(up)
        return value, total(jax.tree.map(lambda w, g: w + step * g, y, up))

    before, after = both(Y)
    assert float(after) > float(before)


def test_the_perturbation_comes_before_the_rounding():
    """Q(x + e), not Q(x) + e: with two bits a tiny e changes nothing."""
    student = quantized.wrap(BERT.model, QuantConfig(2, 32))
    f = game(student, BERT.model, GEN, BERT.params)
    made = jax.jit(f.prepare)(Y, KEY)
    kernels = {p: w for p, w in tree.flatten(BERT.params).items() if p in student.chosen}
    rounded = quantized.rounded_kernels(BERT.params, student.chosen, {})
    inner = {p: w + 1e-7 * jnp.sign(w) * jnp.abs(w) for p, w in kernels.items()}
    same = quantized.rounded_kernels(tree.replace(BERT.params, inner), student.chosen, {})
    assert small.largest(rounded, same) < 1e-5
    value = jax.jit(f.value)
    np.testing.assert_allclose(
        value(BERT.params, made)[0], value(tree.replace(BERT.params, inner), made)[0], rtol=1e-4
    )


def built(opt, student=STUDENT, gen=GEN, key=0, teacher=BERT, **options):
    start = {k: options.pop(k) for k in ("params", "trainable") if k in options}
    state = zsaq.init(jax.random.key(key), student, teacher, gen, opt, **start)
    return state, zsaq.make_zsaq_step(student, teacher.model, gen, opt, **options)


def trained(opt, steps=6, **options):
    state, run = built(opt, **options)
    rows = []
    for _ in range(steps):
        state, metrics = run(state, {})
        rows.append({n: float(a / b) for n, (a, b) in metrics.items()})
    assert run.compiles == 1
    return state, rows


PLAYERS = functools.partial(zsaq.players, student_lr=3e-3, generator_lr=1e-2)


def test_a_run_moves_both_players_and_logs_them():
    state, run = built(PLAYERS(0.05, 2), judge_every=3)
    rows = []
    for _ in range(6):
        state, metrics = run(state, {})
        rows.append({n: float(a / b) for n, (a, b) in metrics.items()})
    assert set(rows[0]) == {
        "loss", "divergence", "grad_norm", "f_max", "generator_norm", "held_out", "held_out_best",
    }  # fmt: skip
    assert int(state.step) == 6
    assert [np.isnan(r["held_out"]) for r in rows] == [True, True, False] * 2
    first = zsaq.init(jax.random.key(0), STUDENT, BERT, GEN, PLAYERS())
    for name in ("student", "generator"):
        assert small.largest(state.params[name], first.params[name]) > 1e-3
    assert small.largest(first.params["student"], BERT.params) == 0
    assert small.largest(state.frozen["teacher"], BERT.params) == 0
    state = loop.run(run, state, zsaq.Noise(), steps=8, log_every=1)
    assert int(state.step) == 8
    assert run.compiles == 1


def test_the_last_iteration_is_looked_at():
    """A run shorter than the usual ten between two looks is no run for nothing."""
    state, run = built(PLAYERS(0.0, 1), judge_every=3, steps=4)
    looked = []
    for _ in range(4):
        state, metrics = run(state, {})
        looked.append(float(metrics["held_out"][1]))
    assert looked == [0, 0, 1, 1]


def test_against_frozen_random_inputs_the_student_learns():
    """Many small steps on inputs of one distribution: f falls below that of rounding alone."""
    gen = generator.random_tokens(BERT.model, rows=32, length=6)
    lr = optax.cosine_decay_schedule(2e-3, 200)
    opt = zsaq.players(0.0, 5, student_lr=lr, freeze_generator=True)
    state, rows = trained(opt, 40, gen=gen, judge_every=10)
    looks = [r for r in rows if not np.isnan(r["held_out"])]
    assert looks[-1]["held_out"] < 0.7 * looks[0]["held_out_best"]
    f = game(STUDENT, BERT.model, gen, BERT.params)
    made = jax.jit(f.prepare)({}, jax.random.key(99))
    ours, plain = (jax.jit(f.value)(p, made)[0] for p in (zsaq.result(state), BERT.params))
    assert float(ours) < 0.8 * float(plain)


def test_a_student_that_is_destroyed_leaves_the_rounded_model_as_champion():
    opt = zsaq.players(0.0, 2, student_lr=10.0)
    state, _ = trained(opt, 4, judge_every=1)
    assert not small.largest(state.params["student"], BERT.params) < 1  # it may be NaN
    assert small.largest(zsaq.result(state), BERT.params) == 0
    live = zsaq.result(state, best=False)
    jax.tree.map(np.testing.assert_array_equal, live, state.params["student"])


def test_frozen_parts_of_the_student_stay():
    state, _ = trained(PLAYERS(0.05, 1), 3, trainable=(r"layers/.*/kernel",))
    assert {p.split("/")[-1] for p in tree.paths(state.params["student"])} == {"kernel"}
    merged = zsaq.result(state, best=False)
    tree.same_structure(merged, BERT.params, ("result", "teacher"))
    assert small.largest(merged["embed"], BERT.params["embed"]) == 0
    assert small.largest(merged["layers"], BERT.params["layers"]) > 1e-4


def test_static_ranges_do_not_train():
    rules = QuantConfig(3, 8, a_mode="static", ste_clip=True)
    student = quantized.wrap(BERT.model, rules)
    extra = jax.jit(student.init)(KEY)["quant"]
    wide = jax.tree.map(lambda x: jnp.full_like(x, 4.0), extra)
    for site in wide["layers"].values():
        site["low"] = -site["low"]
    start = {**BERT.params, "quant": wide}
    state, rows = trained(PLAYERS(0.05, 1), 3, student=student, params=start)
    assert all(np.isfinite(r["loss"]) for r in rows)
    assert small.largest(state.frozen["student"]["quant"], wide) == 0
    assert small.largest(zsaq.result(state)["quant"], wide) == 0


def test_a_language_model_generates_for_a_language_model():
    llama = small.teacher(small.decoder())
    gen = generator.decoder(llama.model, small.decoder(width=8), rows=4, length=6)
    student = quantized.wrap(llama.model, W3A8)
    state, rows = trained(PLAYERS(0.05, 2), 3, student=student, gen=gen, teacher=llama)
    assert all(np.isfinite(r["loss"]) and r["loss"] > 0 for r in rows)
    assert "body" in state.params["generator"]


def test_any_algorithm_for_two_players_will_do():
    opt = minimax.extragradient(optax.adam(1e-3), optax.adam(1e-3))
    _, rows = trained(opt, 2)
    assert all(np.isfinite(r["loss"]) for r in rows)


def test_bad_input():
    with pytest.raises(ValueError, match="divergence must be one of kl, l1, mse, .*got 'cosine'"):
        zsaq.make_zsaq_step(STUDENT, BERT.model, GEN, PLAYERS(), terms=Terms("cosine"))
    with pytest.raises(ValueError, match="judge_every must be a whole number >= 0, got -1"):
        zsaq.make_zsaq_step(STUDENT, BERT.model, GEN, PLAYERS(), judge_every=-1)
    with pytest.raises(ValueError, match="steps must be a whole number >= 0, got 2.5"):
        zsaq.make_zsaq_step(STUDENT, BERT.model, GEN, PLAYERS(), steps=2.5)
    with pytest.raises(ValueError, match="student must be quantized.wrap.*got Model"):
        zsaq.init(KEY, BERT.model, BERT, GEN, PLAYERS())
    still = quantized.wrap(BERT.model, W3A8, weights=False)
    with pytest.raises(ValueError, match="rounds float weights at every step, got rounded"):
        zsaq.init(KEY, still, BERT, GEN, PLAYERS())
    with pytest.raises(ValueError, match="compares distributions.*use 'l1' or 'mse'"):
        discrepancy("kl", jnp.ones(4), jnp.ones(4))
    with pytest.raises(ValueError, match=r"logits of shape \(4, 3\) .* and \(4, 2\) .* differ"):
        discrepancy("l1", jnp.ones((4, 3)), jnp.ones((4, 2)))
