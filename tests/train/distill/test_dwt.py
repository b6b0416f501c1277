"""DWT: the soft loss and its gradient, the falling weight, and copies of layers."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from steppe.models import tree
from steppe.train import distill, objectives
from steppe.train.spikes import Spikes

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
Z, T = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([[0.5, 0.2, -0.7]])


@functools.cache
def models():
    student, weak = small.encoder(width=12), small.encoder(layers=1)
    return student, small.start(student), distill.Teacher(weak, small.start(weak, 5))


def random(n=20, classes=9, seed=0):
    rng = np.random.default_rng(seed)
    pair = tuple(jnp.asarray(rng.normal(size=(n, classes)) * 2, jnp.float32) for _ in range(2))
    return *pair, jnp.asarray(rng.integers(0, classes, n)), (rng.random(n) < 0.6).astype(np.float32)


def test_the_golden_gradient_and_its_closed_form():
    grad = jax.grad(lambda z: distill.soft_kl(z, T, jnp.ones(1), 2.0))(Z)[0]
    np.testing.assert_allclose(grad, [0.045730, -0.025008, -0.020722], atol=1e-6)
    closed = (jax.nn.softmax(Z / 2) - jax.nn.softmax(T / 2))[0] / 2
    np.testing.assert_allclose(grad, closed, atol=1e-7)
    assert not jax.grad(lambda t: distill.soft_kl(Z, t, jnp.ones(1)))(T).any()


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_the_soft_loss_against_float64(tau):
    z, t, _, mask = random()
    log_q, log_p = (log_softmax(np.asarray(x, np.float64) / tau, -1) for x in (z, t))
    wanted = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * mask).sum() / mask.sum()
    np.testing.assert_allclose(distill.soft_kl(z, t, mask, tau), wanted, rtol=1e-6)
    scaled = distill.soft_kl(z, t, mask, tau, scale_tau2=True)
    np.testing.assert_allclose(scaled, wanted * tau**2, rtol=1e-6)
    np.testing.assert_allclose(distill.soft_kl(z + 3, t - 1, mask, tau), wanted, rtol=1e-5)
    assert float(distill.soft_kl(z, z, mask, tau)) == 0


def test_a_certain_teacher_is_a_label():
    z, t, _, mask = random()
    value, parts = distill.dwt_loss(z, 1e3 * t, t.argmax(-1), mask, 1.0, 1.0)
    np.testing.assert_allclose(parts["soft"], parts["hard"], rtol=1e-5)
    np.testing.assert_allclose(value, parts["hard"] + parts["soft"], rtol=1e-6)


def test_the_objective_is_the_loss():
    student, params, weak = models()
    batch = small.masked()
    logits = (m.apply(p, batch).logits for m, p in ((student, params), (weak.model, weak.params)))
    wanted, parts = distill.dwt_loss(
        *logits, jnp.asarray(batch["labels"]), batch["label_mask"], 0.5, 3.0, 2.0, True
    )
    how = {"alpha_h": 0.5, "tau": 2.0, "scale_tau2": True}
    fixed = distill.dwt(student, weak, alpha_s=3.0, **how)
    moving = distill.dwt(student, weak, **how)
    for objective, given in ((fixed, batch), (moving, {**batch, "alpha_s": jnp.float32(3.0)})):
        out = objective(params, given, None)
        np.testing.assert_allclose(out.total / out.weight, wanted, rtol=1e-5)
        for name, value in parts.items():
            np.testing.assert_allclose(out.aux[name][0] / out.weight, value, rtol=1e-5)


def test_without_the_soft_loss_it_is_masked_language_modelling(emitters):
    student, params, weak = models()
    plain = small.value(objectives.mlm_ce(student), params, small.masked())
    dwt = small.value(distill.dwt(student, weak, alpha_s=0), params, small.masked())
    assert float(plain[0]) == float(dwt[0])
    assert small.largest(plain[1], dwt[1]) == 0


def test_a_copy_teaches_nothing():
    student, params, _ = models()
    twin = distill.Teacher(student, jax.tree.map(jnp.copy, params))
    objective = distill.dwt(student, twin, alpha_h=0.0, alpha_s=4.0)
    loss, grads = small.value(objective, params, small.masked())
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_schedule_falls_from_4_to_1_and_rides_on_the_batches(kind):
    schedule = distill.alpha_schedule(steps=10, kind=kind)
    values = [float(schedule(i)) for i in range(13)]
    assert values[0] == 4
    np.testing.assert_allclose(values[10:], 1)
    assert (np.diff(values[:11]) < 0).all()
    batches = list(distill.with_alpha(iter([small.masked()] * 3), schedule, first=4))
    np.testing.assert_allclose([b["alpha_s"] for b in batches], values[4:7])


class Numbers:
    """Batches that say which they are."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        return {"x": np.full(2, self.index)}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def test_the_schedule_resumes_with_its_batches():
    schedule = distill.alpha_schedule(steps=10)
    run = distill.with_alpha(Numbers(), schedule)
    next(run), next(run)
    state = run.get_state()
    wanted = next(run)
    other = distill.with_alpha(Numbers(), schedule)
    other.set_state(state)
    found = next(other)
    assert float(found["alpha_s"]) == float(wanted["alpha_s"]) == float(schedule(2))
    assert found["x"][0] == wanted["x"][0] == 3


def test_batches_that_a_rollback_leaves_out_do_not_move_the_schedule():
    schedule = distill.alpha_schedule(steps=10)
    run = distill.with_alpha(Numbers(), schedule)
    next(run)
    watch = Spikes(run)
    state = watch.get_state()
    for _ in range(4):
        next(watch)
    watch.rewind(state, 3)
    found = next(watch)
    assert float(found["alpha_s"]) == float(schedule(1))
    assert found["x"][0] == 5


def test_remapping_repeats_the_last_layer():
    teacher = small.encoder(layers=4)
    student = small.encoder(layers=6)
    theirs, ours = small.start(teacher, 1), small.start(student, 2)
    found = distill.remap_parameters(theirs, ours)
    for path, leaf in tree.flatten(found).items():
        source = tree.flatten(theirs)[path]
        for i, j in enumerate((0, 1, 2, 3, 3, 3)) if path.startswith("layers/") else ():
            np.testing.assert_array_equal(leaf[i], source[j])
        if not path.startswith("layers/"):
            np.testing.assert_array_equal(leaf, source)
    same = distill.remap_parameters(theirs, small.start(teacher, 3), range(4))
    batch = small.masked()
    np.testing.assert_array_equal(
        teacher.apply(same, batch).logits, teacher.apply(theirs, batch).logits
    )
    with pytest.raises(ValueError, match="a layer for each of the student's 6, got"):
        distill.remap_parameters(theirs, ours, (0, 1))
    with pytest.raises(ValueError, match=r"must name layers of the teacher, 0\.\.3, got"):
        distill.remap_parameters(theirs, ours, (0, 1, 2, 3, 4, 5))
    wide = small.encoder(width=12, layers=6)
    with pytest.raises(ValueError, match="has shape .* between equal widths only"):
        distill.remap_parameters(theirs, small.start(wide))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: distill.dwt(s, t, tau=0), "tau must be a finite number > 0, got 0"),
        (lambda s, t: distill.dwt(s, t, alpha_s=-1), "alpha_s must be a finite number >= 0"),
        (lambda s, t: distill.alpha_schedule(steps=0), "steps must be >= 1, got 0"),
        (lambda s, t: distill.alpha_schedule(steps=3, kind="step"), "must be linear or cosine"),
        (lambda s, t: distill.alpha_schedule(-4.0, steps=3), "start must be a finite number"),
    ],
)
def test_bad_numbers(call, message):
    student, _, weak = models()
    with pytest.raises(ValueError, match=message):
        call(student, weak)


def test_the_weight_must_be_somewhere():
    student, params, weak = models()
    with pytest.raises(ValueError, match=r"reads batch\['alpha_s'\], which is not there"):
        distill.dwt(student, weak)(params, small.masked(), None)
