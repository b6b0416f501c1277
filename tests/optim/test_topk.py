"""The exact top-k: every path of the counting against sorting, hard distributions, meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from steppe.optim import topk

RNG = np.random.default_rng(0)


def check(leaves: Any, k: int, found: Any) -> None:
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(leaves)])
    flat = np.where(flat > 0, flat, 0)
    bound = np.sort(flat)[-k]
    mask = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found.mask)])
    np.testing.assert_array_equal(mask, flat >= bound)
    assert float(found.threshold) == bound
    assert float(found.chosen) == (flat >= bound).sum()


def numbers(kind: str, size: int) -> np.ndarray:
    if kind == "normal":
        return RNG.normal(size=size).astype(np.float32) ** 2
    if kind == "wide":
        return np.exp(20 * RNG.normal(size=size)).astype(np.float32)
    if kind == "ties":
        return RNG.integers(0, 5, size).astype(np.float32)
    if kind == "zeros":
        return np.where(RNG.random(size) < 0.01, RNG.random(size), 0).astype(np.float32)
    if size < 3:
        return np.ones(size, np.float32)
    # Two clumps far apart and outliers: interpolation between them is always wrong.
    values = np.where(RNG.random(size) < 0.5, 1e-30, 1e10) * (1 + 1e-6 * RNG.random(size))
    values[:3] = (np.inf, np.nan, -1.0)
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "zeros", "clumps"])
def test_every_distribution_by_the_path_of_large_leaves(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample and the unrolled counts, with sizes at which a test can afford them."""
    monkeypatch.setattr(topk, "UNROLL", 4)
    monkeypatch.setattr(topk, "LARGE", 64)
    monkeypatch.setattr(topk, "SAMPLE", 32)
    assert topk._local()
    tree = {
        "a": jnp.asarray(numbers(kind, 1003)),  # 16 x 62 and 11 left over
        "b": jnp.asarray(numbers(kind, 6 * 35).reshape(6, 5, 7)),
        "c": jnp.asarray(numbers(kind, 7)),
        "d": jnp.asarray(numbers(kind, 1)[0]),
    }
    k = {"normal": 1, "clumps": 1221}.get(kind, 400)
    check(tree, k, jax.jit(lambda tree: topk.top_k(tree, k))(tree))


def test_the_full_unrolling_counts_every_entry() -> None:
    values = jnp.asarray(RNG.random(topk.LARGE + 777), jnp.float32)
    thresholds = topk.bits(jnp.array([0.0, 0.25, 0.5, 0.999]))
    counts, rest = jax.jit(topk._unrolled)(values, thresholds)
    found = np.asarray(counts) + [(np.asarray(rest) >= t).sum() for t in (0, 0.25, 0.5, 0.999)]
    wanted = [(np.asarray(values) >= np.float32(t)).sum() for t in (0, 0.25, 0.5, 0.999)]
    np.testing.assert_array_equal(found, wanted)
    assert rest.size < topk.UNROLL**2 * 2


def test_a_sharded_tree_is_searched_where_it_lies() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tree = {"x": jnp.asarray(numbers("normal", 64 * 32).reshape(64, 32))}
    spec = NamedSharding(mesh, PartitionSpec("a", "b"))
    placed = jax.device_put(tree, spec)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert not topk._local()
        compiled = jax.jit(lambda t: topk.top_k(t, 100)).lower(placed).compile()
    check(tree, 100, compiled(placed))
    assert "all-gather" not in compiled.as_text()


def test_words_carry() -> None:
    left = topk._split(jnp.array([0x1FFFF, 3]))
    right = topk._split(jnp.array([0x00002, 0xFFFF]))
    np.testing.assert_array_equal(topk._add(left, right), [[2, 1], [1, 2]])
    assert float(topk._float(topk._words(3 * 2**31 + 65536))) == 3 * 2**31 + 65536


def test_bad_k() -> None:
    with pytest.raises(
        ValueError, match="k must be between 0 and the 3 entries of the tree, got 4"
    ):
        topk.top_k({"a": jnp.ones(3)}, 4)


def test_every_round_leaves_at_most_half() -> None:
    """However few entries are left, and wherever among them the k-th is."""
    rng = np.random.default_rng(0)
    for few in (1, 2, 6, 100, 10**6):
        for _ in range(20):
            low, high = sorted(int(x) for x in rng.integers(0, topk.TOP, 2))
            above = int(rng.integers(0, 1000))
            interval = topk._Interval(
                jnp.int32(low),
                jnp.int32(high),
                topk._words(above + few),
                topk._words(above),
                jnp.float32(10.0 ** rng.uniform(-20, -0.9)),
            )
            guess = topk._guess(interval, above + int(rng.integers(1, few + 1)))
            ends = np.concatenate([[low], np.clip(np.sort(guess), low, high), [high]])
            # Thresholds are rounded to the 24 bits of a float.
            assert np.diff(ends).max() <= 0.5 * (high - low) * (1 + 1e-5) + 2, (few, low, high)


def test_a_handful_of_entries_far_apart() -> None:
    scores = [jnp.array([6.25, 9.0]), jnp.array([[1.0, 16.0], [81.0, 256.0]])]
    found = topk.top_k(scores, 3)
    assert [m.tolist() for m in found.mask] == [[False, False], [[False, True], [True, True]]]
    assert float(found.threshold) == 16.0
