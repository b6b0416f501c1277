"""Selective updates: ranks, probabilities, unbiased masks, what is covered, meshes, bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from steppe.optim import rank
from steppe.optim.selective import (
    importance_from_grads,
    keep_probability,
    refresh_mask,
    selective_gradient,
)

RNG = np.random.default_rng(0)
PARAMS = {
    "embed": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
    "layers": {
        "kernel": jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=(2, 8)), jnp.float32),
    },
}
GRADS = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=w.shape), jnp.float32), PARAMS)


def covered(path: str) -> bool:
    return path.startswith("layers/")


def refreshed(alpha: float, beta: float, grads: Any = GRADS, **options: Any) -> Any:
    tx = selective_gradient(alpha, beta, covered, **options)
    return tx, refresh_mask(importance_from_grads(tx.init(PARAMS), grads))


# -- ranks


def test_ranks_against_numpy_with_ties_shared() -> None:
    tree = {"a": jnp.array([[0.0, 3.0], [0.0, 7.0]]), "b": jnp.array([3.0, 0.5, 0.0])}
    for method in ("exact", "histogram"):
        found = rank.relative_rank(tree, method)
        # In order: three zeros (ranks 0 to 2), .5, two threes (4 and 5), 7.
        np.testing.assert_allclose(found["a"], np.array([[1, 4.5], [1, 6]]) / 6, rtol=1e-6)
        np.testing.assert_allclose(found["b"], np.array([4.5, 3, 1]) / 6, rtol=1e-6)
    for method in ("exact", "histogram"):
        assert float(rank.relative_rank({"a": jnp.ones(1)}, method)["a"][0]) == 0
        np.testing.assert_array_equal(rank.relative_rank({"a": jnp.ones(5)}, method)["a"], 0.5)
        np.testing.assert_array_equal(rank.relative_rank({"a": jnp.zeros(5)}, method)["a"], 0.5)


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_the_histogram_is_near_the_exact_rank(spread: float) -> None:
    values = np.exp(spread * RNG.normal(size=40_000)).astype(np.float32)
    values[:2000] = 0  # rows that no token used
    tree = {"a": jnp.asarray(values[:30_000].reshape(100, 300)), "b": jnp.asarray(values[30_000:])}
    exact = rank.relative_rank(tree)
    near = jax.jit(lambda t: rank.relative_rank(t, "histogram"))(tree)
    apart = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), exact, near)
    assert max(jax.tree.leaves(apart)) < 1e-3


def test_ranks_and_masks_are_the_same_on_eight_devices() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {"kernel": PartitionSpec(None, "a", "b"), "bias": PartitionSpec(None, "b")}
    tx = selective_gradient(0.6, 5.0, covered, resample=1)
    grads = GRADS["layers"]

    def two_updates(grads: Any) -> Any:
        state = tx.init({"layers": grads})
        for _ in range(2):
            updates, state = tx.update({"layers": grads}, state)
        return updates, state

    alone = jax.jit(two_updates)(grads)
    placed = {k: jax.device_put(v, NamedSharding(mesh, spec[k])) for k, v in grads.items()}
    split = jax.jit(two_updates)(placed)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0 < int(alone[1].mask["layers"]["kernel"].sum()) < 256
    # Outside of a compiled step the state keeps its place.
    mask = jax.tree.map(lambda m, s: jax.device_put(m, NamedSharding(mesh, s)),
                        alone[1].mask["layers"], spec)  # fmt: skip
    state = alone[1]._replace(mask={"layers": mask})
    new = refresh_mask(state, method="histogram").mask["layers"]
    assert new["kernel"].sharding == mask["kernel"].sharding


# -- probabilities


@pytest.mark.parametrize(
    ("alpha", "beta", "wanted"), [(0.9, 10, 0.1063), (0.6, 1, 0.4539), (0.6, 5, 0.4016)]
)
def test_the_expected_share(alpha: float, beta: float, wanted: float) -> None:
    s = jnp.arange(10**6, dtype=jnp.float32) / (10**6 - 1)
    p = keep_probability(s, alpha, beta)
    assert float(p.mean()) == pytest.approx(wanted, abs=1e-3)
    closed = (np.logaddexp(0, 2 * beta * (1 - alpha)) - np.logaddexp(0, -2 * beta * alpha)) / (
        2 * beta
    )
    assert float(p.mean()) == pytest.approx(closed, abs=1e-4)


def test_the_limits_of_beta() -> None:
    _, state = refreshed(0.3, 0.0)
    for p in jax.tree.leaves(state.keep_prob):
        np.testing.assert_array_equal(p, 0.5)
    tx, state = refreshed(0.0, float("inf"))
    p = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.keep_prob)])
    assert (p == 1).sum() == p.size - 1
    assert (p == 0.5).sum() == 1  # the least important entry
    updates, _ = tx.update(GRADS, state)
    same = [np.asarray(u == g)[np.asarray(q == 1)].all() for u, g, q in zip(
        jax.tree.leaves(updates["layers"]), jax.tree.leaves(GRADS["layers"]),
        jax.tree.leaves(state.keep_prob), strict=True)]  # fmt: skip
    assert all(same)


def test_masks_are_unbiased_over_draws() -> None:
    tx, state = refreshed(0.5, 2.0, resample="step")

    @jax.jit
    def total(state: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            state, total = carry
            updates, state = tx.update(GRADS, state)
            return (state, jax.tree.map(jnp.add, total, updates)), None

        zeros = jax.tree.map(jnp.zeros_like, GRADS)
        return jax.lax.scan(body, (state, zeros), None, length=20_000)[0][1]

    mean = jax.tree.map(lambda t: t / 20_000, total(state))["layers"]
    p = state.keep_prob["layers"]
    z = jax.tree.map(
        lambda m, g, p: (m - g) / (jnp.abs(g) * jnp.sqrt((1 - p) / p / 20_000)),
        mean, GRADS["layers"], p,
    )  # fmt: skip
    z = np.concatenate([np.ravel(x) for x in jax.tree.leaves(z)])
    assert np.mean(np.abs(z) < 3) > 0.98
    assert np.abs(z).max() < 5


# -- the transform


def test_monotone_transforms_of_importance_change_nothing() -> None:
    _, one = refreshed(0.6, 5.0)
    _, seven = refreshed(0.6, 5.0, jax.tree.map(lambda g: 7 * g, GRADS))
    jax.tree.map(np.testing.assert_array_equal, one.mask, seven.mask)
    other = refresh_mask(importance_from_grads(one, GRADS), jax.random.key(9))
    assert not np.array_equal(other.mask["layers"]["kernel"], one.mask["layers"]["kernel"])


def test_what_is_covered_and_decay_of_what_is_masked() -> None:
    tx, state = refreshed(0.9, float("inf"))
    assert isinstance(state.mask["embed"], optax.MaskedNode)
    updates, after = tx.update(GRADS, state)
    np.testing.assert_array_equal(updates["embed"], GRADS["embed"])
    kept = state.mask["layers"]["kernel"]
    np.testing.assert_array_equal(updates["layers"]["kernel"][~kept], 0)
    np.testing.assert_allclose(
        updates["layers"]["kernel"][kept], GRADS["layers"]["kernel"][kept], rtol=1e-6
    )
    # What is added to the importance is the gradient before masking.
    np.testing.assert_allclose(
        after.importance_sum["layers"]["kernel"], GRADS["layers"]["kernel"] ** 2, rtol=1e-6
    )
    chained = optax.chain(tx, optax.adamw(0.1, weight_decay=0.5))
    states = chained.init(PARAMS)
    updates, _ = chained.update(GRADS, (state, *states[1:]), PARAMS)
    np.testing.assert_allclose(
        updates["layers"]["kernel"][~kept], -0.05 * PARAMS["layers"]["kernel"][~kept], rtol=1e-5
    )


def test_scales() -> None:
    tx, state = refreshed(0.9, 10.0, max_scale=4.0)
    updates, _ = tx.update(GRADS, state)
    ratio = np.asarray(updates["layers"]["kernel"] / GRADS["layers"]["kernel"])
    wanted = np.minimum(1 / np.asarray(state.keep_prob["layers"]["kernel"]), 4.0)
    kept = np.asarray(state.mask["layers"]["kernel"])
    np.testing.assert_allclose(ratio[kept], wanted[kept], rtol=1e-5)
    assert (ratio[~kept] == 0).all()
    plain, state = refreshed(0.9, 10.0, unbiased=False)
    updates, _ = plain.update(GRADS, state)
    np.testing.assert_allclose(
        np.asarray(updates["layers"]["kernel"])[kept], np.asarray(GRADS["layers"]["kernel"])[kept]
    )


def test_before_a_refresh_all_entries_train_and_after_n_updates_it_comes_by_itself() -> None:
    tx = selective_gradient(0.9, 10.0, covered, resample=3)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for number in range(5):
        updates, state = update(GRADS, state)
        full = np.array_equal(updates["layers"]["kernel"], GRADS["layers"]["kernel"])
        assert full == (number < 3)
    assert int(state.count) == 2
    assert int(state.draws) == 1


def test_a_gradient_that_is_no_number_leaves_no_trace() -> None:
    tx, state = refreshed(0.6, 5.0)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    _, after = tx.update(bad, state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    # A refresh without any importance draws anew from the same probabilities.
    again = refresh_mask(after)
    jax.tree.map(np.testing.assert_array_equal, again.keep_prob, state.keep_prob)
    assert not np.array_equal(again.mask["layers"]["kernel"], state.mask["layers"]["kernel"])


BAD = {
    "alpha": (lambda: selective_gradient(1.5, 1, covered), r"alpha must be in \[0, 1\], got 1.5"),
    "alpha of words": (lambda: selective_gradient("x", 1, covered), "alpha must be in .* got 'x'"),
    "beta true": (lambda: selective_gradient(0.5, True, covered), "beta must be >= 0, got True"),
    "beta": (lambda: selective_gradient(0.5, -1, covered), "beta must be >= 0, got -1"),
    "scale": (lambda: selective_gradient(0.5, 1, covered, max_scale=0.5), "max_scale must be >= 1"),
    "resample": (
        lambda: selective_gradient(0.5, 1, covered, resample="batch"),  # type: ignore[arg-type]
        "resample must be 'epoch', 'step' or a number of updates >= 1, got 'batch'",
    ),
    "nothing": (
        lambda: selective_gradient(0.5, 1, lambda path: False).init(PARAMS),
        "covered is False for every parameter; paths look like embed, layers/",
    ),
    "method": (
        lambda: rank.relative_rank(PARAMS, "sort"),  # type: ignore[arg-type]
        "method must be 'exact' or 'histogram', got 'sort'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_covered_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="covered must be a function"):
        selective_gradient(0.5, 1, "layers/.*")  # type: ignore[arg-type]
