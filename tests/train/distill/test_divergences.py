"""Every divergence against its golden number, its identities, and numbers at the edge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from steppe.train import distill

STUDENT = np.array(
    [
        [1, 0.5, -0.5, 0],
        [0.2, 1.5, 0.1, -1],
        [0, 0, 2, 0.5],
        [-0.5, 0.3, 0.8, 1.2],
        [1, -1, 0, 0.5],
    ],
    np.float32,
)
TEACHER = np.array(
    [[2, 0, -1, 0.5], [0.5, 2.5, 0, -1], [0.3, -0.2, 1, 0.9], [-1, 0, 0.5, 3], [0.7, 0.2, 0.1, 0]],
    np.float32,
)
ENTROPY = 0.9425012
GOLDEN = {
    ("forward_kl", ()): 0.2013958,
    ("reverse_kl", ()): 0.2241242,
    ("tvd", ()): 0.2710945,
    ("jsd", (("beta", 0.5),)): 0.0508946,
    ("jsd", (("beta", 0.1),)): 0.0180555,
    ("jsd", (("beta", 0.9),)): 0.0195858,
    ("skew_forward_kl", (("alpha", 0.1),)): 1.1046429 - ENTROPY,
    ("skew_reverse_kl", (("alpha", 0.1),)): 0.1717024,
    ("symmetric_kl", (("beta", 0.9),)): 0.1 * 0.2013958 + 0.9 * 0.2241242,
}
each = pytest.mark.parametrize("kind", distill.KINDS)


def mean(kind, z_s=STUDENT, z_t=TEACHER, **how):
    return float(distill.token_divergence(kind, jnp.asarray(z_s), jnp.asarray(z_t), **how).mean())


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_numbers(case):
    kind, how = case
    assert mean(kind, **dict(how)) == pytest.approx(GOLDEN[case], abs=1e-5)


def test_the_soft_cross_entropy_is_the_forward_kl_and_the_teachers_entropy():
    p, log_q = np.exp(log_softmax(TEACHER, -1)), log_softmax(STUDENT, -1)
    assert -(p * log_q).sum(-1).mean() == pytest.approx(1.1438969, abs=1e-5)
    assert mean("forward_kl") + ENTROPY == pytest.approx(1.1438969, abs=1e-5)


def random(shape=(40, 9), scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for _ in range(2))


@each
def test_equal_distributions_give_0_and_no_gradient(kind):
    z, _ = random()
    # |p - q| has a kink at p = q, where the rounding of a moved logit would decide the sign.
    same = z if kind == "tvd" else z + 1.5
    value, grad = jax.value_and_grad(lambda s: distill.token_divergence(kind, s, same).sum())(z)
    np.testing.assert_allclose(value, 0, atol=1e-4)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


@each
def test_it_is_not_negative_and_ignores_a_constant(kind):
    z_s, z_t = random()
    value = distill.token_divergence(kind, z_s, z_t)
    assert (value >= -1e-6).all()
    moved = distill.token_divergence(kind, z_s - 7, z_t + 3)
    np.testing.assert_allclose(moved, value, rtol=1e-4, atol=1e-5)


@each
def test_temperature_divides_both_logits(kind):
    z_s, z_t = random()
    warm = distill.token_divergence(kind, z_s, z_t, temperature=2.0)
    np.testing.assert_allclose(warm, distill.token_divergence(kind, z_s / 2, z_t / 2), rtol=1e-6)


@each
def test_no_gradient_reaches_the_teacher(kind):
    z_s, z_t = random()
    grad = jax.grad(lambda t: distill.token_divergence(kind, z_s, t).sum())(z_t)
    assert not grad.any()


def test_bounds_and_pinsker():
    z_s, z_t = random(scale=6.0)
    tvd = distill.token_divergence("tvd", z_s, z_t)
    assert (tvd <= 1 + 1e-6).all()
    assert (distill.token_divergence("jsd", z_s, z_t) <= np.log(2) + 1e-6).all()
    for kind in ("forward_kl", "reverse_kl"):
        assert (2 * tvd**2 <= distill.token_divergence(kind, z_s, z_t) + 1e-5).all()


@pytest.mark.parametrize("kind", ["jsd", "tvd", "symmetric_kl"])
def test_symmetric_ones_are_symmetric(kind):
    z_s, z_t = random()
    there, back = (distill.token_divergence(kind, *pair) for pair in ((z_s, z_t), (z_t, z_s)))
    np.testing.assert_allclose(there, back, rtol=1e-5, atol=1e-6)


def test_limits_of_jsd_and_of_the_skew():
    assert mean("jsd", beta=0) == mean("forward_kl") == mean("skew_forward_kl", alpha=0)
    assert mean("jsd", beta=1) == mean("reverse_kl") == mean("skew_reverse_kl", alpha=0)
    for kind in ("skew_forward_kl", "skew_reverse_kl"):
        assert mean(kind, alpha=1) == 0
    near = 1e-3
    assert mean("jsd", beta=near) / near == pytest.approx(mean("forward_kl"), rel=0.02)
    assert mean("jsd", beta=1 - near) / near == pytest.approx(mean("reverse_kl"), rel=0.02)


@each
@pytest.mark.parametrize("edge", ["both masked", "far", "certain"])
def test_no_nan_at_the_edge(kind, edge):
    z_s, z_t = (np.array(z) for z in random((6, 7)))
    if edge == "both masked":
        z_s[:, 5:] = z_t[:, 5:] = -np.inf
    elif edge == "far":
        z_s, z_t = z_s * 1e4, z_t * 1e4
    else:
        z_s[:, 0], z_t[:, 0] = 3e4, -3e4

    def total(z):
        return distill.token_divergence(kind, z, jnp.asarray(z_t)).sum()

    value, grad = jax.value_and_grad(total)(jnp.asarray(z_s))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    if edge == "both masked":
        short = distill.token_divergence(kind, jnp.asarray(z_s[:, :5]), jnp.asarray(z_t[:, :5]))
        np.testing.assert_allclose(value, short.sum(), rtol=1e-5)
        assert not grad[:, 5:].any()


def test_the_student_that_forbids_what_the_teacher_allows():
    z_s, z_t = jnp.array([[0.0, -jnp.inf]]), jnp.array([[0.0, 0.0]])
    assert np.isinf(distill.token_divergence("forward_kl", z_s, z_t))[0]
    for kind in ("reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl"):
        value, grad = jax.value_and_grad(
            lambda s, kind=kind: distill.token_divergence(kind, s, z_t).sum()
        )(z_s)
        assert np.isfinite(value), kind
        assert np.isfinite(grad).all(), kind


@each
def test_bf16_logits_are_computed_in_float32(kind):
    z_s, z_t = (z.astype(jnp.bfloat16) for z in random())
    value = distill.token_divergence(kind, z_s, z_t)
    assert value.dtype == jnp.float32
    wide = distill.token_divergence(kind, z_s.astype(jnp.float32), z_t.astype(jnp.float32))
    np.testing.assert_array_equal(value, wide)


def test_masked_sums_do_not_see_the_padding():
    values = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, jnp.nan]])
    valid = jnp.array([[1, 1, 0], [1, 0, 0]])
    total, count = distill.masked_token_sum(values, valid)
    assert (float(total), float(count)) == (7.0, 3.0)
    assert float(distill.masked_token_mean(values, valid)) == pytest.approx(7 / 3)
    assert float(distill.masked_token_mean(values, 0 * valid)) == 0


def test_forward_kl_covers_the_modes_and_reverse_kl_picks_one():
    x = jnp.arange(50.0)
    p = jnp.exp(-0.5 * ((x - 12) / 2.5) ** 2) + 1.2 * jnp.exp(-0.5 * ((x - 38) / 2.5) ** 2)
    z_t = jnp.log(p / p.sum() + 1e-8)[None]

    def fit(kind, start):
        def loss(w):
            z_s = -0.5 * ((x - w[0]) / jnp.exp(w[1])) ** 2
            return distill.token_divergence(kind, z_s[None], z_t)[0]

        tx = optax.adam(0.1)

        def body(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.asarray(start)
        return jax.jit(lambda: jax.lax.scan(body, (w, tx.init(w)), length=600)[0][0])()

    middle, width = fit("forward_kl", [34.0, 1.0])
    assert 20 < middle < 33
    assert np.exp(width) > 9
    middle, width = fit("reverse_kl", [34.0, 1.0])
    assert abs(middle - 38) < 1
    assert np.exp(width) < 4


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("kl", {}, "kind must be one of forward_kl, .*, got 'kl'"),
        ("jsd", {"beta": 1.5}, r"beta must be a number in \[0, 1\], got 1.5"),
        ("skew_forward_kl", {"alpha": -0.1}, r"alpha must be a number in \[0, 1\], got -0.1"),
        ("forward_kl", {"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ("forward_kl", {"temperature": float("nan")}, "temperature .*, got nan"),
    ],
)
def test_bad_numbers(kind, how, message):
    with pytest.raises(ValueError, match=message):
        distill.token_divergence(kind, jnp.zeros((2, 3)), jnp.zeros((2, 3)), **how)


def test_logits_that_do_not_fit():
    with pytest.raises(ValueError, match="student has 3 classes and the teacher 4: .* vocab="):
        distill.token_divergence("tvd", jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="not of the same positions: give both models the same"):
        distill.token_divergence("tvd", jnp.zeros((2, 3)), jnp.zeros((1, 3)))
