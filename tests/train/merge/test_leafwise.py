"""Averages, task arithmetic, slerp, TIES and DARE: golden numbers, then invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train import merge
from steppe.train.merge import leafwise
from steppe.train.merge.dare import linear_kernels
from steppe.train.merge.ties import bits, keep_count, kth_largest

TAUS = np.array(
    [[1, -2, 3, 0.5, -0.1, 0], [-4, -1, 2, 0.2, 0.3, 0.6], [2, 3, -1, -0.4, 0.05, -0.7]],
    np.float32,
)
# Over two leaves, so that a threshold by leaf would show.
TREE = {"b": {"kernel": TAUS[:, 4:]}, "a": TAUS[:, :4].reshape(3, 2, 2)}
ZERO = {"b": {"kernel": np.zeros(2, np.float32)}, "a": np.zeros((2, 2), np.float32)}


def flat(tree):
    return np.concatenate([np.asarray(tree["a"]).reshape(-1), np.asarray(tree["b"]["kernel"])])


GOLDEN = {
    (0.5, "sum"): [-4, -3, 5, 0.5, 0, -0.7],
    (0.5, "mean"): [-4, -1.5, 2.5, 0.5, 0, -0.7],
    # Signs cancel at the second entry of K = .5 only after trimming; the majority is 0 there.
    (0.2, "sum"): [-4, 3, 5, 0, 0, 0],
    (0.2, "mean"): [-4, 3, 2.5, 0, 0, 0],
    (0.2, "max"): [-4, 3, 3, 0, 0, 0],
}


@pytest.mark.parametrize(("k", "how"), GOLDEN)
def test_ties_golden(k, how):
    np.testing.assert_allclose(flat(merge.ties(ZERO, TREE, k, 1.0, how)), GOLDEN[k, how], atol=1e-6)


def test_ties_under_jit_and_in_python_are_one():
    jitted = jax.jit(lambda t: merge.ties(ZERO, t, 0.5, 1.0))(TREE)
    np.testing.assert_array_equal(flat(jitted), flat(merge.ties(ZERO, TREE, 0.5, 1.0)))


def test_ties_components_golden_and_their_sum():
    parts = merge.ties_components(TREE, 0.5)
    rows = np.stack([flat(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(3)])
    wanted = [[0, -2, 3, 0.5, 0, 0], [-4, -1, 2, 0, 0, 0], [0, 0, 0, 0, 0, -0.7]]
    np.testing.assert_allclose(rows, wanted, atol=1e-6)
    np.testing.assert_allclose(rows.sum(0), GOLDEN[0.5, "sum"], atol=1e-6)


def test_the_code_keeps_one_more_and_exact_k_keeps_k():
    assert [keep_count(k, 6) for k in (0, 0.2, 0.5, 1)] == [1, 2, 4, 6]
    assert [keep_count(k, 6, exact_k=True) for k in (0, 0.2, 0.5, 1)] == [0, 1, 3, 6]
    level = {"a": np.full((2, 3, 4), 0.5, np.float32), "b": np.full((2, 5), -0.5, np.float32)}
    for k in (0.0, 0.1, 0.4, 0.9, 1.0):
        kept = merge.ties_components({"a": level["a"]}, k, exact_k=True)["a"]
        assert (np.asarray(kept) != 0).sum((1, 2)).tolist() == [int(12 * k)] * 2
    # All tie: the code's form keeps everything.
    assert (np.asarray(merge.ties_components(level, 0.1)["a"]) != 0).all()
    # Two leaves: the quota runs over the first into the second.
    parts = merge.ties_components(level, 14 / 17, exact_k=True)
    signs = [(np.asarray(parts[name]) != 0).reshape(2, -1) for name in "ab"]
    assert signs[0].all()


@pytest.mark.parametrize("keep", [1, 2, 17, 500, 1899, 1900])
def test_the_kth_largest_against_sorting(keep):
    rng = np.random.default_rng(keep)
    leaves = [
        rng.standard_normal((3, 40, 30)).astype(np.float32),
        # Few distinct magnitudes, zeros, and a spread of forty powers of ten.
        np.round(rng.standard_normal((3, 400)), 1).astype(np.float32),
        (10.0 ** rng.uniform(-30, 10, (3, 300))).astype(np.float32),
    ]
    everything = np.abs(np.concatenate([x.reshape(3, -1) for x in leaves], 1))
    wanted = -np.sort(-everything, 1)[:, keep - 1]
    found = np.asarray(kth_largest([jnp.asarray(x) for x in leaves], keep))
    np.testing.assert_array_equal(found.view(np.float32), wanted)


def test_a_sample_steers_the_search_and_does_not_decide(monkeypatch):
    import sys

    module = sys.modules["steppe.train.merge.ties"]
    monkeypatch.setattr(module, "SAMPLE", 64)
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((2, 96, 128)).astype(np.float32)
    leaf[1] = np.sort(leaf[1].reshape(-1)).reshape(96, 128)  # the sample misleads
    found = np.asarray(kth_largest([jnp.asarray(leaf)], 1234)).view(np.float32)
    np.testing.assert_array_equal(found, -np.sort(-np.abs(leaf).reshape(2, -1), 1)[:, 1233])


def test_nan_is_not_lost():
    taus = {"a": np.array([[1, np.nan, 3], [1, 2, 3]], np.float32)}
    merged = merge.ties({"a": np.zeros(3, np.float32)}, taus, 0.9, 1.0)["a"]
    assert np.isnan(merged[1])
    assert np.isfinite(np.asarray(merged)[[0, 2]]).all()
    assert int(bits(jnp.float32(-0.0))) == 0


def models(n=3, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def one():
        return {
            "layers": {"kernel": rng.standard_normal((2, 3, 4)).astype(dtype)},
            "head": {"bias": rng.standard_normal(5).astype(dtype)},
            "steps": np.array([7, 8], np.int32),
        }

    return [one() for _ in range(n)]


def close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol)


def test_averages():
    trees = models()
    mean = merge.average(trees)
    np.testing.assert_allclose(
        mean["layers"]["kernel"], sum(t["layers"]["kernel"] for t in trees) / 3, atol=1e-6
    )
    np.testing.assert_array_equal(mean["steps"], [7, 8])
    close(merge.average(trees, [1, 2, 1]), merge.weighted(trees, [0.25, 0.5, 0.25]))


def test_task_arithmetic_averages_forgets_and_takes_one_coefficient_a_task():
    base, *trees = models(4)
    taus = merge.task_vectors(base, trees)
    assert "steps" not in taus  # integers are never merged
    close(merge.task_arithmetic(base, taus, 1 / 3), merge.average(trees))
    close(merge.task_arithmetic(base, taus, [0.0, 1.0, 0.0]), trees[1])
    there = merge.task_arithmetic(base, taus, 0.3)
    back = merge.task_arithmetic(there, taus, -0.3)
    close(back, base)


def test_slerp_ends_middle_and_parallel():
    a, b = models(2)
    close(merge.slerp(a, b, 0.0), a)
    close(merge.slerp(a, b, 1.0), b, 2e-6)
    x, y = {"w": np.array([1.0, 0.0], np.float32)}, {"w": np.array([0.0, 1.0], np.float32)}
    np.testing.assert_allclose(merge.slerp(x, y, 0.5)["w"], [0.5**0.5] * 2, atol=1e-6)
    np.testing.assert_allclose(merge.slerp(x, {"w": 3 * x["w"]}, 0.5)["w"], [2, 0], atol=1e-6)
    # Lengths whose squares leave float32 change nothing.
    plain = merge.slerp(x, {"w": np.float32([0.0, 1.0])}, 0.5)["w"]
    for size in (np.float32(1e25), np.float32(1e-25)):
        far = merge.slerp({"w": size * x["w"]}, {"w": size * np.float32([0.0, 1.0])}, 0.5)["w"]
        np.testing.assert_allclose(far / size, plain, rtol=1e-6)
    # A stacked leaf is one tensor a layer.
    whole = merge.slerp(a, b, 0.3)["layers"]["kernel"]
    one = merge.slerp(
        {"w": a["layers"]["kernel"][1]}, {"w": b["layers"]["kernel"][1]}, 0.3
    )["w"]  # fmt: skip
    np.testing.assert_allclose(whole[1], one, atol=1e-6)


def test_dare_is_unbiased_over_a_thousand_keys():
    tau = {"a": np.array([[1.0, -2.0, 0.5], [3.0, 0.1, -1.0]], np.float32)}
    keys = jax.random.split(jax.random.key(0), 1000)
    p = 0.9
    drawn = jax.jit(jax.vmap(lambda key: merge.dare(key, tau, p)["a"]))(keys)
    sigma = np.abs(tau["a"]) * np.sqrt(p / (1 - p) / 1000)
    assert (np.abs(np.asarray(drawn).mean(0) - tau["a"]) < 3 * sigma + 1e-6).all()
    # Tasks and entries are dropped independently.
    live = (np.asarray(drawn) != 0).reshape(1000, -1).astype(float)
    correlation = np.corrcoef(live.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.12


def test_dare_of_zero_is_nothing_and_a_predicate_chooses():
    base, *trees = models(3)
    taus = merge.task_vectors(base, trees)
    key = jax.random.key(1)
    close(merge.dare(key, taus, 0.0), taus)
    chosen = merge.dare(key, taus, 0.5, predicate=linear_kernels)
    np.testing.assert_array_equal(chosen["head"]["bias"], taus["head"]["bias"])
    assert (np.asarray(chosen["layers"]["kernel"]) == 0).any()
    plain = merge.dare(key, taus, 0.5, rescale=False)["layers"]["kernel"]
    kept = np.asarray(plain) != 0
    np.testing.assert_array_equal(np.asarray(plain)[kept], taus["layers"]["kernel"][kept])
    # The mask of a leaf does not depend on its neighbours.
    alone = merge.dare(key, {"layers": taus["layers"]}, 0.5)["layers"]["kernel"]
    np.testing.assert_array_equal(alone, merge.dare(key, taus, 0.5)["layers"]["kernel"])


def test_bad_input_says_what_is_wrong():
    base, *trees = models(3)
    taus = merge.task_vectors(base, trees)
    with pytest.raises(ValueError, match="at least one model"):
        merge.average([])
    with pytest.raises(ValueError, match="weights must be 2"):
        merge.average(trees, [1])
    with pytest.raises(ValueError, match="must not sum to 0"):
        merge.average(trees, [1, -1])
    with pytest.raises(ValueError, match=r"'layers/kernel'.*lacks"):
        merge.average([trees[0], {"steps": trees[1]["steps"], "head": trees[1]["head"]}])
    with pytest.raises(ValueError, match=r"shape mismatch at 'head/bias'"):
        merge.task_vectors(base, [{**trees[0], "head": {"bias": np.zeros(4)}}])
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\], got 20"):
        merge.ties(base, taus, 20)
    with pytest.raises(ValueError, match="merge must be one of sum, mean, max, got 'total'"):
        merge.ties(base, taus, merge="total")
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got 1"):
        merge.dare(jax.random.key(0), taus, 1)
    with pytest.raises(ValueError, match="one a task"):
        merge.task_arithmetic(base, taus, [0.1, 0.2, 0.3])
    for lam in (float("nan"), [0.1, float("inf")], np.array([0.1, np.nan])):
        with pytest.raises(ValueError, match="lam must be finite, got"):
            merge.task_arithmetic(base, taus, lam)
    with pytest.raises(ValueError, match="t must be finite, got nan"):
        merge.slerp(*trees, float("nan"))
    with pytest.raises(ValueError, match="which the base lacks"):
        merge.task_arithmetic({"x": base["head"]}, taus, 0.3)
    with pytest.raises(ValueError, match="tasks on axis 0"):
        leafwise.tasks({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))})


def test_one_bfloat16_model_is_returned_to_the_last_bit():
    from steppe.train.merge import adaptive

    rng = np.random.default_rng(0)
    base, tuned = (
        {"w": jnp.asarray(rng.standard_normal((64, 8)), jnp.bfloat16)} for _ in range(2)
    )  # fmt: skip
    taus = merge.task_vectors(base, [tuned])
    for found in (
        merge.task_arithmetic(base, taus, 1.0),
        merge.ties(base, taus, 1.0, 1.0),
        adaptive.merged(base, taus, jnp.ones(1)),
    ):
        assert found["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found["w"], tuned["w"])
