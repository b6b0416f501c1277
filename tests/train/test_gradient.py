"""What a transform may ask of the step beside gradients of the whole batch: rows by themselves."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.train import mesh, step

toy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs" / "toy.py")))

SPLITS = {
    "1x32": (None, 1),
    "4x8": (None, 4),
    "2x2x2, 4 micro-batches": ({"data": 2, "fsdp": 2, "model": 2}, 4),
}


def host(tree_):
    return jax.tree.map(np.array, tree_)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.parametrize("split", SPLITS)
def test_row_losses_and_gradients_of_chosen_rows(split):
    """Each row's loss by itself, in the batch's order; the gradient of some rows' mean loss."""
    rows = jnp.array([30, 1, 17, 4, 9, 8, 2, 25], jnp.int32)

    def update(grads, state, params=None, *, losses_fn, subset_grad_fn, **_):
        return subset_grad_fn(params, rows), {"losses": losses_fn(params)}

    probe = optax.GradientTransformationExtraArgs(
        lambda params: {"losses": jnp.zeros(toy.ROWS)}, update
    )
    shape, microbatches = SPLITS[split]
    tx = optax.chain(probe, optax.sgd(1.0))
    plan = None if shape is None else mesh.plan(shape, toy.RULES)
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan)
    before = host(state.params)
    batch = toy.batch()
    batch["label_mask"][3] = 0.0  # a row without a label
    state, _ = step.make(toy.two, tx, plan, microbatches=microbatches)(state, batch)

    def loss(params, chosen):
        out = toy.two(params, {k: v[np.asarray(chosen)] for k, v in batch.items()}, None)
        return sum(out.total[k] / jnp.maximum(out.weight[k], 1e-9) for k in out.total)

    found = state.opt_state[0]["losses"]
    wanted = [float(loss(before, [i])) for i in (0, 1, 2, 3, 30, 31)]
    np.testing.assert_allclose(np.array(found)[[0, 1, 2, 3, 30, 31]], wanted, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: a - b, before, host(state.params))
    assert largest(moved, host(jax.grad(loss)(before, rows))) < 1e-5


@pytest.mark.parametrize("split", SPLITS)
def test_rows_that_an_objective_tells_are_those_of_the_first_pass(split):
    """With the dropout of the step, in the batch's order, at w and elsewhere."""

    def update(grads, state, params=None, *, losses_fn, row_losses, **_):
        there = jax.tree.map(lambda w: 1.5 * w, params)
        return grads, {"first": row_losses, "again": losses_fn(params), "there": losses_fn(there)}

    names = ("first", "again", "there")
    tx = optax.GradientTransformationExtraArgs(
        lambda _: {name: jnp.zeros(toy.ROWS) for name in names}, update
    )
    shape, microbatches = SPLITS[split]
    plan = None if shape is None else mesh.plan(shape, toy.RULES)
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan)
    before, key = host(state.params), jax.random.fold_in(state.rng, 0)
    batch = toy.batch()
    batch["label_mask"][3] = 0.0  # a row without a label
    state, _ = step.make(toy.told, tx, plan, microbatches=microbatches)(state, batch)

    def wanted(params):
        out = np.zeros(toy.ROWS)
        for part in range(microbatches):
            rows = slice(part, None, microbatches)
            mine = {name: value[rows] for name, value in batch.items()}
            total, weight = toy.told(params, mine, jax.random.fold_in(key, part)).rows
            out[rows] = np.where(weight > 0, total / np.maximum(weight, 1), np.nan)
        return out

    found = host(state.opt_state)
    np.testing.assert_allclose(found["first"], wanted(before), rtol=1e-5)
    np.testing.assert_allclose(found["again"], found["first"], rtol=1e-6)
    far = jax.tree.map(lambda w: 1.5 * w, before)
    np.testing.assert_allclose(found["there"], wanted(far), rtol=1e-5)
    assert np.flatnonzero(np.isnan(found["first"])).tolist() == [3]


def test_rows_of_another_number_are_refused():
    def tokens(params, batch, key):
        out = toy.told(params, batch, key)
        return out._replace(rows=tuple(jnp.repeat(part, 2) for part in out.rows))

    state = step.init(jax.random.key(0), toy.MODEL, optax.sgd(0.1))
    with pytest.raises(ValueError, match="for each of the 32 rows of the batch, got 64"):
        step.make(tokens, optax.sgd(0.1))(state, toy.batch())


def test_rows_that_an_objective_does_not_tell_are_none():
    def update(grads, state, params=None, *, row_losses, **_):
        assert row_losses is None
        return grads, state

    tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    step.make(toy.ce, tx)(state, toy.batch())


def test_chosen_rows_cost_their_share_of_a_gradient():
    def flops(count):
        def update(grads, state, params=None, *, subset_grad_fn, **_):
            return (grads if count is None else subset_grad_fn(params, jnp.arange(count))), state

        tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
        state = step.init(jax.random.key(0), toy.MODEL, tx)
        return step.make(toy.ce, tx).compile(state, toy.batch()).cost_analysis()["flops"]

    assert flops(8) - flops(None) < 0.4 * flops(None)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_rows_without_a_weight_have_no_loss(microbatches):
    """NaN and not 0, which would be larger than a loss that fell: transforms choose them last."""

    def update(grads, state, params=None, *, losses_fn, **_):
        return grads, losses_fn(params)

    tx = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(toy.ROWS), update)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    batch = toy.batch()
    batch["label_mask"][[3, 8]] = 0.0
    state, _ = step.make(toy.ce, tx, microbatches=microbatches)(state, batch)
    assert np.flatnonzero(np.isnan(state.opt_state)).tolist() == [3, 8]
