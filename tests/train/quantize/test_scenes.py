"""Drawn images: their spectrum, their regions, and what does not go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train.quantize import scenes

KEY = jax.random.key(1)


def slope(images):
    """Exponent of the amplitude over frequency, by least squares on the logarithms (numpy)."""
    side = images.shape[1]
    power = (np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2).mean((0, 3))
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    inside = (radius > 1.5 / side) & (radius < 0.5)
    return -np.polyfit(np.log(radius[inside]), 0.5 * np.log(power[inside]), 1)[0]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_a_texture_has_the_spectrum_asked_for(exponent):
    made = scenes.texture(KEY, (64, 32, 32, 3), (exponent, exponent))
    assert slope(np.asarray(made, np.float64)) == pytest.approx(exponent, abs=0.05)
    np.testing.assert_allclose(made.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(made.var((1, 2, 3)), 1, rtol=1e-4)


def test_channels_share_from_nothing_to_all():
    made = np.asarray(scenes.texture(KEY, (400, 16, 16, 3), (0, 0)), np.float64)
    alike = [np.corrcoef(image.reshape(-1, 3).T)[0, 1] for image in made]
    assert min(alike) < 0.15
    assert max(alike) > 0.85
    assert np.mean(alike) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shape", [(3, 8, 12, 3), (1, 7, 5, 1)])
def test_leaves_are_images_of_mean_0_and_variance_1(shape):
    made = jax.jit(scenes.dead_leaves, static_argnums=1)(KEY, shape)
    assert made.shape == shape
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(made.var((1, 2, 3)), 1, rtol=1e-3)
    again = scenes.dead_leaves(KEY, shape)
    np.testing.assert_allclose(made, again, atol=1e-4)
    assert float(jnp.abs(scenes.dead_leaves(jax.random.key(2), shape) - again).max()) > 0.1


def test_leaves_have_edges():
    """Steps between neighbours are rarer and larger than a texture's: regions, not waves."""

    def tail(images):
        steps = np.diff(np.asarray(images, np.float64), axis=2).ravel()
        return np.mean(steps**4) / np.mean(steps**2) ** 2

    smooth = (2.0, 2.0)
    plain = scenes.dead_leaves(KEY, (64, 32, 32, 1), layers=0, exponents=smooth)
    leaved = scenes.dead_leaves(KEY, (64, 32, 32, 1), layers=2, exponents=smooth)
    assert tail(leaved) > 3 * tail(plain)


def test_bad_input():
    with pytest.raises(ValueError, match=r"shape must be \(N, H, W, C\) .* got \(2, 1, 4, 3\)"):
        scenes.texture(KEY, (2, 1, 4, 3))
    with pytest.raises(ValueError, match="shape must be"):
        scenes.dead_leaves(KEY, (2, 4, 3))
    with pytest.raises(ValueError, match=r"exponents must be two finite .* got \(2, 1\)"):
        scenes.texture(KEY, (2, 4, 4, 3), (2, 1))
    with pytest.raises(ValueError, match="layers must be a whole number >= 0, got -1"):
        scenes.dead_leaves(KEY, (2, 4, 4, 3), layers=-1)
