"""The quantisers against PyTorch's own: the same integers for the same steps and zero points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import fake_quant as fq

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

X = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32) * 3 + 0.7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine_of_a_tensor(bits):
    made = fq.affine(jnp.asarray(X), bits, fq.bounds(jnp.asarray(X), (0, 1)))
    scale, zero = float(made.scale[0, 0]), int(made.zero[0, 0])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Theirs is round(x / s) + z clipped to the integers, ours round(S x - Z): z = -Z, s = 1 / S.
    args = (torch.tensor(X), 1 / scale, -zero, low, high)
    theirs = torch.fake_quantize_per_tensor_affine(*args).numpy()
    back = np.round(theirs * scale).astype(int) - zero
    # An entry that lies within float32 rounding of the border between two integers may differ:
    # they multiply by 1 / s, we by S.
    tie = np.abs(np.abs(X * np.float64(scale) % 1) - 0.5) < 1e-4
    np.testing.assert_array_equal(np.asarray(made.q)[~tie], back[~tie])
    assert tie.mean() < 0.01
    ours = fq.fake_quant(jnp.asarray(X), bits, symmetric=False)
    np.testing.assert_allclose(np.asarray(ours)[~tie], theirs[~tie], atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_of_channels(bits):
    grid = fq.quantize(jnp.asarray(X), bits)
    top = 2 ** (bits - 1) - 1
    scale = torch.tensor(np.asarray(grid.scale[0]))
    zero = torch.zeros(48, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(torch.tensor(X), scale, zero, 1, -top, top)
    back = np.round(theirs.numpy() / np.asarray(grid.scale)).astype(int)
    tie = np.abs(np.abs(X / np.asarray(grid.scale, np.float64) % 1) - 0.5) < 1e-4
    np.testing.assert_array_equal(np.asarray(grid.q)[~tie], back[~tie])
    assert tie.mean() < 0.01
    np.testing.assert_allclose(
        np.asarray(fq.dequantize(*grid))[~tie], theirs.numpy()[~tie], atol=1e-5
    )


def test_gradients_clip_as_theirs_do():
    limits = (-2.0, 2.5)
    grad = jax.grad(
        lambda x: fq.fake_quant(x, 8, symmetric=False, ste_clip=True, limits=limits).sum()
    )(jnp.asarray(X))
    made = fq.affine(jnp.asarray(X), 8, limits)
    x = torch.tensor(X, requires_grad=True)
    scale, zero = float(made.scale), int(made.zero)
    torch.fake_quantize_per_tensor_affine(x, 1 / scale, -zero, -128, 127).sum().backward()
    # Theirs lets those pass whose integer is in range, ours whose value is: half a step apart.
    near = (np.abs(X - limits[0]) < 1 / scale) | (np.abs(X - limits[1]) < 1 / scale)
    np.testing.assert_array_equal(np.asarray(grad)[~near], x.grad.numpy()[~near])
