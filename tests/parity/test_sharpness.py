"""SAM and both forms of ASAM against PyTorch, two explicit passes written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)
START = {
    "in": {"kernel": RNG.normal(size=(5, 8)) * 0.5, "bias": RNG.normal(size=8) * 0.1},
    "out": {"kernel": RNG.normal(size=(8, 3)) * 0.5, "bias": np.zeros(3)},
}
BATCHES = [(RNG.normal(size=(16, 5)), RNG.integers(0, 3, 16)) for _ in range(20)]
LEAVES = [("in", "kernel"), ("in", "bias"), ("out", "kernel"), ("out", "bias")]


def in_torch(scaled: str | None, rho: float, eta: float) -> list[np.ndarray]:
    """Parameters after 20 steps; ``scaled`` None is SAM."""
    params = [torch.tensor(START[a][b], dtype=torch.float32, requires_grad=True) for a, b in LEAVES]
    optimiser = torch.optim.SGD(params, lr=0.05, momentum=0.9)

    def backward(x: np.ndarray, y: np.ndarray) -> None:
        optimiser.zero_grad()
        x = torch.tensor(x, dtype=torch.float32)
        hidden = torch.tanh(x @ params[0] + params[1])
        loss = torch.nn.functional.cross_entropy(hidden @ params[2] + params[3], torch.tensor(y))
        loss.backward()

    for x, y in BATCHES:
        backward(x, y)
        with torch.no_grad():
            sizes = [
                w.abs() + eta if scaled == "all" or (scaled and w.ndim > 1) else torch.ones_like(w)
                for w in params
            ]
            norm = torch.stack(
                [(t * w.grad).norm() for t, w in zip(sizes, params, strict=True)]
            ).norm()
            steps = [t * t * w.grad * rho / norm for t, w in zip(sizes, params, strict=True)]
            for w, e in zip(params, steps, strict=True):
                w.add_(e)
        backward(x, y)
        with torch.no_grad():
            for w, e in zip(params, steps, strict=True):
                w.sub_(e)
        optimiser.step()
    return [w.detach().numpy() for w in params]


FORMS = {
    "sam": (lambda base: optim.sam(base, 0.1), (None, 0.1, 0.0)),
    "asam": (lambda base: optim.asam(base, 0.5), ("matrices", 0.5, 0.01)),
    "asam, port": (
        lambda base: optim.asam(base, 0.5, eta=0.0, scaled="all"),
        ("all", 0.5, 0.0),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps(form: str) -> None:
    make, (scaled, rho, eta) = FORMS[form]
    tx = make(optax.sgd(0.05, momentum=0.9))

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
        logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        grad_fn = lambda p: jax.grad(loss)(p, x, y)  # noqa: E731
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), START)
    state = tx.init(params)
    for x, y in BATCHES:
        params, state = step(params, state, jnp.asarray(x, jnp.float32), jnp.asarray(y))
    for (a, b), wanted in zip(LEAVES, in_torch(scaled, rho, eta), strict=True):
        np.testing.assert_allclose(params[a][b], wanted, atol=1e-5)
