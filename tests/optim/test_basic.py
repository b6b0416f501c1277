"""AdamW and its schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim

PARAMS = {
    "layers": {
        "attn": {"kernel": jnp.full((2, 3, 3), 2.0), "bias": jnp.full((2, 3), 2.0)},
        "norm": {"scale": jnp.full((2, 3), 2.0), "bias": jnp.full((2, 3), 2.0)},
    },
    "embed": {"table": jnp.full((5, 3), 2.0)},
    "bias": jnp.full((3,), 2.0),
}


def test_biases_and_norms_are_not_decayed_and_the_rest_is():
    tx = optim.adamw(0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    moved = jax.tree.map(lambda u: float(np.abs(u).max()), updates)
    assert moved["layers"]["attn"]["kernel"] == pytest.approx(0.1 * 0.5 * 2.0)
    assert moved["embed"]["table"] == pytest.approx(0.1 * 0.5 * 2.0)
    assert moved["layers"]["attn"]["bias"] == moved["layers"]["norm"]["scale"] == 0
    assert moved["layers"]["norm"]["bias"] == moved["bias"] == 0
    own = optim.adamw(0.1, weight_decay=0.5, no_decay=("embed/.*",))
    updates, _ = own.update(zero, own.init(PARAMS), PARAMS)
    assert float(np.abs(updates["embed"]["table"]).max()) == 0
    assert float(np.abs(updates["bias"]).max()) > 0


def test_it_is_adam_with_decoupled_decay():
    """Loshchilov and Hutter, algorithm 2, in numpy."""
    rng = np.random.default_rng(0)
    lr, b1, b2, eps, decay = 1e-2, 0.9, 0.98, 1e-6, 0.1
    tx = optim.adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    state, x = tx.init(params), np.asarray(params["w"], np.float64)
    m = v = np.zeros_like(x)
    for t in range(1, 6):
        g = rng.normal(size=(4, 3)).astype(np.float32)
        # Arguments that it does not know, such as grad_fn, are ignored.
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params, grad_fn=None, value=1.0)
        params = optax.apply_updates(params, updates)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.astype(np.float64) ** 2
        x = x - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * x)
        np.testing.assert_allclose(params["w"], x, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "warmup", "end", "expected"),
    [
        ("constant", 0.0, 0.0, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 0.2, 0.0, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, 0.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("linear", 0.5, 0.0, [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.0, 0.5, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        ("cosine", 0.1, 0.0, [1, *(0.5 * (1 + np.cos(np.pi * np.arange(9) / 9)))]),
        ("cosine", 0.0, 0.2, [*(0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(10) / 10)))]),
    ],
)
def test_schedules_rise_and_fall_as_written(kind, warmup, end, expected):
    schedule = optim.schedule(kind, 3.0, 10, warmup=warmup, end=3.0 * end)
    found = [float(schedule(step)) for step in range(10)]
    np.testing.assert_allclose(found, 3.0 * np.asarray(expected), rtol=1e-5)
    traced = jax.jit(schedule)(jnp.int32(4))
    assert float(traced) == pytest.approx(found[4])


def test_a_schedule_drives_the_optimiser():
    tx = optim.adamw(optim.schedule("linear", 1.0, 4), weight_decay=0.0)
    params = {"w": jnp.ones(3)}
    state, sizes = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update({"w": jnp.ones(3)}, state, params)
        sizes.append(-float(updates["w"][0]))
    np.testing.assert_allclose(sizes, [1, 0.75, 0.5, 0.25], rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: optim.adamw(1e-3, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: optim.adamw(1e-3, b2=-0.1), r"b2 must be in \[0, 1\), got -0.1"),
        (lambda: optim.adamw(1e-3, eps=0.0), "eps must be > 0, got 0.0"),
        (lambda: optim.adamw(1e-3, weight_decay=-1.0), "weight_decay must be >= 0, got -1.0"),
        (lambda: optim.schedule("lineer", 1.0, 5), "one of linear, cosine, constant, got 'lineer'"),
        (lambda: optim.schedule("linear", -1.0, 5), "must be >= 0, got peak=-1.0"),
        (lambda: optim.schedule("linear", 1.0, 0), "steps must be >= 1, got 0"),
        (lambda: optim.schedule("linear", 1.0, 5, warmup=1.0), "warmup must be"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
