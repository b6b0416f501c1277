"""Rotary embeddings: golden numbers, invariances, scalings, context extension."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.decoder import DecoderConfig
from steppe.models.rotary import (
    Rotary,
    apply_rotary,
    extend_context,
    rope_freqs,
    rotate,
    xpos_scale,
)

D = 128
# base, factor on positions, s(D) at 1000, 4000, 10000, and the mean over [8k, 32k)
DECAY = {
    "rope": (1e4, 1.0, (1.799, 0.093, -0.316), -0.385),
    "interpolated": (1e4, 1 / 8, (4.724, 3.377, 2.373), 1.025),
    "abf": (5e5, 1.0, (5.569, 2.776, 2.116), 2.236),
}


def score_of_ones(distance, base, alpha):
    theta = np.asarray(rope_freqs(D, base), np.float64)
    return 2 / math.sqrt(D) * np.cos(np.outer(distance, theta) * alpha).sum(-1)


@pytest.mark.parametrize("name", DECAY)
def test_decay_of_the_score_of_all_ones(name):
    base, alpha, values, mean = DECAY[name]
    np.testing.assert_allclose(
        score_of_ones(np.array([1000, 4000, 10000]), base, alpha), values, atol=1.5e-3
    )
    np.testing.assert_allclose(
        score_of_ones(np.arange(8000, 32000), base, alpha).mean(), mean, atol=1e-3
    )
    one = jnp.ones((1, 1, 1, D))
    at = lambda m: apply_rotary(one, jnp.array([m]), rope_freqs(D, base), scale=alpha)  # noqa: E731
    for distance, value in zip((0, 1000), (11.31, values[0]), strict=True):
        got = float((at(distance) * at(0)).sum()) / math.sqrt(D)
        assert got == pytest.approx(value, abs=5e-3)


@pytest.mark.parametrize(
    ("base", "alpha", "value"), [(1e4, 1, 0.1094), (1e4, 0.25, 0.0290), (5e5, 1, 0.0788)]
)
def test_granularity(base, alpha, value):
    theta = rope_freqs(D, base) * alpha
    assert 2 / D * np.sin(theta).sum() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(),
        Rotary(base=5e5),
        Rotary(scaling="linear", factor=4.0),
        Rotary(scaling="llama3", factor=4.0, original=64),
        Rotary(scaling="yarn", factor=4.0, original=64),
        Rotary(xpos=True),
        Rotary(fraction=0.5),
    ],
    ids=["rope", "abf", "linear", "llama3", "yarn", "xpos", "partial"],
)
def test_scores_depend_on_the_distance_alone(rotary, layout):
    rotary = dataclasses.replace(rotary, layout=layout)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 32))

    def score(m, n):
        a, b = (rotary.turn(jnp.array([p]), 32) for p in (m, n))
        return float((rotate(q, a.queries, layout) * rotate(k, b.keys, layout)).sum())

    for m, n, t in ((5, 2, 40), (90, 3, 111), (7, 7, 200)):
        assert score(m, n) == pytest.approx(score(m + t, n + t), abs=1e-4)


def test_norms_stay_and_layouts_are_permutations():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    positions, freqs = jnp.arange(5), rope_freqs(16)
    half = apply_rotary(x, positions, freqs)
    np.testing.assert_allclose(
        jnp.linalg.norm(half, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    order = np.arange(16).reshape(2, 8).T.reshape(-1)  # (0, 8, 1, 9, ...)
    other = apply_rotary(x[..., order], positions, freqs, layout="interleaved")
    np.testing.assert_allclose(other, half[..., order], atol=1e-6)
    same = apply_rotary(x, positions, freqs, scale=1.0)
    np.testing.assert_array_equal(same, half)
    part = apply_rotary(x, positions, rope_freqs(8))
    np.testing.assert_array_equal(part[..., 8:], x[..., 8:])


def test_scalings_reduce_to_plain():
    plain = Rotary().freqs(64)
    np.testing.assert_array_equal(plain, rope_freqs(64))
    for scaling in ("linear", "llama3", "yarn"):
        np.testing.assert_allclose(Rotary(scaling=scaling).freqs(64), plain, rtol=1e-6)
    positions = jnp.arange(-3, 4)
    np.testing.assert_allclose(xpos_scale(positions, 8, gamma=1e9), 1.0, atol=1e-5)
    assert (xpos_scale(positions, 8)[-1] < 1).all()


def test_angles_are_float32_whatever_the_dtype():
    x = jnp.ones((1, 1, 1, 64))
    at = jnp.array([4001])
    exact = apply_rotary(x, at, rope_freqs(64))
    low = apply_rotary(x.astype(jnp.bfloat16), at, rope_freqs(64))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.01)


def test_extend_context():
    config = DecoderConfig("llama", 40, 16, 2, 2, 32, positions=64)
    longer = extend_context(config, max_len=256)
    assert (longer.max_length, longer.rotary.base) == (256, 5e5)
    a, b = (jax.eval_shape(c.build().init, jax.random.key(0)) for c in (config, longer))
    assert jax.tree.map(lambda x: x.shape, a) == jax.tree.map(lambda x: x.shape, b)
    with pytest.raises(ValueError, match="at least the present 64"):
        extend_context(config, max_len=32)
    with pytest.raises(ValueError, match="rotary embeddings"):
        extend_context(dataclasses.replace(config, rotary=None), max_len=256)
    scaled = dataclasses.replace(config, rotary=Rotary(scaling="linear", factor=2.0))
    with pytest.raises(ValueError, match="not both"):
        extend_context(scaled, max_len=256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rope_freqs(7), "even"),
        (lambda: Rotary(scaling="dynamic"), "one of none, linear"),
        (lambda: Rotary(layout="other"), "one of half"),
        (lambda: Rotary(fraction=0.0), "fraction"),
        (lambda: Rotary(scaling="llama3", low=4.0, high=4.0), "low < high"),
        (lambda: xpos_scale(jnp.arange(2), 3), "even d"),
        (lambda: apply_rotary(jnp.ones((1, 1, 1, 4)), jnp.arange(1), rope_freqs(8)), "pairs"),
        (lambda: apply_rotary(jnp.ones((1, 1, 1, 4)), jnp.arange(1), rope_freqs(4), layout="x"),
         "layout"),
    ],
)  # fmt: skip
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
