"""CTCD: two models that learn from each other, and what must not pass between them."""

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
from steppe.train import distill, objectives, step

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))


def random(n=20, classes=9, seed=0):
    rng = np.random.default_rng(seed)
    pair = tuple(jnp.asarray(rng.normal(size=(n, classes)) * 2, jnp.float32) for _ in range(2))
    return *pair, jnp.asarray(rng.integers(0, classes, n)), (rng.random(n) < 0.6).astype(np.float32)


@functools.cache
def couple(drop=0.0):
    large, little = small.encoder(width=12, drop=drop), small.encoder(layers=1, drop=drop)
    return large, little, {"large": small.start(large), "small": small.start(little, 5)}


def weights(hard_large=1.0, soft_large=1.0, hard_small=1.0, soft_small=1.0):
    return distill.CTCDWeights(hard_large, soft_large, hard_small, soft_small)


def test_each_soft_loss_moves_one_model_only():
    z_l, z_s, labels, mask = random()
    for w, still in ((weights(0, 0, 0, 1), 0), (weights(0, 1, 0, 0), 1)):
        grads = jax.grad(
            lambda a, b, w=w: distill.mutual_kd_loss(a, b, labels, mask, w)[0], (0, 1)
        )(z_l, z_s)
        assert not grads[still].any()
        own, other = ((z_s, z_l), (z_l, z_s))[still]
        closed = (jax.nn.softmax(own) - jax.nn.softmax(other)) * mask[:, None] / mask.sum()
        np.testing.assert_allclose(grads[1 - still], closed, atol=1e-6)


def test_swapping_the_models_swaps_the_parts():
    z_l, z_s, labels, mask = random()
    w = weights(0.5, 2.0, 1.0, 3.0)
    value, parts = distill.mutual_kd_loss(z_l, z_s, labels, mask, w, 2.0, True)
    back = weights(1.0, 3.0, 0.5, 2.0)
    other, swapped = distill.mutual_kd_loss(z_s, z_l, labels, mask, back, 2.0, True)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for name in ("hard", "soft"):
        np.testing.assert_allclose(swapped[f"{name}_large"], parts[f"{name}_small"], rtol=1e-6)
    third, more = distill.mutual_kd_loss(
        z_l, z_s, labels, mask, w, 2.0, True, ext_teacher_logits=(z_l,)
    )
    np.testing.assert_allclose(more["external"], parts["soft_small"], rtol=1e-6)
    np.testing.assert_allclose(third, value + parts["soft_small"], rtol=1e-6)


def test_the_pair_is_the_loss_and_its_gradients_are_those_of_each_alone():
    large, little, params = couple()
    batch = small.masked()
    logits = (m.apply(params[n], batch).logits for n, m in (("large", large), ("small", little)))
    labels, mask = jnp.asarray(batch["labels"]), batch["label_mask"]
    wanted, parts = distill.mutual_kd_loss(*logits, labels, mask)
    objective = distill.ctcd(large, little)
    loss, grads = small.value(objective, params, batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    out = objective(params, batch, None)
    for name, value in parts.items():
        np.testing.assert_allclose(out.aux[name][0] / out.aux[name][1], value, rtol=1e-5)
    alone = distill.dwt(little, distill.Teacher(large, params["large"]), alpha_s=1.0)
    assert small.largest(small.value(alone, params["small"], batch)[1], grads["small"]) < 1e-6


def test_without_soft_losses_each_runs_as_if_alone():
    """Bit for bit in the losses; dropout is drawn from a stream of its own by each model."""
    large, little, params = couple(0.2)
    batch, key = small.masked(), jax.random.key(3)
    both = distill.ctcd(large, little, weights=weights(1, 0, 1, 0))(params, batch, key)
    for index, (name, model) in enumerate((("large", large), ("small", little))):
        own = jax.random.fold_in(key, index)
        alone = objectives.mlm_ce(model)(params[name], batch, own)
        assert float(both.total[name]) == float(alone.total)


def test_twins_stay_twins():
    large, _, params = couple()
    twin = {"large": params["large"], "small": jax.tree.map(jnp.copy, params["large"])}
    objective = distill.ctcd(large, large)
    out = objective(twin, small.masked(), None)
    assert float(out.aux["soft_large"][0]) == float(out.aux["soft_small"][0]) == 0
    _, grads = small.value(objective, twin, small.masked())
    assert small.largest(grads["large"], grads["small"]) < 1e-7


def test_targets_with_and_without_dropout():
    large, little, params = couple(0.4)
    batch, key = small.masked(), jax.random.key(3)
    noisy, clean = (
        distill.ctcd(large, little, clean_targets=c)(params, batch, key) for c in (False, True)
    )
    assert float(noisy.aux["hard_small"][0]) == float(clean.aux["hard_small"][0])
    assert float(noisy.aux["soft_small"][0]) != float(clean.aux["soft_small"][0])


def test_training_clips_each_model_by_itself_and_exports_both():
    large, little, params = couple()
    both = distill.ctcd_pair(large, little)

    def transform(clip):
        return optax.chain(optax.clip_by_global_norm(clip), optax.sgd(0.1))

    tx = distill.ctcd_optimiser(transform(1e-6), transform(1e6))
    state = step.init(jax.random.key(0), both, tx, params=params)
    run = step.make(distill.ctcd(large, little), tx)
    losses = []
    for _ in range(4):
        state, metrics = run(state, small.masked())
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[0]
    assert run.compiles == 1
    assert small.largest(distill.export_large(state), params["large"]) < 1e-6
    assert small.largest(distill.export_small(state), params["small"]) > 1e-3
    assert tree.paths(distill.export_small(state)) == tree.paths(params["small"])


def test_bad_input_of_the_pair():
    large, little, params = couple()
    with pytest.raises(ValueError, match="weights.soft_small must be a finite number >= 0, got -1"):
        distill.ctcd(large, little, weights=weights(soft_small=-1))
    with pytest.raises(ValueError, match="tau must be a finite number > 0"):
        distill.ctcd(large, little, tau=-1.0)
    with pytest.raises(ValueError, match="params must hold 'large' and 'small'"):
        distill.ctcd(large, little)(params["small"], small.masked(), None)
    with pytest.raises(ValueError, match="student has 24 classes and the teacher 32"):
        distill.ctcd_pair(small.decoder(vocab=32), little)
