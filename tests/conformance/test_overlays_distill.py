"""A student under an overlay: one step of distillation is the gradient of its loss by the delta."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.overlays import adapter, bitfit, ia3, prefix, prompt, unipelt
from steppe.train import distill, step

HERE = Path(__file__).parents[1] / "train" / "distill"
small = SimpleNamespace(**runpy.run_path(str(HERE / "small.py")))
ROWS, RATE = 8, 0.5
HEAT, SHARE = 2.0, 0.7
# Layers with biases, as GPT-2's, so that BitFit has some to train.
BIASES = {"norm": "layer", "qkv_bias": True, "out_bias": True, "ffn_bias": True}
# name -> (overlay, how the loss is computed)
OVERLAYS = {
    "prefix": (prefix.overlay(length=2, hidden=4), {}),
    "pfeiffer": (adapter.overlay(kind="pfeiffer", width=4), {}),
    "ia3": (ia3.overlay(), {}),
    "bitfit": (bitfit.overlay(), {}),
    "unipelt": (unipelt.overlay(rank=2, length=2, reduction=2), {}),
    # Rows in front, which hidden states have and labels have not.
    "prompt, some tokens at a time": (prompt.overlay(length=2), {"token_chunk": 8}),
}


def host(params):
    return {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}


@functools.cache
def models():
    """(student, its parameters, teacher): all away from their neutral initial values."""
    student = small.decoder(**BIASES)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), small.start(student)
    )
    return student, params, small.teacher()


@functools.cache
def start(name):
    """(bound student, its parameters with a delta away from its neutral one)."""
    student, params, _ = models()
    bound = OVERLAYS[name][0].bind(student, frozen=params)
    delta = jax.jit(bound.init)(jax.random.key(2)).get("overlay", {})
    keys = iter(jax.random.split(jax.random.key(3), 100))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), delta)
    return bound, {"base": params, "overlay": moved}


def loss(z_s, z_t, batch, share):
    """share T^2 KL(teacher, student) at T and (1 - share) CE, means over the labelled tokens."""
    labels, mask = batch["labels"][:, 1:], batch["label_mask"][:, 1:]
    log_p = jax.nn.log_softmax(z_t[:, :-1] / HEAT)
    log_q = jax.nn.log_softmax(z_s[:, :-1] / HEAT)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    log_1 = jax.nn.log_softmax(z_s[:, :-1])
    ce = -jnp.take_along_axis(log_1, labels[..., None], -1)[..., 0]
    each = share * HEAT**2 * kl + (1 - share) * ce
    return (each * mask).sum() / mask.sum()


@functools.cache
def wanted(name):
    """(loss, parameters after a step, those after a step on the labels alone), written out."""
    bound, params = start(name)
    teacher = models()[2]
    own, frozen = tree.split(params, bound.trainable)
    batch = small.batch(rows=ROWS)

    @jax.jit
    def gradient(own, share):
        z_t = teacher.model.apply(teacher.params, batch).logits

        def by(own):
            return loss(bound.apply(tree.merge(own, frozen), batch).logits, z_t, batch, share)

        return jax.value_and_grad(by)(own)

    value, g = gradient(own, SHARE)
    first, slope, labels = host(own), host(g), host(gradient(own, 0.0)[1])
    return float(value), *({p: w - RATE * d[p] for p, w in first.items()} for d in (slope, labels))


@functools.cache
def stepped(name):
    """(loss, state after one step of the library)."""
    bound, params = start(name)
    teacher = models()[2]
    both = distill.with_teacher(bound, teacher)
    objective = distill.kd(
        bound,
        distill.Teacher(teacher.model),
        temperature=HEAT,
        ratio=SHARE,
        scale_tau2=True,
        **OVERLAYS[name][1],
    )
    tx = optax.sgd(RATE)
    full = {"student": params, "teacher": teacher.params}
    state = step.init(jax.random.key(1), both, tx, params=full)
    state, metrics = step.make(objective, tx)(state, small.batch(rows=ROWS))
    return float(metrics["loss"][0] / metrics["loss"][1]), state


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_step_is_the_gradient_by_the_delta(name):
    value, first, on_labels = wanted(name)
    got, state = stepped(name)
    assert got == pytest.approx(value, abs=1e-5)
    found = host(state.params["student"])
    assert found.keys() == first.keys()
    for path, leaf in first.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)
    # The teacher is what it learns from.
    assert max(np.abs(found[path] - on_labels[path]).max() for path in found) > 1e-3


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_rest_of_the_student_and_the_teacher_stay_to_the_bit(name):
    _, state = stepped(name)
    also = [f"base/(?:{p})" for p in OVERLAYS[name][0].trainable]
    before = host(start(name)[1])
    trained = {p for p in before if p.startswith("overlay/") or tree.matches(p, also)}
    assert set(host(state.params)) == {f"student/{p}" for p in trained}
    after = host(state.frozen["student"])
    assert after.keys() == before.keys() - trained
    assert "base/layers/attn/q/kernel" in after
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    teacher = host(models()[2].params)
    for path, leaf in host(state.frozen["teacher"]).items():
        np.testing.assert_array_equal(leaf, teacher[path], err_msg=path)
