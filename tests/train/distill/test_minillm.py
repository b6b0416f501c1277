"""MiniLLM: returns, whitening, weights, and its gradient against the exact one of the KL."""

import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.model import Model, ModelOut
from steppe.train import distill
from steppe.train.distill.minillm import ADVANTAGE, OLD, WEIGHT, returns, whiten

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
V = 3
CLEAN = {"mixing": 0.0, "gamma": 1.0, "scale": 1.0, "length_norm": False, "whitened": False}


def bigram() -> Model:
    """Next-token logits by the token before; token 0 begins."""

    def init(key):
        return {"table": jax.random.normal(key, (V, V))}

    def apply(params, batch, **_):
        return ModelOut(params["table"][batch["input_ids"]], None)

    return Model(None, init, apply, ())


def every():
    """All sequences of two tokens after the token 0."""
    ids = np.array([(0, *pair) for pair in itertools.product(range(V), repeat=2)], np.int32)
    mask = np.broadcast_to(np.array([0, 1, 1], np.float32), ids.shape)
    return {"input_ids": ids, "labels": ids, "label_mask": mask}


def log_q(params, ids):
    table = jax.nn.log_softmax(params["table"])
    return table[ids[:, 0], ids[:, 1]] + table[ids[:, 1], ids[:, 2]]


def test_returns_by_hand():
    rewards, valid = jnp.array([[9.0, 1, 2, 4, 9]]), jnp.array([[0, 1, 1, 1, 0]])
    plain = returns(rewards, valid, gamma=0.5, length_norm=False)
    np.testing.assert_allclose(plain, [[0, 1 + 1 + 1, 2 + 2, 4, 0]])
    np.testing.assert_allclose(returns(rewards, valid, gamma=0.5), [[0, 1, 2, 4, 0]])
    np.testing.assert_allclose(returns(rewards, valid, gamma=1.0), [[0, 7 / 3, 3, 4, 0]])


def test_whitening_counts_the_valid_only():
    values = jnp.array([[1.0, 5, 100], [3, -1, 100]])
    valid = jnp.array([[1, 1, 0], [1, 1, 0]])
    found = np.array(whiten(values, valid))
    assert not found[:, 2].any()
    assert found[:, :2].mean() == pytest.approx(0, abs=1e-6)
    assert found[:, :2].std() == pytest.approx(1, abs=1e-5)


def setting(seed=0):
    model = bigram()
    params, other = (model.init(jax.random.key(s)) for s in (seed, seed + 50))
    return model, params, distill.Teacher(model, other)


def test_the_mean_gradient_is_the_exact_one():
    """Over all sequences with their probabilities, so that nothing is left to chance."""
    model, params, teacher = setting()
    batch = every()
    exact = jax.grad(
        lambda p: (
            jnp.exp(log_q(p, batch["input_ids"]))
            * (log_q(p, batch["input_ids"]) - log_q(teacher.params, batch["input_ids"]))
        ).sum()
    )(params)
    batch = distill.minillm_scored(model, teacher, params, batch, **CLEAN)
    np.testing.assert_allclose(batch[WEIGHT], 1, rtol=1e-6)
    objective = distill.minillm(model, teacher, single_step=0.0)
    probability = np.exp(np.array(log_q(params, batch["input_ids"])))

    def mean(params):
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(V * V)]
        return sum(
            w * objective(params, row, None).total for w, row in zip(probability, rows, strict=True)
        )

    assert small.largest(jax.grad(mean)(params), exact) < 1e-5


def test_samples_average_to_it():
    model, params, teacher = setting(3)
    batch = every()
    scored = distill.minillm_scored(model, teacher, params, batch, **CLEAN)
    objective = distill.minillm(model, teacher, single_step=0.0)

    def one(index):
        row = {k: jnp.asarray(v)[index][None] for k, v in scored.items()}
        return jax.grad(lambda p: objective(p, row, None).total)(params)["table"]

    each = jax.vmap(one)(jnp.arange(V * V))
    probability = jnp.exp(log_q(params, batch["input_ids"]))
    drawn = jax.random.choice(jax.random.key(0), V * V, (10_000,), p=probability)
    sample = np.array(each)[np.array(drawn)]
    wanted = jnp.einsum("n,nij->ij", probability, each)
    error = sample.std(0) / np.sqrt(len(sample))
    assert (np.abs(sample.mean(0) - wanted) < 4 * error + 1e-6).all()


def test_mixed_draws_are_weighed_back():
    model, params, teacher = setting()
    batch = every()
    found = distill.minillm_scored(model, teacher, params, batch, mixing=0.2)
    q, p = (
        np.exp(
            np.array(jax.nn.log_softmax(x["table"]))[
                batch["input_ids"][:, 0], batch["labels"][:, 1]
            ]
        )
        for x in (params, teacher.params)
    )
    np.testing.assert_allclose(found[WEIGHT][:, 0], q / (0.8 * q + 0.2 * p), rtol=1e-5)
    np.testing.assert_allclose(np.exp(found[OLD][:, 0]), q, rtol=1e-5)
    only = distill.minillm_scored(model, teacher, params, batch, mixing=1.0)
    np.testing.assert_allclose(only[WEIGHT][:, 0], q / p, rtol=1e-5)
    counted = np.array(found[ADVANTAGE])[:, :2]
    assert counted.mean() == pytest.approx(0, abs=1e-5)
    assert counted.std() == pytest.approx(1, abs=1e-3)


def test_rewards_are_clipped():
    model, params, teacher = setting()
    far = distill.Teacher(model, {"table": 1e4 * teacher.params["table"]})
    how = {**CLEAN, "limit": 2.0}
    found = distill.minillm_scored(model, far, params, every(), **how)[ADVANTAGE]
    assert np.abs(np.array(found)).max() <= 4 + 1e-5


def test_the_ratio_is_clipped_where_it_would_gain():
    model, params, teacher = setting()
    batch = distill.minillm_scored(model, teacher, params, every(), **CLEAN)
    moved = {"table": params["table"] + 5 * jnp.eye(V)}
    objective = distill.minillm(model, teacher, single_step=0.0)
    out = objective(moved, batch, None)
    ratio = jnp.exp(
        jax.nn.log_softmax(moved["table"])[batch["input_ids"], jnp.roll(batch["labels"], -1, 1)]
        - batch[OLD]
    )
    gain, mask = batch[ADVANTAGE], np.array([1, 1, 0])
    wanted = -(jnp.minimum(gain * ratio, gain * jnp.clip(ratio, 0.8, 1.2)) * mask).sum()
    np.testing.assert_allclose(out.total, wanted, rtol=1e-5)


def test_the_one_step_term_is_the_reverse_kl():
    model, params, teacher = setting()
    batch = distill.minillm_scored(model, teacher, params, every())
    both, alone = (
        distill.minillm(model, teacher, single_step=c)(params, batch, None) for c in (2.0, 0.0)
    )
    exact = distill.kd(model, teacher, kind="reverse_kl", shift=True)(params, batch, None)
    np.testing.assert_allclose(both.total - alone.total, 2 * exact.total, rtol=1e-4)
    np.testing.assert_allclose(both.aux["reverse_kl"][0], exact.total, rtol=1e-5)


def test_bad_input():
    model, params, teacher = setting()
    with pytest.raises(ValueError, match="batch has no 'minillm_advantage': draw sequences"):
        distill.minillm(model, teacher)(params, every(), None)
    with pytest.raises(ValueError, match=r"clip must be a number in \[0, 1\], got 2"):
        distill.minillm(model, teacher, clip=2)
    with pytest.raises(ValueError, match=r"mixing must be a number in \[0, 1\], got -1"):
        distill.minillm_scored(model, teacher, params, every(), mixing=-1)
    with pytest.raises(ValueError, match="scale must be a finite number > 0, got 0"):
        distill.minillm_scored(model, teacher, params, every(), scale=0)
