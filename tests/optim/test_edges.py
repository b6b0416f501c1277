"""Sharpness-aware transforms at their edges: radii of 0 and below, injected numbers, overflow,
what stands around them in a chain, and arguments of the wrong kind."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import perturbation
from steppe.train.types import Climb

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, -0.5])}
CURVATURE = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([5.0, 6.0])}
SGD = optax.sgd(0.1)


def grad(w: Any) -> Any:
    """Gradient of 1/2 sum c w^2."""
    return jax.tree.map(lambda c, w: c * w, CURVATURE, w)


def losses_fn(w: Any) -> jax.Array:
    return jnp.stack([w["bias"].sum(), w["kernel"].sum()])


FUNCTIONS = {
    "grad_fn": grad,
    "losses_fn": losses_fn,
    "subset_grad_fn": lambda w, rows: jax.tree.map(lambda g: g * (1.0 + rows[0]), grad(w)),
}


def run(tx: Any, steps: int = 3, first: Callable[[Any], Any] = grad, grad_fn: Any = grad) -> Any:
    """Parameters after some updates, and the last state, in one compiled loop."""

    @jax.jit
    def loop(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(first(params), state, params, **FUNCTIONS | {
                "grad_fn": grad_fn
            })  # fmt: skip
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), None, length=steps)[0]

    return loop(PARAMS)


def same(left: Any, right: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_looksam_at_a_radius_of_0_is_the_base_and_keeps_no_rounding() -> None:
    """The second gradient differs from the first in the last places only: that is no direction."""

    def rounded(w: Any) -> Any:
        return jax.tree.map(lambda g: g * (1 + 1e-7 * jnp.sign(jnp.sin(1e4 * g))), grad(w))

    plain = run(SGD, 4, grad_fn=rounded)[0]
    for rho in (optax.constant_schedule(0.0), optax.constant_schedule(1e-9)):
        found, state = run(optim.looksam(SGD, rho, every=2), 4, grad_fn=rounded)
        same(found, plain)
        assert all(not x.any() for x in jax.tree.leaves(state.direction))
    # In between, too: what was kept while rho was above 0 is not used while it is 0.
    rho = lambda t: jnp.where(t < 1, 0.1, 0.0)  # noqa: E731
    one = run(optim.looksam(SGD, 0.1, every=3), 1)[0]
    found, _ = run(optim.looksam(SGD, rho, every=3), 2)
    same(found, jax.tree.map(lambda w, g: w - 0.1 * g, one, grad(one)))


INJECTED = {
    "sam": (optim.sam, {}, ()),
    "asam": (optim.asam, {"eta": 0.02}, ()),
    "gsam": (optim.gsam, {"alpha": 0.3}, ()),
    "looksam": (optim.looksam, {"every": 2, "alpha": 0.6}, ()),
    "fsam": (
        optim.fsam,
        {"keep_ratio": 0.5, "refresh_every": 2},
        ("keep_ratio", "plain_refresh"),
    ),
    "esam": (optim.esam, {"beta": 0.5, "gamma": 0.5}, ("beta", "gamma", "seed")),
}


@pytest.mark.parametrize("name", INJECTED)
def test_every_method_with_injected_numbers(name: str) -> None:
    make, options, static = INJECTED[name]
    tx = optax.inject_hyperparams(make, static_args=static)(SGD, rho=0.1, **options)
    found, state = run(tx)
    same(found, run(make(SGD, 0.1, **options))[0])
    assert set(state.hyperparams) >= {"rho"}
    if static:  # the error says how
        tx = optax.inject_hyperparams(make)(SGD, rho=0.1, **options)
        with pytest.raises(ValueError, match=rf"{static[0]} .*static_args=\('{static[0]}',\)"):
            run(tx)


def test_a_large_gradient_does_not_hold_the_mask_back() -> None:
    """Squares that are finite one by one may overflow in their sum."""
    tx = optim.fsam(SGD, 0.1, keep_ratio=0.5)
    huge = jax.tree.map(lambda g: g * 1e18, grad(PARAMS))
    _, state = run(tx, 1, first=lambda _: huge)
    assert int(state.age) == 1
    assert sum(int(m.sum()) for m in jax.tree.leaves(state.mask)) == 3


@pytest.mark.parametrize("make", [optim.gsam, optim.looksam])
def test_methods_that_compare_both_gradients_refuse_a_cheaper_first_one(make: Any) -> None:
    tx = make(SGD, 0.1)
    with pytest.raises(ValueError, match=r"compares .*leave out ascent="):
        tx.update(
            grad(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=grad, ascent=Climb(grad(PARAMS), grad)
        )


@pytest.mark.parametrize("method", ["sam", "looksam", "fsam"])
def test_a_schedule_below_0_is_seen_at_once(method: str) -> None:
    make = getattr(optim, method)
    if method == "fsam":  # a tenth of six entries is none, and then nothing is perturbed
        make = functools.partial(make, keep_ratio=0.5)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rho must be .* at step 0"):
            make(SGD, optax.constant_schedule(wrong))
    with pytest.raises(ValueError, match=r"schedule must give a scalar, got shape \(2,\)"):
        make(SGD, lambda step: jnp.ones(2) * step)
    # Later it shows in the parameters.
    found, _ = run(make(SGD, lambda t: 0.1 - 0.2 * t), 2)
    assert any(np.isnan(x).any() for x in jax.tree.leaves(found))
    tx = optax.inject_hyperparams(make, static_args=INJECTED[method][2])(SGD, rho=0.1)
    state = tx.init(PARAMS)
    state.hyperparams["rho"] = jnp.float32(-0.1)
    updates, _ = jax.jit(lambda s: tx.update(grad(PARAMS), s, PARAMS, grad_fn=grad))(state)
    assert any(np.isnan(x).any() for x in jax.tree.leaves(updates))


def test_rho_that_follows_a_rate_stays_in_its_range() -> None:
    rate = optax.linear_schedule(2e-3, 0.0, 10)
    rho = optim.rho_like(rate, 1e-4, 1e-3, rho_min=0.001, rho_max=0.1)
    assert float(rho(0)) == pytest.approx(0.1)
    assert float(rho(10)) == pytest.approx(0.001)
    assert float(rho(7)) == pytest.approx(0.001 + 0.099 * (rate(7) - 1e-4) / 9e-4)
    with pytest.raises(TypeError, match="learning_rate must be a schedule"):
        optim.rho_like(1e-3, 1e-5, 1e-4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rho_max must be .* >= rho_min"):
        optim.rho_like(rate, 1e-4, 1e-3, rho_min=0.1, rho_max=0.01)


def test_what_masks_the_gradient_stands_inside() -> None:
    """Before SAM a mask only turns e; inside it is the second gradient that is masked."""
    select = optim.selective_gradient(0.0, float("inf"), lambda path: path == "kernel")
    inside = optim.sam(optax.chain(select, SGD), 0.1)
    before = optax.chain(select, optim.sam(SGD, 0.1))

    def masked(tx: Any, place: Callable[[Any], Any]) -> Any:
        state = tx.init(PARAMS)
        off = jax.tree.map(jnp.zeros_like, place(state).mask)
        state = jax.tree.map(lambda x: x, state)
        seen = []

        def only(node: Any) -> Any:
            return isinstance(node, type(place(state)))

        state = jax.tree.map(lambda n: n._replace(mask=off) if only(n) else n, state, is_leaf=only)
        updates, _ = jax.jit(lambda s: tx.update(grad(PARAMS), s, PARAMS, grad_fn=grad))(state)
        seen.append(updates)
        return seen[0]

    found = masked(inside, lambda s: s.base[0])
    assert not found["kernel"].any()
    ball = perturbation.l2()(grad(PARAMS), PARAMS, 0.1)
    wanted = grad(perturbation.displace(PARAMS, ball))
    np.testing.assert_allclose(found["bias"], -0.1 * wanted["bias"], rtol=1e-6)
    assert masked(before, lambda s: s[0])["kernel"].all()


def test_leaves_without_entries() -> None:
    """A head that is yet to come, a table of no rows: nothing to choose, nothing to divide by."""
    params = {
        "empty": jnp.zeros((0, 3)),
        "flat": jnp.zeros((0, 4)),
        "layers": {"none": jnp.zeros((2, 0, 4))},
        "w": jnp.arange(1.0, 9.0).reshape(2, 4),
    }
    for structure in ("element", "tensor", "layer", (2, 4)):
        tx = optim.fsam(SGD, 0.1, keep_ratio=0.5, structure=structure)  # type: ignore[arg-type]
        updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda w: w)
        assert updates["empty"].shape == (0, 3)
        assert bool(jnp.isfinite(updates["w"]).all())


@pytest.mark.parametrize("method", [optim.sam, optim.asam, optim.gsam, optim.looksam, optim.fsam])
@pytest.mark.parametrize("rho", [0.1, jnp.float32(0.1), lambda step: 0.1])
def test_a_second_gradient_of_another_precision(method: Any, rho: Any) -> None:
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)

    def precise(w: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grad(w))

    tx = method(SGD, rho)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grad(params))
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=precise)
    # At this radius the second gradient differs from the first by a few hundredths of it.
    same(jax.tree.map(jnp.float32, updates), jax.tree.map(lambda g: -0.1 * g, grad(PARAMS)), 0.2)
    updates, _ = tx.update(grads, state, params, grad_fn=precise)  # looksam's other branch
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    if method is optim.fsam:
        tx = method(SGD, rho, plain_refresh=True)
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=precise)
        same(updates, SGD.update(grads, SGD.init(params))[0])


def test_what_looksam_keeps_is_not_rounded() -> None:
    """The direction is formed of what grad_fn returns; bfloat16 is for the base alone."""
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grad(params))

    def precise(w: Any) -> Any:
        return jax.tree.map(lambda g: 1.001 * g.astype(jnp.float32), grads)

    tx = optim.looksam(SGD, 0.1)
    _, state = tx.update(grads, tx.init(params), params, grad_fn=precise)
    assert not any(v.any() for v in jax.tree.leaves(state.direction))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("method", [optim.sam, optim.asam, optim.gsam, optim.looksam, optim.fsam])
def test_moments_of_the_base_survive_a_bad_step_where_it_is_guarded(
    method: Any, outside: bool
) -> None:
    adam = optax.adam(0.1)
    tx = method(adam if outside else optax.apply_if_finite(adam, 2), 0.1)
    tx = optax.apply_if_finite(tx, 2) if outside else tx

    @jax.jit
    def update(scale: Any, state: Any) -> Any:
        scaled = lambda w: jax.tree.map(lambda g: scale * g, grad(w))  # noqa: E731
        return tx.update(scaled(PARAMS), state, PARAMS, grad_fn=scaled)

    updates, state = update(jnp.nan, tx.init(PARAMS))
    same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, state = update(1.0, state)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert all(x.any() for x in jax.tree.leaves(updates))
