"""Groups that climb by themselves, cheaper first gradients and MultiSteps, by hand: what the
transforms do with what ``update`` is given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import perturbation
from steppe.train.types import Climb

ROWS = 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(ROWS, 4)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(ROWS, 3)), jnp.float32)
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=(4, 5)) * 0.5, jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(5, 3)) * 0.5, jnp.float32),
}
SGD = optax.sgd(0.1)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def gradient(rows: slice = slice(None)) -> Any:
    return lambda params: jax.grad(loss)(params, X[rows], Y[rows])


def same(left: Any, right: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def by_groups(params: Any, displaced: Any, size: Any) -> Any:
    """``group_fn`` over consecutive rows, for losses that are means over equal groups."""
    parts = [gradient(slice(i, i + size)) for i in range(0, ROWS, size)]
    each = [part(displaced(params, part(params))) for part in parts]
    return jax.tree.map(lambda *g: sum(g) / len(parts), *each)


def test_a_transform_with_groups_hands_its_ball_to_group_fn() -> None:
    tx = optim.sam(SGD, 0.1, ascent=2)
    whole = gradient()
    updates, _ = tx.update(
        whole(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=whole, group_fn=by_groups
    )
    ball = perturbation.l2()
    wanted = by_groups(PARAMS, lambda w, g: perturbation.displace(w, ball(g, w, 0.1)), 2)
    same(updates, jax.tree.map(lambda g: -0.1 * g, wanted))
    # Without a radius there are no groups, and nothing is needed for them.
    tx = optim.sam(SGD, 0.0, ascent=2)
    updates, _ = tx.update(whole(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=whole)
    same(updates, jax.tree.map(lambda g: -0.1 * g, whole(PARAMS)), 0)


@pytest.mark.parametrize("make", [optim.sam, optim.asam, optim.fsam])
def test_a_given_direction_takes_the_place_of_the_gradient(make: Any) -> None:
    """``grads`` is NaN here: a transform that read it would show it."""
    part, whole = gradient(slice(0, 4)), gradient()
    tx = make(SGD, 0.1)
    nothing = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    updates, _ = tx.update(
        nothing,
        tx.init(PARAMS),
        PARAMS,
        grad_fn=whole,
        ascent=Climb(part(PARAMS), whole),
    )
    wanted, _ = tx.update(part(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=whole)
    same(updates, wanted)


def test_where_a_scheduled_rho_is_zero_the_whole_gradient_is_taken() -> None:
    whole = gradient()
    nothing = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    climb = Climb(gradient(slice(0, 2))(PARAMS), whole)
    tx = optim.sam(SGD, optax.constant_schedule(0.0))
    updates, _ = tx.update(nothing, tx.init(PARAMS), PARAMS, grad_fn=whole, ascent=climb)
    same(updates, jax.tree.map(lambda g: -0.1 * g, whole(PARAMS)))


def test_the_base_does_not_climb_by_what_the_outer_transform_was_given() -> None:
    seen = []

    def look(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        seen.append(sorted(extra))
        return grads, state

    base = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), look)
    whole = gradient()
    for make in (optim.sam, optim.asam, optim.fsam):
        tx = make(base, 0.1)
        tx.update(
            whole(PARAMS), tx.init(PARAMS), PARAMS,
            grad_fn=whole, value=1.0, ascent=Climb(whole(PARAMS), whole),
        )  # fmt: skip
    assert all("ascent" not in names and "value" in names for names in seen)


def test_multisteps_inside_is_a_group_a_batch() -> None:
    """``sam(MultiSteps(base, k))`` over k batches is one step of ``sam(base, ascent=rows)``."""
    tx = optim.sam(optax.MultiSteps(optax.adam(0.1), 4), 0.1)
    params, state = PARAMS, tx.init(PARAMS)
    for start in range(0, ROWS, 2):
        part = gradient(slice(start, start + 2))
        updates, state = tx.update(part(params), state, params, grad_fn=part)
        params = optax.apply_updates(params, updates)
    grouped = optim.sam(optax.adam(0.1), 0.1, ascent=2)
    whole = gradient()
    updates, _ = grouped.update(
        whole(PARAMS), grouped.init(PARAMS), PARAMS, grad_fn=whole, group_fn=by_groups
    )
    same(params, optax.apply_updates(PARAMS, updates), 1e-5)


def test_multisteps_outside_takes_the_second_gradient_of_the_last_batch() -> None:
    """Why it is refused: what optax does with it, called by hand with each batch's grad_fn."""
    tx = optax.MultiSteps(optim.sam(SGD, 0.1), 2)
    state = tx.init(PARAMS)
    halves = [gradient(slice(0, 4)), gradient(slice(4, 8))]
    for part in halves:
        updates, state = tx.update(part(PARAMS), state, PARAMS, grad_fn=part)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(part(PARAMS) for part in halves))
    there = perturbation.displace(PARAMS, perturbation.l2()(mean, PARAMS, 0.1))
    same(updates, jax.tree.map(lambda g: -0.1 * g, halves[1](there)))
    # It is right with a grad_fn that covers all of them.
    state, whole = tx.init(PARAMS), gradient()
    for part in halves:
        updates, state = tx.update(part(PARAMS), state, PARAMS, grad_fn=whole)
    same(updates, jax.tree.map(lambda g: -0.1 * g, whole(there)))
    assert int(state.inner_opt_state.steps) == 1


def test_multisteps_outside_is_refused_where_it_drops_grad_fn() -> None:
    tx = optax.with_extra_args_support(optax.MultiSteps(optim.sam(SGD, 0.1), 2))
    whole = gradient()
    with pytest.raises(ValueError, match=r"microbatches=k.*sam\(optax\.MultiSteps\(base, k\)\)"):
        tx.update(whole(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=whole)


@pytest.mark.parametrize("wrong", ["devices", 0, -1, 2.0, True, None])
def test_another_ascent_is_named(wrong: Any) -> None:
    for make in (optim.sam, optim.asam, optim.gsam):
        with pytest.raises(ValueError, match="ascent must be 'global', 'device' or a number"):
            make(SGD, 0.1, ascent=wrong)


def test_groups_without_what_they_need() -> None:
    whole = gradient()
    tx = optim.sam(SGD, 0.1, ascent="device")
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs group_fn.*train\.step\.make does so"):
        tx.update(whole(PARAMS), state, PARAMS, grad_fn=whole)
    with pytest.raises(ValueError, match="leave out ascent="):
        tx.update(
            whole(PARAMS), state, PARAMS,
            grad_fn=whole, group_fn=by_groups, ascent=Climb(whole(PARAMS), whole),
        )  # fmt: skip
