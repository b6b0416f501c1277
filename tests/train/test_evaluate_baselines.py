"""Bootstrap, tests of significance and baselines, against scipy and scikit-learn."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from steppe.train import evaluate

# No deadline: the first example of a run imports and compiles.
relaxed = settings(deadline=None, max_examples=150, derandomize=True)


def classes(size, low=1, high=40):
    cell = st.integers(0, size - 1)
    return st.lists(st.tuples(cell, cell), min_size=low, max_size=high).map(
        lambda rows: tuple(np.array(c) for c in zip(*rows))
    )


# --- significance --------------------------------------------------------------------------


@relaxed
@given(classes(2))
def test_mcnemar_equals_the_binomial_test(pair):
    a, b = pair
    out = evaluate.mcnemar(a, b)
    n = out.only_first + out.only_second
    assert n == (a != b).sum()
    expected = scipy.stats.binomtest(out.only_first, n).pvalue if n else 1.0
    assert out.p_value == pytest.approx(expected)


def test_mcnemar_with_many_disagreements():
    a = np.arange(5000) < 2600
    out = evaluate.mcnemar(a, ~a)
    assert out[:2] == (2600, 2400)
    assert out.p_value == pytest.approx(scipy.stats.binomtest(2600, 5000).pvalue)
    with pytest.raises(ValueError, match="first must be >= 0 and < num_labels=2, got 2"):
        evaluate.mcnemar([2], [1])


def test_bootstrap_of_a_mean_is_close_to_theory():
    x = np.random.default_rng(0).normal(3, 2, 400)
    out = evaluate.bootstrap(np.mean, x, samples=2000, level=0.9)
    half = 1.645 * x.std() / 20
    assert out.value == x.mean()
    np.testing.assert_allclose(
        [out.low, out.high], [x.mean() - half, x.mean() + half], atol=0.1 * half
    )
    assert out == evaluate.bootstrap(np.mean, x, samples=2000, level=0.9)
    assert out != evaluate.bootstrap(np.mean, x, samples=2000, level=0.9, seed=1)


def test_bootstrap_takes_lists():
    z, y = [["B-X"], ["O"]] * 10, [["B-X"], ["B-X"]] * 10
    out = evaluate.bootstrap(lambda a, b: evaluate.entity_f1(a, b).f1, z, y, samples=50)
    assert out.value == pytest.approx(2 / 3)
    assert out.low < out.value < out.high


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    good = np.where(rng.random(300) < 0.9, y, 1 - y)
    bad = np.where(rng.random(300) < 0.7, y, 1 - y)
    out = evaluate.paired_bootstrap(evaluate.accuracy, y, bad, good, samples=500)
    assert out.difference == pytest.approx((good == y).mean() - (bad == y).mean())
    assert 0 < out.low < out.difference < out.high
    assert out.p_value == 1 / 501
    back = evaluate.paired_bootstrap(evaluate.accuracy, y, good, bad, samples=500)
    assert (back.difference, back.p_value) == (-out.difference, out.p_value)
    same = evaluate.paired_bootstrap(evaluate.accuracy, y, good, good, samples=50)
    assert same == (0.0, 0.0, 0.0, 0.95, 1.0)


def test_paired_bootstrap_is_about_the_level_under_the_null():
    rng = np.random.default_rng(3)
    rejected = 0
    for seed in range(100):
        y = np.zeros(200, int)
        a, b = (rng.random((2, 200)) < 0.3).astype(int)
        p = evaluate.paired_bootstrap(
            lambda z, y: (z == y).mean(), y, a, b, samples=200, seed=seed
        ).p_value
        rejected += p < 0.05
    assert rejected <= 12


def test_bad_resampling_is_named():
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        evaluate.bootstrap(np.mean, [1.0], samples=0)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        evaluate.bootstrap(np.mean, [1.0], level=95)
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate.bootstrap(np.mean, [])
    with pytest.raises(ValueError, match="column 0 has 1 rows but column 1 has 2"):
        evaluate.paired_bootstrap(evaluate.accuracy, [1], [1, 0], [1, 0])


# --- baselines -----------------------------------------------------------------------------


def test_majority():
    assert evaluate.majority([2, 1, 2, 0], [2, 2, 1]) == (2, pytest.approx(2 / 3))
    assert evaluate.majority([1, 0], [0]).label == 0


def blobs(n, d, c, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    x = np.random.default_rng(9).normal(size=(c, d))[y] * 0.7 + rng.normal(size=(n, d))
    return x + 5.0, y


@pytest.mark.parametrize("c", [2, 4])
def test_logistic_regression_equals_scikit_learn(c):
    x, y = blobs(300, 6, c)
    x = x * np.array([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0])
    xt, yt = blobs(100, 6, c, seed=1)
    xt = xt * np.array([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0])
    strength = 3.0
    mine = evaluate.logistic_regression((x, y), (xt, yt), strengths=[strength])
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegression(C=(2 if c == 2 else 1) / strength, tol=1e-8, max_iter=1000)
    theirs.fit(scaler.transform(x), y)
    np.testing.assert_allclose(
        mine.probs(xt), theirs.predict_proba(scaler.transform(xt)), atol=2e-4
    )
    assert mine.valid_accuracy == pytest.approx((mine.predict(xt) == yt).mean())
    again = evaluate.logistic_regression((x, y), (xt, yt), strengths=[strength])
    np.testing.assert_array_equal(mine.kernel, again.kernel)


def test_logistic_regression_chooses_the_strength_on_validation():
    rng = np.random.default_rng(0)
    x, y = blobs(60, 40, 2)
    x = np.concatenate([x, rng.normal(size=(60, 40))], 1)  # more features than rows: overfits
    xv, yv = blobs(200, 40, 2, seed=1)
    xv = np.concatenate([xv, rng.normal(size=(200, 40))], 1)
    strengths = (1e-3, 1.0, 30.0, 1e5)
    best = evaluate.logistic_regression((x, y), (xv, yv), strengths=strengths)
    each = {
        s: evaluate.logistic_regression((x, y), (xv, yv), strengths=[s]).valid_accuracy
        for s in strengths
    }
    assert best.valid_accuracy == pytest.approx(max(each.values()), abs=0.011)
    assert each[best.strength] == pytest.approx(max(each.values()), abs=0.011)


def test_logistic_regression_on_constant_features_is_the_majority():
    x, y = np.full((6, 3), 0.1), np.array([0, 1, 1, 1, 0, 1])
    model = evaluate.logistic_regression((x, y), (x, y), num_labels=3)
    assert model.predict(x).tolist() == [1] * 6
    assert np.isfinite(model.kernel).all()
    np.testing.assert_allclose(model.probs(x)[0, :2], [2 / 6, 4 / 6], atol=1e-2)


def test_bad_features_are_named():
    x, y = blobs(10, 3, 2)
    with pytest.raises(ValueError, match="strengths must be > 0"):
        evaluate.logistic_regression((x, y), (x, y), strengths=[0.0])
    with pytest.raises(ValueError, match="train features has 10 rows but train labels has 9"):
        evaluate.logistic_regression((x, y[1:]), (x, y))
    with pytest.raises(ValueError, match="train has 3 features but valid has 2"):
        evaluate.logistic_regression((x, y), (x[:, :2], y))
    with pytest.raises(ValueError, match="max_iter must be >= 1, got 0"):
        evaluate.logistic_regression((x, y), (x, y), max_iter=0)
    zeros, ones = np.zeros(3), np.ones(3)
    model = evaluate.LogisticRegression(np.eye(3), zeros, zeros, ones, 1.0, 0.5)
    with pytest.raises(ValueError, match="x must have 3 features, got 2"):
        model.predict(x[:, :2])
