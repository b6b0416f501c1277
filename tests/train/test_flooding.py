"""The flooded loss, gradient accordance and the level that it suggests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train import flooding as f

RNG = np.random.default_rng(0)


def test_the_flooded_loss_and_its_gradient() -> None:
    losses = jnp.linspace(0.0, 2.0, 41)
    flooded = jax.vmap(lambda x: f.flood(x, 0.5))(losses)
    assert (flooded >= 0.5).all()
    above = losses >= 0.5
    np.testing.assert_allclose(flooded[above], losses[above], atol=1e-7)
    np.testing.assert_allclose(flooded[~above], 1.0 - losses[~above], atol=1e-7)
    np.testing.assert_array_equal(f.flood_per_example(losses, 0.5), flooded)

    def flooded_quadratic(w: Any) -> jax.Array:
        return f.flood(0.5 * (w**2).sum(), 0.5)

    for scale, sign in ((2.0, 1.0), (0.5, -1.0)):
        w = jnp.array([0.3, -0.7]) * scale
        g = jax.grad(flooded_quadratic)(w)
        np.testing.assert_allclose(g, sign * w, rtol=1e-6)
        for i in range(2):
            h = jnp.zeros(2).at[i].set(1e-2)
            slope = (flooded_quadratic(w + h) - flooded_quadratic(w - h)) / 2e-2
            np.testing.assert_allclose(slope, g[i], atol=1e-4)
    assert float(jax.grad(f.flood)(0.5, 0.5)) == 0.0
    # bf16 is too coarse near the level: the loss is compared in float32.
    assert f.flood(jnp.bfloat16(1.0), 0.5).dtype == jnp.float32


@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_a_quadratic_oscillates_around_the_level(rate: float) -> None:
    level = 0.3

    def run(flooded: bool) -> jax.Array:
        def loss(w: Any) -> jax.Array:
            plain = 0.5 * w**2
            return f.flood(plain, level) if flooded else plain

        def body(w: Any, _: None) -> Any:
            w = w - rate * jax.grad(loss)(w)
            return w, 0.5 * w**2

        return jax.lax.scan(body, jnp.float32(2.0), None, length=1000)[1]

    tail = run(True)[-100:]
    # One step changes the loss by rate * w^2 = 2 rate * loss, and little more.
    assert float(jnp.abs(tail - level).max()) < 2.5 * rate * level
    assert float(tail.min()) < level < float(tail.max())
    assert float(run(False)[-1]) < 1e-6


def stacked(count: int = 5) -> Any:
    return {
        "a": jnp.asarray(RNG.normal(size=(count, 3, 4)), jnp.float32),
        "b": jnp.asarray(RNG.normal(size=(count, 6)) * 3, jnp.float32),
    }


def test_accordance_against_a_loop() -> None:
    grads = stacked()
    flat = np.concatenate([np.reshape(x, (5, -1)) for x in jax.tree.leaves(grads)], 1)
    flat = flat.astype(np.float64)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    dots = [flat[i] @ flat[j] for i, j in pairs]
    lengths = [np.linalg.norm(flat[i]) * np.linalg.norm(flat[j]) for i, j in pairs]
    wanted = {
        "dot": np.mean(dots),
        "cos": np.mean(np.array(dots) / lengths),
        "sign": np.mean(np.sign(dots)),
    }
    for kind, value in wanted.items():
        np.testing.assert_allclose(f.gradient_accordance(grads, kind), value, rtol=1e-5)


def test_accordance_of_known_gradients() -> None:
    same = jax.tree.map(lambda x: jnp.stack([x[0]] * 4), stacked())
    for kind in ("cos", "sign"):
        np.testing.assert_allclose(f.gradient_accordance(same, kind), 1.0, rtol=1e-6)
        assert float(f.gradient_accordance({"a": jnp.eye(4)}, kind)) == 0.0
    # One gradient of 0 among equal ones: 2 of 6 pairs are left.
    some = {"a": jnp.array([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])}
    np.testing.assert_allclose(f.gradient_accordance(some, "cos"), 1 / 3, rtol=1e-6)


def logistic(w: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w["w"])))


def test_label_flipped_copies_of_a_balanced_linear_model_are_at_odds() -> None:
    x = jnp.asarray(RNG.normal(size=(4, 8, 5)), jnp.float32)
    y = jnp.sign(x[..., 0])
    twice = [(a, s * b) for a, b in zip(x, y) for s in (1.0, -1.0)]
    w = {"w": jnp.zeros(5)}
    found = f.accordance_of_gram(f.gram_from_batches(logistic, w, twice))
    assert float(found) < -0.1
    # Without the flipped half the steps help one another.
    plain = f.accordance_of_gram(f.gram_from_batches(logistic, w, twice[::2]))
    assert float(plain) > 0.3


def test_streaming_equals_the_pairs() -> None:
    batches = [
        (jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), jnp.asarray(RNG.choice([-1.0, 1.0], 6)))
        for _ in range(7)
    ]
    w = {"w": jnp.asarray(RNG.normal(size=5), jnp.float32)}
    grads = jax.vmap(jax.grad(logistic), (None, 0))(
        w, jax.tree.map(lambda *x: jnp.stack(x), *batches)
    )
    products = f.gram_from_batches(logistic, w, iter(batches))
    np.testing.assert_allclose(products, f.gram(grads), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(products, products.T)
    for kind in ("cos", "dot"):
        wanted = f.gradient_accordance(grads, kind)
        found = f.streaming_accordance(logistic, w, iter(batches), kind)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    part = f.gram_from_batches(logistic, w, batches, select=lambda g: g["w"][:2])
    np.testing.assert_allclose(part, f.gram({"w": grads["w"][:, :2]}), rtol=1e-5, atol=1e-7)


def test_accordance_over_an_epoch() -> None:
    steps = {"a": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
    probes = {"a": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 1.0]]])}
    np.testing.assert_allclose(
        f.step_accordance(steps, probes), (1 + 0 - 1 + 0.5**0.5) / 4, rtol=1e-6
    )
    np.testing.assert_allclose(f.loss_accordance([1.0, 2.0, 3.0], [0.5, 2.5, 1.0]), 1 / 3)


def test_the_level_is_the_loss_where_accordance_turns() -> None:
    assert f.suggest_flood_level([(0.5, 0.6), (0.1, 0.2), (-0.01, 0.07), (0.2, 0.01)]) == 0.07
    assert f.suggest_flood_level([(0.5, 0.6), (0.0, 0.2)]) == 0.2
    assert f.suggest_flood_level([(0.5, 0.6), (0.1, 0.2)]) == 0.2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: f.flood(jnp.ones(3), 0.1), r"a scalar, got shape \(3,\): flood_per_example"),
        (lambda: f.gradient_accordance(stacked(), "cosine"), "kind must be one of sign, cos, dot"),
        (lambda: f.gradient_accordance(stacked(1)), "two gradients at least, got 1"),
        (lambda: f.gram({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}), r"got M of \[2, 3\]"),
        (lambda: f.accordance_of_gram(jnp.ones((2, 3))), r"must be \[M, M\]"),
        (lambda: f.gram_from_batches(logistic, {}, []), "two gradients at least, got 0"),
        (lambda: f.streaming_accordance(logistic, {}, [], "sign"), "signs need gram_from_batches"),
        (lambda: f.loss_accordance([1.0], [1.0, 2.0]), r"losses \[M\] of M >= 1 probes"),
        (lambda: f.suggest_flood_level([]), "history must not be empty"),
        (lambda: f.suggest_flood_level([(0.1, float("nan"))]), r"history\[0\] must be finite"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
