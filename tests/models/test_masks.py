"""Learnt masks: distributions against their formulas, gradients, groups, and binarising."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import binarize as rounding
from steppe.models import masks

KEY = jax.random.key(0)
A = [0.0, -2.0, 1.5]


@pytest.fixture(scope="module")
def samples():
    """2e6 draws of the hard concrete at each a."""
    draw = jax.jit(lambda a: masks.sample_hard_concrete(KEY, jnp.full(2_000_000, a)))
    return {a: np.asarray(draw(a)) for a in A}


@pytest.mark.parametrize(
    ("a", "open_", "one", "mean"),
    [(0.0, 0.8318, 0.1682, 0.5), (-2.0, 0.4010, 0.0266, 0.1428), (1.5, 0.9568, 0.4754, 0.7908)],
)
def test_hard_concrete_has_the_probabilities_of_its_formulas(samples, a, open_, one, mean):
    m = samples[a]
    assert abs((m > 0).mean() - open_) < 1.5e-3
    assert abs((m == 1).mean() - one) < 1.5e-3
    assert abs(m.mean() - mean) < 1.5e-3
    assert float(masks.probability_nonzero(jnp.float32(a))) == pytest.approx(open_, abs=1e-4)
    assert float(masks.probability_one(jnp.float32(a))) == pytest.approx(one, abs=1e-4)


def test_samples_follow_the_distribution_function(samples):
    for a, m in samples.items():
        inside = np.sort(m)
        x = np.linspace(0.01, 0.99, 99)
        empirical = np.searchsorted(inside, x, side="right") / inside.size
        exact = masks.hard_concrete_cdf(jnp.asarray(x), jnp.float32(a))
        assert np.abs(empirical - np.asarray(exact)).max() < 2e-3


def test_published_formulas_on_the_same_noise():
    """``quantile_concrete``, ``sample_z`` and ``cdf_qz`` of the L0 code, in float64 NumPy."""
    rng = np.random.default_rng(0)
    u, a = rng.uniform(0.01, 0.99, 500), rng.normal(size=500)
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + a) / (2 / 3)))
    z = np.clip(s * 1.2 - 0.1, 0, 1)
    found = masks.hard_concrete(jnp.asarray(u, jnp.float32), jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(found, z, atol=1e-6)
    x = (u - -0.1) / 1.2
    cdf = 1 / (1 + np.exp(-((np.log(x) - np.log(1 - x)) * (2 / 3) - a)))
    found = masks.hard_concrete_cdf(jnp.asarray(u, jnp.float32), jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(found, cdf, atol=1e-6)


def test_without_noise_and_the_way_back():
    found = masks.hard_concrete_mean(jnp.asarray([*A, 2.398, -2.398, 9.0]))
    np.testing.assert_allclose(found, [0.5, 0.0430, 0.8811, 1, 0, 1], atol=5e-5)
    assert masks.log_alpha(0.9) == pytest.approx(1.6094, abs=1e-4)
    for p in (0.02, 0.5, 0.9, 0.99):
        assert float(masks.hard_concrete_mean(jnp.float32(masks.log_alpha(p)))) == pytest.approx(
            p, abs=1e-6
        )


def test_gradients_are_those_of_common_random_numbers():
    @jax.jit
    def mean(a):
        return masks.sample_hard_concrete(KEY, jnp.full(200_000, 0.0) + a).mean()

    slope = jax.jit(jax.grad(mean))(0.3)
    numbers = (mean(0.3 + 1e-2) - mean(0.3 - 1e-2)) / 2e-2
    assert float(slope) == pytest.approx(float(numbers), rel=1e-2)
    trees = {"w": jnp.asarray([0.3, -1.0]), "layers": {"k": jnp.asarray([[0.1], [2.0]])}}
    grad = jax.grad(lambda t: masks.expected_l0(t, "sum"))(trees)
    p = np.asarray([0.3, -1.0]) + 1.5986
    exact = np.exp(-p) / (1 + np.exp(-p)) ** 2
    np.testing.assert_allclose(grad["w"], exact, atol=1e-5)


def test_a_cold_hard_concrete_is_a_coin():
    m = np.asarray(masks.sample_hard_concrete(KEY, jnp.full(200_000, 1.0), beta=1e-3))
    assert ((m == 0) | (m == 1)).mean() > 0.995
    assert m.mean() == pytest.approx(1 / (1 + np.exp(-1.0)), abs=5e-3)


def test_expected_l0_reduces_as_asked():
    small, large = jnp.full((1, 1), -1.5986), jnp.full((3, 3), 30.0)
    a = {"pooler": small, "out": large}
    assert float(masks.expected_l0(a)) == pytest.approx((0.5 + 1) / 2, abs=1e-4)
    assert float(masks.expected_l0(a, "global_mean")) == pytest.approx(9.5 / 10, abs=1e-4)
    assert float(masks.expected_l0(a, "sum")) == pytest.approx(9.5, abs=1e-3)
    sized = masks.expected_l0(a, "sum", sizes={"pooler": 100, "out": 1})
    assert float(sized) == pytest.approx(59, abs=1e-2)
    # Two stacked layers are two matrices.
    stacked = {"pooler": small, "layers": {"out": jnp.stack([large, large])}}
    assert float(masks.expected_l0(stacked)) == pytest.approx(2.5 / 3, abs=1e-4)
    with pytest.raises(ValueError, match="reduction must be"):
        masks.expected_l0(a, "mean")


def test_binary_concrete_golden_values():
    u = jnp.asarray([0.1, 0.5, 0.9, 0.3])
    x = jnp.asarray([0.0, 0.0, 0.0, 2.0])
    m = masks.binary_concrete(u, x, 0.5)
    np.testing.assert_allclose(m, [0.0121951, 0.5, 0.9878049, 0.9093236], atol=1e-6)
    assert float(m.mean()) == pytest.approx(0.6023309, abs=1e-6)
    rescaled = masks.rescale({"w": m})["w"]
    np.testing.assert_allclose(rescaled, [0.0202465, 0.8301085, 1.6399704, 1.5096745], atol=2e-6)
    np.testing.assert_allclose(
        masks.binary_concrete(u, x, 1.0), [0.1, 0.5, 0.9, 0.7600042], atol=1e-6
    )


@pytest.mark.parity
def test_binary_concrete_equals_torch_on_the_same_noise():
    torch = pytest.importorskip("torch")
    from torch.distributions import RelaxedBernoulli

    logits = torch.linspace(-4, 4, 200)
    for tau in (0.3, 1.0, 2.0):
        torch.manual_seed(0)
        theirs = RelaxedBernoulli(torch.tensor(tau), logits=logits).rsample()
        torch.manual_seed(0)
        u = torch.rand(200).clamp(torch.finfo(torch.float32).eps, 1 - 2.0**-23)
        ours = masks.binary_concrete(jnp.asarray(u.numpy()), jnp.asarray(logits.numpy()), tau)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
def test_above_one_half_with_the_probability_of_the_logit(tau):
    n = 100_000
    for number, l in enumerate((-1.0, 0.0, 2.0)):  # noqa: E741
        s = masks.gumbel_sigmoid(jax.random.key(number), jnp.full(n, l), tau)
        p = 1 / (1 + np.exp(-l))
        assert abs(float((s > 0.5).mean()) - p) < 3 * (p * (1 - p) / n) ** 0.5


def test_straight_through_is_hard_forwards_and_soft_backwards():
    x = jnp.linspace(-2, 2, 50)
    soft, pull = jax.vjp(lambda x: masks.gumbel_sigmoid(KEY, x, 0.7), x)
    hard, push = jax.vjp(lambda x: masks.gumbel_sigmoid(KEY, x, 0.7, hard=True), x)
    assert set(np.unique(hard)) == {0.0, 1.0}
    np.testing.assert_array_equal(hard, soft > 0.5)
    np.testing.assert_array_equal(pull(jnp.ones(50))[0], push(jnp.ones(50))[0])


def test_noise_is_finite_and_float32_for_bf16_logits():
    u = masks.uniform(KEY, (1_000_000,))
    assert np.isfinite(masks.logit(u)).all()
    assert np.isfinite(masks.logit(jnp.asarray([masks.TINY, 1 - 2.0**-24]))).all()
    m = masks.gumbel_sigmoid(KEY, jnp.zeros(10, jnp.bfloat16))
    assert m.dtype == jnp.float32
    np.testing.assert_array_equal(m, masks.gumbel_sigmoid(KEY, jnp.zeros(10)))


def test_every_tensor_of_a_rescaled_mask_has_mean_one():
    logits = {"a": jnp.full((40, 3), -3.0), "layers": {"k": jnp.linspace(-2, 2, 60).reshape(3, 20)}}
    s = jax.jit(masks.rescaled_mask)(KEY, logits, 0.5)
    assert float(s["a"].mean()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(s["layers"]["k"].mean(1), 1, atol=1e-6)  # a layer, a tensor
    none = masks.rescale({"a": jnp.zeros(4)})["a"]
    np.testing.assert_array_equal(none, 0)
    # The gradient flows through the mean: a common shift of all entries changes nothing.
    total = jax.grad(lambda t: masks.rescaled_mask(KEY, {"a": logits["a"] * t}, 5.0)["a"].sum())
    grad = jax.jit(total)(1.0)
    assert abs(float(grad)) < 1e-3


def test_a_leafs_noise_depends_on_its_path_alone():
    whole = {"a": jnp.zeros(8), "b": {"c": jnp.zeros(8)}}
    one = masks.concrete_mask(KEY, whole)
    other = masks.concrete_mask(KEY, {"b": {"c": jnp.zeros(8)}})
    np.testing.assert_array_equal(one["b"]["c"], other["b"]["c"])
    assert np.abs(one["a"] - one["b"]["c"]).max() > 0.01


def test_topk_keeps_exactly_k_and_passes_the_gradient():
    score = jnp.asarray([1.0, 1.0, 3.0, 1.0, -1e8])
    for k in (0, 2, 5):
        assert float(masks.topk_ste(score, k).sum()) == k
    np.testing.assert_array_equal(masks.topk_ste(score, 2), [1, 0, 1, 0, 0])
    w = jnp.arange(5.0)
    grad = jax.grad(lambda s: (masks.topk_ste(s, 2) * w * 2).sum())(score)
    np.testing.assert_array_equal(grad, 2 * w)
    with pytest.raises(ValueError, match="k must lie between 0 and the 5 scores, got 6"):
        masks.topk_ste(score, 6)


def test_gumbel_topk_draws_sets_by_probability_and_skips_padding():
    score = jnp.asarray([[0.0, 0.0, 5.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    valid = jnp.asarray([[True, True, True, False], [True, False, False, False]])
    many = jax.vmap(lambda k, s: masks.gumbel_topk_ste(k, s, 2, valid=valid), (0, None))
    draws = jax.jit(many)(jax.random.split(KEY, 400), score)
    np.testing.assert_array_equal(draws.sum(-1)[:, 0], 2)
    np.testing.assert_array_equal(draws[:, :, 3], 0)
    np.testing.assert_array_equal(draws[:, 1], np.tile([1, 0, 0, 0], (400, 1)))
    assert draws[:, 0, 2].mean() > 0.97
    assert 0.35 < draws[:, 0, 0].mean() < 0.65
    grad = jax.jit(jax.grad(lambda s: many(KEY[None], s)[0, 0, 0]))(score)
    assert np.isfinite(grad).all()
    assert float(jnp.abs(grad[0]).max()) > 0


@pytest.mark.parametrize(
    ("granularity", "group", "shape"),
    [("weight", 1, (4, 6)), ("row", 2, (2, 1)), ("column", 3, (1, 2)), ("matrix", 1, (1, 1))],
)
def test_weight_masks_are_made_and_applied(granularity, group, shape):
    params = {"q": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    spec = masks.MaskSpec(".*/kernel", granularity, group)
    a = masks.init_log_alpha(params, spec)
    assert a["q"]["kernel"].shape == shape
    m = jax.tree.map(masks.hard_concrete_mean, a)
    masked = masks.apply_weight_masks(params, m)
    np.testing.assert_allclose(masked["q"]["kernel"], 0.9, atol=1e-6)
    np.testing.assert_array_equal(masked["q"]["bias"], 1)
    stack = {"layers": {"kernel": jnp.ones((3, 4, 6))}}
    a = masks.init_log_alpha(stack, masks.MaskSpec("layers/kernel", granularity, group), key=KEY)
    assert a["layers"]["kernel"].shape == (3, *shape)
    assert abs(float(a["layers"]["kernel"].mean()) - np.log(9)) < 0.02
    clamped = masks.clamp_log_alpha({"a": jnp.ones(2) * 9})["a"]
    np.testing.assert_allclose(clamped, np.log(100), atol=1e-5)


def test_groups_are_contiguous_or_strided():
    m = jnp.asarray([[1.0], [0.0]])
    np.testing.assert_array_equal(masks.expand(m, (4, 1))[:, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(masks.expand(m, (4, 1), strided=True)[:, 0], [1, 0, 1, 0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masks.MaskSpec("k", "head"), "granularity must be"),
        (lambda: masks.MaskSpec("k", group=0), "group must be >= 1"),
        (lambda: masks.MaskSpec("k", "row", 3).shape("k", (4, 6)), "does not divide the 4 rows"),
        (lambda: masks.MaskSpec("k", "row").shape("k", (2, 4, 6)), "no matrix"),
        (lambda: masks.init_log_alpha({"a": jnp.ones(2)}, masks.MaskSpec("b")), "matches no"),
        (lambda: masks.expand(jnp.ones((3, 1)), (4, 1)), "does not group"),
        (lambda: masks.log_alpha(1.0), "p must lie in"),
        (lambda: masks.gumbel_sigmoid(KEY, jnp.ones(2), 0.0), "temperature must be > 0"),
        (lambda: masks.sample_hard_concrete(KEY, jnp.ones(2), beta=0), "beta must be > 0"),
        (lambda: masks.sample_hard_concrete(KEY, jnp.ones(2), gamma=0), "gamma must be < 0"),
        (lambda: masks.expected_l0({}), "holds no mask"),
        (lambda: masks.gumbel_topk_ste(KEY, jnp.ones(2), 3), "k must lie between"),
        (lambda: masks.binarize(jnp.ones((2, 2)), 1.0), "sparsity must lie in"),
        (lambda: masks.binarize(jnp.ones((2, 2)), 0.5, "row"), "scope must be"),
        (lambda: masks.binarize(jnp.ones((2, 2)), 0.5, min_alive=-1), "min_alive must be"),
        (lambda: masks.cubic_density(0, 1.0, 0.1, 5, 5), "t1 must be > t0"),
        (lambda: masks.cubic_density(0, 1.0, 1.1, 0, 5), "end must lie in"),
    ],
)
def test_what_cannot_work_says_so(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Binarising ------------------------------------------------------------------------------------


def test_order_statistics_and_quantiles_are_numpys():
    rng = np.random.default_rng(0)
    values = rng.normal(size=301).astype(np.float32)
    values[:40] = 0.0
    values[40:44] = [-0.0, np.inf, -np.inf, 1e-40]
    leaves = [jnp.asarray(values[:100]), jnp.asarray(values[100:])]
    ordered = np.sort(values)
    for rank in (0, 1, 150, 299, 300):
        np.testing.assert_array_equal(rounding.order_statistic(leaves, rank), ordered[rank])
    finite = [jnp.asarray(values[50:])]
    for q in (0.0, 0.1, 0.37, 0.5, 0.999, 1.0):
        found = float(rounding.quantile(finite, q))
        assert found == pytest.approx(np.quantile(values[50:], q), abs=1e-6)


def test_binarize_global_and_layerwise():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(4, 25)), jnp.float32)
    scores = scores + jnp.arange(4.0)[:, None]
    kept = jax.jit(lambda s: masks.binarize(s, 0.6))(scores)
    np.testing.assert_array_equal(kept, np.asarray(scores) > np.quantile(scores, 0.6))
    assert int(kept.sum()) == 40
    rows = jax.jit(lambda s: masks.binarize(s, 0.6, "layerwise"))(scores)
    np.testing.assert_array_equal(rows.sum(1), 10)
    assert bool(masks.binarize(scores, 0.0).all())
    # A tree: stacked layers are rows, and the threshold spans the leaves.
    tree = {"layers": {"k": scores[:3]}, "out": scores[3]}
    found = jax.jit(lambda t: masks.binarize(t, 0.6))(tree)
    np.testing.assert_array_equal(found["layers"]["k"], kept[:3])
    np.testing.assert_array_equal(found["out"], kept[3])
    # Equal scores at the threshold all go.
    assert int(masks.binarize(jnp.ones((4, 25)), 0.5, "global").sum()) == 0


def test_min_alive_saves_the_best_of_dead_layers_and_moves_the_threshold():
    scores = jnp.asarray([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [-4.0, -3.0, -2.0, -1.0]])
    np.testing.assert_array_equal((scores > np.quantile(scores, 0.5)).sum(1), [2, 4, 0])
    kept = jax.jit(lambda s: masks.binarize(s, 0.5, "global", 1))(scores)
    np.testing.assert_array_equal(kept[2], [False, False, False, True])
    assert kept.sum(1).tolist() == [1, 4, 1]  # still six: the raised one took a place
    high = jax.jit(lambda s: masks.binarize(s, 0.95, "global", 1))(scores)
    assert high.sum(1).tolist() == [1, 1, 1]
    rows = jax.jit(lambda s: masks.binarize(s, 0.9, "layerwise", 2))(scores)
    assert rows.sum(1).tolist() == [2, 2, 2]


def test_prices_and_schedules():
    assert float(masks.l1_penalty({"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(-0.5)})) == 3.5
    path = [float(masks.cubic_density(t, 1.0, 0.1, 10, 20)) for t in (0, 10, 15, 20, 99)]
    np.testing.assert_allclose(path, [1, 1, 0.1 + 0.9 / 8, 0.1, 0.1], atol=1e-6)
