"""ESAM: one step against numpy, SAM at its limits, the rows it chooses, the mean of its draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.optim.esam import _drop, esam, sharpest_rows
from steppe.optim.keys import key_words
from steppe.optim.sam import sam

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=8), jnp.float32)
PARAMS = {
    "layers": {"kernel": jnp.asarray(RNG.normal(size=(3, 4, 4)) * 0.5, jnp.float32)},
    "out": jnp.asarray(RNG.normal(size=4), jnp.float32),
}
SGD = optax.sgd(1.0)
ADAMW = optax.adamw(1e-2)


def losses_fn(params: Any) -> jax.Array:
    x = X
    for layer in range(3):
        x = jnp.tanh(x @ params["layers"]["kernel"][layer])
    return 0.5 * (x @ params["out"] - Y) ** 2


GRAD = jax.jit(jax.grad(lambda p: losses_fn(p).mean()))


@jax.jit
def subset_grad_fn(params: Any, rows: jax.Array) -> Any:
    return jax.grad(lambda p: losses_fn(p)[rows].mean())(params)


FUNCTIONS = {"grad_fn": GRAD, "losses_fn": losses_fn, "subset_grad_fn": subset_grad_fn}


def run(tx: Any, steps: int = 10, start: int = 0, state: Any = None, params: Any = PARAMS) -> Any:
    """``steps`` updates in one compiled loop."""

    @jax.jit
    def loop(params: Any, state: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(GRAD(params), state, params, **FUNCTIONS)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), None, length=steps)[0]

    return loop(params, tx.init(params) if state is None else state)


def same(left: Any, right: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_one_step_of_a_linear_model_against_numpy() -> None:
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    w = np.asarray(PARAMS["out"], np.float64)
    losses = lambda w: 0.5 * (x @ w - y) ** 2  # noqa: E731
    g = ((x @ w - y)[:, None] * x).mean(0)
    e = 0.3 * g / np.linalg.norm(g)
    rows = np.sort(np.argsort(-(losses(w + e) - losses(w)), kind="stable")[:3])
    wanted = ((x @ (w + e) - y)[rows, None] * x[rows]).mean(0)

    fn = lambda p: 0.5 * (X @ p["w"] - Y) ** 2  # noqa: E731
    tx = esam(SGD, 0.3, beta=1.0, gamma=0.4)  # int(3.2) rows
    params = {"w": PARAMS["out"]}
    chosen = []

    def subset(p: Any, rows: jax.Array) -> Any:
        chosen.append(np.asarray(rows))
        return jax.grad(lambda p: fn(p)[rows].mean())(p)

    updates, _ = tx.update(
        {"w": jnp.asarray(g, jnp.float32)},
        tx.init(params),
        params,
        grad_fn=GRAD,
        losses_fn=fn,
        subset_grad_fn=subset,
    )
    np.testing.assert_array_equal(chosen[0], rows)
    np.testing.assert_allclose(-updates["w"], wanted, rtol=1e-5)


def test_with_everything_kept_it_is_sam_and_at_rho_0_the_base() -> None:
    same(run(esam(ADAMW, 0.1, beta=1, gamma=1))[0], run(sam(ADAMW, 0.1))[0])
    base = run(optax.with_extra_args_support(ADAMW))[0]
    same(run(esam(ADAMW, 0.0))[0], base)
    same(run(esam(ADAMW, optax.constant_schedule(0.0)))[0], base, 1e-6)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), run(esam(ADAMW, 0.1))[0], base)
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_the_rows_that_rose_most_and_ties_and_nan() -> None:
    before = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    after = jnp.array([1.5, 9.0, jnp.nan, 1.5, 0.0, 2.0])
    assert sharpest_rows(before, after, 0.5).tolist() == [0, 1, 5]
    assert sharpest_rows(before, after, 0.01).tolist() == [1]
    assert sharpest_rows(before, after, 1.0).tolist() == [0, 1, 2, 3, 4, 5]
    # What counts is the rise, not the loss.
    assert sharpest_rows(jnp.array([9.0, 1.0]), jnp.array([9.5, 3.0]), 0.5).tolist() == [1]


def test_whole_tensors_are_dropped_and_the_mean_is_sams() -> None:
    e = jax.tree.map(jnp.ones_like, PARAMS)
    words = key_words(3)
    draw = jax.jit(jax.vmap(lambda step: _drop(e, 0.4, words, step)))
    drawn = draw(jnp.arange(4000))
    kernel = np.asarray(drawn["layers"]["kernel"])
    per_layer = kernel.reshape(4000, 3, 16)
    np.testing.assert_array_equal(per_layer, per_layer[:, :, :1] * np.ones(16))
    np.testing.assert_allclose(np.unique(kernel), [0, 2.5])
    tensors = np.concatenate([per_layer[:, :, 0], np.asarray(drawn["out"])[:, :1]], axis=1)
    # 4 tensors, mean 1, standard deviation sqrt((1 - 0.4) / 0.4 / 4000).
    np.testing.assert_allclose(tensors.mean(0), 1.0, atol=3 * (1.5 / 4000) ** 0.5)
    # Layers and leaves are drawn apart: no two columns agree more often than chance.
    agree = np.corrcoef(tensors.T)[np.triu_indices(4, 1)]
    assert np.abs(agree).max() < 0.06


def test_a_state_goes_on_where_it_was_and_seeds_differ() -> None:
    tx = esam(ADAMW, 0.1)
    whole = run(tx, 6)
    half = run(tx, 3)
    rest = run(tx, 3, state=jax.tree.map(jnp.asarray, half[1]), params=half[0])
    same(rest, whole)
    other = run(esam(ADAMW, 0.1, seed=jax.random.key(1)), 6)
    assert float(jnp.abs(other[0]["out"] - whole[0]["out"]).max()) > 1e-5
    # The draws of a leaf do not depend on which other leaves there are.
    steps = jnp.int32(5)
    alone = _drop({"out": PARAMS["out"]}, 0.5, half[1].key, steps)
    same(alone["out"], _drop(PARAMS, 0.5, half[1].key, steps)["out"])


def test_a_zero_gradient_and_a_bad_step() -> None:
    tx = esam(SGD, 0.1)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = tx.update(zero, tx.init(PARAMS), PARAMS, **FUNCTIONS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, state = tx.update(bad, state, PARAMS, **FUNCTIONS)
    updates, state = tx.update(GRAD(PARAMS), state, PARAMS, **FUNCTIONS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_losses_that_are_there_already_save_a_pass() -> None:
    """``row_losses`` take the place of the losses at w, and choose the same rows."""
    calls = []

    def counted(params: Any) -> jax.Array:
        calls.append(1)
        return losses_fn(params)

    tx = esam(SGD, 0.3, gamma=0.25)
    wanted, _ = tx.update(GRAD(PARAMS), tx.init(PARAMS), PARAMS, **FUNCTIONS)
    given = FUNCTIONS | {"losses_fn": counted}
    found, _ = tx.update(
        GRAD(PARAMS), tx.init(PARAMS), PARAMS, row_losses=losses_fn(PARAMS), **given
    )
    assert len(calls) == 1
    same(found, wanted)
    # They are read: where the first rows seem to have been at 0, those rose most.
    low = losses_fn(PARAMS).at[:2].set(-1e3)
    rows: list[Any] = []

    def subset(params: Any, chosen: jax.Array) -> Any:
        rows.append(chosen.tolist())
        return subset_grad_fn(params, chosen)

    tx.update(
        GRAD(PARAMS),
        tx.init(PARAMS),
        PARAMS,
        row_losses=low,
        **given | {"subset_grad_fn": subset},
    )
    assert rows == [[0, 1]]


def test_the_base_gets_what_it_may_ask_for() -> None:
    seen: dict[str, Any] = {}

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return grads, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = esam(inner, 0.1)
    tx.update(GRAD(PARAMS), tx.init(PARAMS), PARAMS, value=jnp.float32(2), **FUNCTIONS)
    assert set(seen) == {"grad_fn", "losses_fn", "subset_grad_fn", "value"}


BAD = {
    "beta": (lambda: esam(SGD, beta=0.0), r"beta must be in \(0, 1\], got 0.0"),
    "gamma": (lambda: esam(SGD, gamma=1.5), r"gamma must be in \(0, 1\], got 1.5"),
    "beta true": (lambda: esam(SGD, beta=True), "beta must be in"),
    "beta of words": (lambda: esam(SGD, beta="x"), "beta must be in .* got 'x'"),
    "gamma nan": (lambda: esam(SGD, gamma=float("nan")), "gamma must be in"),
    "rho": (lambda: esam(SGD, -0.1), "rho must be a finite number >= 0"),
    "no grad_fn": (lambda: esam(SGD).update(PARAMS, esam(SGD).init(PARAMS), PARAMS), "grad_fn"),
    "no losses_fn": (
        lambda: esam(SGD).update(PARAMS, esam(SGD).init(PARAMS), PARAMS, grad_fn=GRAD),
        "gamma=0.5 needs losses_fn",
    ),
    "losses": (
        lambda: sharpest_rows(jnp.zeros(()), jnp.zeros(()), 0.5),
        r"one loss a row, \[B\], got shapes \(\) and \(\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_base_or_seed_of_another_kind() -> None:
    with pytest.raises(TypeError, match="optax transform"):
        esam(None, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an integer or a key"):
        esam(SGD, seed=0.5)
