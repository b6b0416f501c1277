"""Flooding as a transform: the flooded loss under any optimiser, whole batches, SAM, bad input."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.optim.flooding import flooding
from steppe.optim.perturbation import displace, l2
from steppe.optim.sam import sam
from steppe.train import mesh, step
from steppe.train.flooding import flood

TOY = Path(__file__).parents[1] / "train" / "programs" / "toy.py"
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 2, 16), jnp.float32)
LEVEL = 0.7
PARAMS = {"w": jnp.asarray(RNG.normal(size=5), jnp.float32), "b": jnp.float32(0.1)}


def loss(params: Any) -> jax.Array:
    logits = jnp.tanh(X @ params["w"]) * 3 + params["b"]
    return optax.sigmoid_binary_cross_entropy(logits, Y).mean()


def trajectory(tx: Any, objective: Any, steps: int) -> tuple[Any, Any]:
    """Parameters [steps, ...] and plain losses [steps]; ``value`` is the plain loss."""

    @jax.jit
    def loop(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(
                jax.grad(objective)(params),
                state,
                params,
                value=loss(params),
                grad_fn=jax.grad(objective),
            )
            params = optax.apply_updates(params, updates)
            return (params, state), (params, loss(params))

        return jax.lax.scan(body, (params, tx.init(params)), None, length=steps)[1]

    return loop(PARAMS)


@pytest.mark.parametrize("base", [optax.sgd(0.5), optax.adam(0.15)], ids=["sgd", "adam"])
def test_it_equals_the_flooded_loss_along_a_trajectory(base: Any) -> None:
    ours, losses = trajectory(optax.chain(flooding(LEVEL), base), loss, 60)
    theirs, _ = trajectory(optax.with_extra_args_support(base), lambda p: flood(loss(p), LEVEL), 60)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Two programs, which round apart; Adam divides that by small moments.
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=5e-7)
    assert losses.min() < LEVEL < losses[0]  # both branches were taken


def test_level_0_is_plain_and_a_huge_level_is_ascent() -> None:
    sgd = optax.with_extra_args_support(optax.sgd(0.1))
    plain, losses = trajectory(sgd, loss, 5)
    zero, _ = trajectory(optax.chain(flooding(0.0), sgd), loss, 5)
    jax.tree.map(np.testing.assert_array_equal, zero, plain)
    up, climbed = trajectory(optax.chain(flooding(1e6), sgd), loss, 5)
    away, _ = trajectory(sgd, lambda p: -loss(p), 5)
    jax.tree.map(np.testing.assert_array_equal, up, away)
    assert climbed[-1] > climbed[0] > losses[0]


def test_sign_at_the_level_and_for_no_number() -> None:
    tx = flooding(0.5)
    grads = {"a": jnp.array([1.0, -2.0], jnp.bfloat16)}
    for value, wanted in ((1.0, [1.0, -2.0]), (0.5, [0.0, 0.0]), (0.1, [-1.0, 2.0])):
        updates, _ = tx.update(grads, tx.init(grads), value=jnp.float32(value))
        assert updates["a"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(updates["a"], np.float32), wanted)
    updates, state = tx.update(grads, tx.init(grads), value=jnp.nan)
    assert np.isnan(np.asarray(updates["a"], np.float32)).all()
    updates, _ = tx.update(grads, state, value=1.0)  # nothing of it is left in the state
    assert np.isfinite(np.asarray(updates["a"], np.float32)).all()


def test_a_level_can_be_injected() -> None:
    tx = optax.inject_hyperparams(flooding)(level=0.3)
    state = tx.init(PARAMS)
    state.hyperparams["level"] = jnp.float32(9.0)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS, value=1.0)
    np.testing.assert_array_equal(updates["w"], -PARAMS["w"])


def test_flooded_sam_is_flooding_inside_of_sam() -> None:
    grad = jax.jit(jax.grad(loss))
    sharp = grad(displace(PARAMS, l2()(grad(PARAMS), PARAMS, 0.1)))
    above, below = float(loss(PARAMS)) - 0.1, float(loss(PARAMS)) + 0.1
    for level, sign in ((above, -1.0), (below, 1.0)):
        tx = sam(optax.chain(flooding(level), optax.sgd(1.0)), 0.1)
        updates, _ = tx.update(
            grad(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=grad, value=loss(PARAMS)
        )
        for u, s in zip(jax.tree.leaves(updates), jax.tree.leaves(sharp), strict=True):
            np.testing.assert_allclose(u, sign * s, rtol=1e-6)
    # The other order goes on downhill below the level.
    _, inside = trajectory(sam(optax.chain(flooding(LEVEL), optax.sgd(0.5)), 0.05), loss, 200)
    _, outside = trajectory(optax.chain(flooding(LEVEL), sam(optax.sgd(0.5), 0.05)), loss, 200)
    assert abs(float(inside[-50:].mean()) - LEVEL) < 0.05
    assert float(outside[-1]) < LEVEL - 0.05


def test_whole_batches_on_a_mesh_and_in_micro_batches() -> None:
    """The level is compared with the loss of the global batch, not with that of a part."""
    toy = SimpleNamespace(**runpy.run_path(str(TOY)))
    batch = toy.batch(0)
    # Rows of one loss and rows of another: the halves lie on both sides of the mean.
    start = toy.init(jax.random.key(0))
    level = None
    found = {}
    for name, shape, parts in (("one", None, 1), ("mesh", {"data": 8}, 2)):
        plan = None if shape is None else mesh.plan(shape, toy.RULES)
        if level is None:
            out = toy.ce(start, {k: jnp.asarray(v) for k, v in batch.items()}, None)
            level = float(out.total / out.weight) + 0.02
        tx = optax.chain(flooding(level), optax.sgd(1.0))
        state = step.init(jax.random.key(0), toy.MODEL, tx, plan, params=start)
        train = step.make(toy.ce, tx, plan, microbatches=parts)
        state, _ = train(state, batch)
        found[name] = jax.tree.map(np.array, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found.values())

    # Flooding each device's own mean is another update.
    def of_rows(params: Any, rows: slice) -> jax.Array:
        out = toy.ce(params, {k: jnp.asarray(v[rows]) for k, v in batch.items()}, None)
        return flood(out.total / out.weight, level)

    parts_ = [slice(i, i + toy.ROWS // 8) for i in range(0, toy.ROWS, toy.ROWS // 8)]
    grads = jax.grad(lambda p: sum(of_rows(p, r) for r in parts_) / 8)(start)
    apart = jax.tree.map(lambda w, g, n: np.abs(w - g - n).max(), start, grads, found["one"])
    assert max(jax.tree.leaves(apart)) > 0.01


BAD = {
    "negative": (lambda: flooding(-0.1), "level must be a finite number >= 0, got -0.1"),
    "nan": (lambda: flooding(float("nan")), "level must be a finite number"),
    "word": (lambda: flooding("low"), "level must be a finite number >= 0, got 'low'"),
    "no value": (
        lambda: flooding(0.1).update(PARAMS, optax.EmptyState(), PARAMS),
        "flooding needs value, the mean loss",
    ),
    "losses": (
        lambda: flooding(0.1).update(PARAMS, optax.EmptyState(), PARAMS, value=jnp.ones(3)),
        r"value must be the mean loss, a scalar, got shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
