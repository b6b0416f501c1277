"""The quantisers: golden integers, invariants, gradients, numbers at the edge, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import fake_quant as fq

V = jnp.array([-1, -0.4, 0, 0.3, 0.77, 1.5], jnp.float32)
SYMMETRIC = {
    8: (0.01181102, [-85, -34, 0, 25, 65, 127]),
    4: (0.2142857, [-5, -2, 0, 1, 4, 7]),
    2: (1.5, [-1, 0, 0, 0, 1, 1]),
}
AFFINE = {
    8: (102, 26, [-128, -67, -26, 5, 53, 127], [-1, -0.40196, 0, 0.30392, 0.77451, 1.5]),
    4: (6, 2, [-8, -4, -2, 0, 3, 7], [-1, -0.33333, 0, 0.33333, 0.83333, 1.5]),
}


@pytest.mark.parametrize("bits", SYMMETRIC)
def test_golden_symmetric(bits):
    step, q = SYMMETRIC[bits]
    grid = fq.quantize(V[:, None], bits)
    np.testing.assert_array_equal(grid.q[:, 0], q)
    np.testing.assert_allclose(grid.scale, [[step]], rtol=1e-6)
    np.testing.assert_allclose(fq.fake_quant(V, bits), np.array(q) * step, atol=1e-5)
    np.testing.assert_array_equal(
        fq.fake_quant(V[:, None], bits, 1), fq.dequantize(grid.q, grid.scale)
    )


@pytest.mark.parametrize("bits", AFFINE)
def test_golden_affine(bits):
    scale, zero, q, back = AFFINE[bits]
    made = fq.affine(V, bits, fq.bounds(V, (0,)))
    np.testing.assert_array_equal(made.q, q)
    np.testing.assert_allclose([made.scale[0], made.zero[0]], [scale, zero], rtol=1e-6)
    np.testing.assert_allclose(fq.fake_quant(V, bits, symmetric=False), back, atol=1e-5)


def test_thirty_two_bits_are_the_input():
    assert fq.fake_quant(V, 32) is V
    assert fq.fake_quant(V, 32, symmetric=False) is V


W = jax.random.normal(jax.random.key(0), (3, 8, 5)) * jnp.array([1.0, 3, 0.1, 7, 0.5])


@pytest.mark.parametrize("bits", range(2, 9))
def test_invariants_of_kernels(bits):
    made = fq.fake_quant(W, bits, (0, -1))
    step = fq.steps(W, bits)
    assert bool((jnp.abs(made - W) <= step / 2 * (1 + 1e-5)).all())
    for layer in range(3):
        for channel in range(5):
            assert len(np.unique(made[layer, :, channel])) <= 2**bits
    tensorwise = jnp.stack([fq.fake_quant(w, bits) for w in W])
    error, whole = (jnp.square(x - W).sum((1, 2)) for x in (made, tensorwise))
    # Of a channel of its own size; by chance a coarse grid can fit one matrix better.
    assert float(error.sum()) <= float(whole.sum())
    np.testing.assert_allclose(fq.fake_quant(4 * W, bits, (0, -1)), 4 * made, rtol=1e-6)
    assert float(jnp.abs(fq.fake_quant(jnp.zeros((4, 2)), bits, 1)).max()) == 0


def test_a_symmetric_grid_holds_zero_exactly():
    w = W.at[:, 2].set(0.0)
    assert float(jnp.abs(fq.fake_quant(w, 3, (0, -1))[:, 2]).max()) == 0


def test_groups_are_channels_of_their_own():
    w = jax.random.normal(jax.random.key(1), (2, 64, 3))
    made = fq.fake_quant(w, 4, (0, 2), group=32)
    alone = [fq.fake_quant(w[:, i : i + 32], 4, (0, 2)) for i in (0, 32)]
    np.testing.assert_array_equal(made, jnp.concatenate(alone, axis=1))
    grid = fq.quantize(w, 4, group=32)
    assert grid.scale.shape == (2, 2, 3)
    np.testing.assert_array_equal(fq.dequantize(*grid), made)


@pytest.mark.parametrize("group", [None, 4])
def test_steps_of_least_error_are_the_best_of_the_grid(group):
    w = np.asarray(W, np.float64)
    split = w.reshape(3, -1, group or 8, 5)
    best, kept = np.full((3, split.shape[1], 5), np.inf), np.zeros((3, split.shape[1], 5))
    for factor in np.linspace(1, 0.5, 20):
        s = np.abs(split).max(-2, keepdims=True) * factor  # of 2 bits: one integer on either side
        error = np.square(np.clip(np.round(split / s), -1, 1) * s - split).sum(-2)
        kept = np.where(error < best, s[..., 0, :], kept)
        best = np.minimum(error, best)
    found = fq.steps(W, 2, group=group, fit="mse")
    np.testing.assert_allclose(found, kept, rtol=1e-5)
    grid = fq.quantize(W, 2, group=group, fit="mse")
    axes = (0, -1)
    made = fq.fake_quant(W, 2, axes, group=group, scale=found)
    np.testing.assert_array_equal(made, fq.dequantize(*grid))
    noise = jnp.square(made - W).sum()
    assert noise < 0.9 * jnp.square(fq.fake_quant(W, 2, axes, group=group) - W).sum()
    slope = jax.grad(lambda x: fq.fake_quant(x, 2, axes, group=group, scale=found).sum())(W)
    np.testing.assert_array_equal(slope, jnp.ones_like(W))
    with pytest.raises(ValueError, match="fit must be 'absmax' or 'mse', got 'best'"):
        fq.steps(W, 2, fit="best")


def test_tokens_have_ranges_of_their_own():
    x = jax.random.normal(jax.random.key(2), (2, 3, 16)) * jnp.array([1.0, 50, 0.01])[:, None]
    made = fq.fake_quant(x, 8, (0, 1), symmetric=False)
    width = x.max(-1) - x.min(-1)
    # Half a step from rounding x, and half a step from rounding where the grid begins.
    assert bool((jnp.abs(made - x).max(-1) <= width / 255 * 1.001).all())
    np.testing.assert_array_equal(made[0, 1], fq.fake_quant(x[0, 1], 8, symmetric=False))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_passes_straight_through(symmetric):
    def total(x):
        return fq.fake_quant(x, 3, symmetric=symmetric).sum()

    np.testing.assert_array_equal(jax.grad(total)(V), jnp.ones(6))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_straight_through(symmetric):
    limits = (-0.9, 0.9)

    def total(x, clip):
        return fq.fake_quant(x, 4, symmetric=symmetric, ste_clip=clip, limits=limits).sum()

    np.testing.assert_array_equal(jax.grad(total)(V, True), [0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(jax.grad(total)(V, False), jnp.ones(6))
    made = fq.fake_quant(V, 4, symmetric=symmetric, limits=limits)
    assert float(jnp.abs(made).max()) <= 0.9 * 1.1
    own = jax.grad(lambda x: fq.fake_quant(x, 4, ste_clip=True).sum())(V)
    np.testing.assert_array_equal(own, jnp.ones(6))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_constants_whoever_gives_them(symmetric):
    def total(x, scale):
        limits = (scale * x.min(), scale * x.max())
        return fq.fake_quant(x, 4, symmetric=symmetric, limits=limits).sum()

    by_x, by_scale = jax.grad(total, (0, 1))(V, 1.0)
    np.testing.assert_array_equal(by_x, jnp.ones(6))
    assert float(by_scale) == 0


def test_bf16_is_rounded_in_float32():
    x = W.astype(jnp.bfloat16)
    made = fq.fake_quant(x, 8, (0, -1))
    assert made.dtype == jnp.bfloat16
    wide = fq.fake_quant(x.astype(jnp.float32), 8, (0, -1))
    np.testing.assert_array_equal(made, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_stays_visible(bad, symmetric):
    x = jnp.stack([V, V.at[2].set(bad)])
    made = jax.jit(lambda x: fq.fake_quant(x, 8, 0, symmetric=symmetric))(x)
    assert bool(jnp.isfinite(made[0]).all())
    assert bool(jnp.isnan(made[1]).any())


def test_a_constant_token_comes_back():
    x = jnp.array([[3.0, 3, 3], [0, 0, 0], [-2, -2, -2]])
    np.testing.assert_allclose(fq.fake_quant(x, 8, 0, symmetric=False), x, rtol=1e-6)


def test_moving_ranges():
    first = (jnp.float32(-1), jnp.float32(2))
    assert fq.ema_range(None, first) == first
    low, high = fq.ema_range(first, (jnp.float32(-2), jnp.float32(4)), 0.9)
    np.testing.assert_allclose([low, high], [-1.1, 2.2], rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 9, 16, 0, -4, 4.0, True, "8"])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match="bits must be 2 to 8, or 32 for no quantisation, got"):
        fq.fake_quant(V, bits)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got"):
        fq.quantize(W, bits)


def test_bad_groups_and_axes():
    with pytest.raises(ValueError, match=r"group must divide the 8 inputs \(axis -2\) .*got 3"):
        fq.fake_quant(W, 4, (0, 2), group=3)
    with pytest.raises(ValueError, match="use 32 or 64, or none"):
        fq.quantize(jnp.ones((64, 2)), 4, group=48)
    with pytest.raises(ValueError, match="group=4 needs symmetric=True"):
        fq.fake_quant(W, 4, symmetric=False, group=4)
    with pytest.raises(ValueError, match="axis must lie within the 3 axes of x, got 3"):
        fq.fake_quant(W, 4, 3)
    with pytest.raises(ValueError, match="axis must not hold the axis -2"):
        fq.fake_quant(W, 4, 1, group=4)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        fq.ema_range(None, (0, 1), 1)
