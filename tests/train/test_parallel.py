"""replicated() is jax.pmap: same values, same collectives, same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train import parallel


def loss(w, x):
    return (jnp.tanh(x @ w) ** 2).mean()


def averaged(w, x):
    return jax.lax.pmean(loss(w, x), "devices")


def scanned(w, x):
    def body(total, row):
        return total + jnp.tanh(row @ w), None

    total, _ = jax.lax.scan(body, jnp.zeros(3), x)
    index = jax.lax.axis_index("devices")
    ring = [(i, (i + 1) % 8) for i in range(8)]
    return {
        "total": total,
        "index": index,
        "left": jax.lax.ppermute(total, "devices", ring),
        "all": jax.lax.all_gather(total, "devices"),
        "sum": jax.lax.psum(total, "devices"),
    }


def sgd(w, x):
    grads = jax.lax.pmean(jax.grad(loss)(w, x), "devices")
    return w - 0.1 * grads, jax.lax.psum(1, "devices")


def ascent(w, x):
    """The m of m-SAM: every device climbs along its own gradient, then they average."""
    own = jax.grad(loss)(w, x)
    near = w + 0.05 * own / jnp.linalg.norm(own)
    return jax.lax.pmean(jax.grad(loss)(near, x), "devices"), own


FUNCTIONS = {
    "gradient": jax.grad(loss),
    "gradient through a collective": jax.grad(averaged),
    "collectives in and after a scan": scanned,
    "sgd": sgd,
    "per-device ascent": ascent,
}


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_equals_pmap(name, broadcast):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 3)).astype(np.float32)
    x = rng.normal(size=(8, 5, 4)).astype(np.float32)
    in_axes = (None, 0) if broadcast else 0
    first = w if broadcast else np.stack([w] * 8)
    fn = FUNCTIONS[name]
    expected = jax.pmap(fn, axis_name="devices", in_axes=in_axes)(first, x)
    found = parallel.replicated(fn, in_axes=in_axes)(first, x)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)


def test_the_gradient_of_a_broadcast_argument_is_not_summed_behind_our_back():
    w, x = jnp.float32(2), jnp.arange(8.0)
    grads = parallel.replicated(jax.grad(lambda w, x: w * x), in_axes=(None, 0))(w, x)
    np.testing.assert_array_equal(grads, x)


def test_it_compiles_once_and_donates():
    traces = []

    def fn(x):
        traces.append(1)
        return x + 1

    run = parallel.replicated(fn, donate_argnums=0)
    x = run(jnp.zeros((8, 16)))
    x = jax.device_put(jnp.zeros((8, 16)), x.sharding)
    traces.clear()
    for _ in range(3):
        old, x = x, run(x)
        assert old.is_deleted()
    assert len(traces) <= 1
    np.testing.assert_array_equal(x, np.full((8, 16), 3))


def test_some_devices_are_enough():
    devices = jax.devices()[2:5]
    run = parallel.replicated(lambda x: jax.lax.psum(x, "d"), axis_name="d", devices=devices)
    out = run(jnp.arange(3.0))
    np.testing.assert_array_equal(out, [3, 3, 3])
    assert out.sharding.device_set == set(devices)


def test_bad_arguments_are_named():
    run = parallel.replicated(lambda x: x)
    with pytest.raises(ValueError, match=r"argument 0\['a'\] has shape \(4, 2\).*the 8 devices"):
        run({"a": jnp.zeros((4, 2))})
    with pytest.raises(ValueError, match=r"argument 0 has shape \(\)"):
        run(1.0)
    with pytest.raises(ValueError, match="in_axes must be 0 or None"):
        parallel.replicated(lambda x: x, in_axes=1)
    with pytest.raises(ValueError, match=r"is for 2 arguments, got 1"):
        parallel.replicated(lambda x: x, in_axes=(0, None))(jnp.zeros(8))
