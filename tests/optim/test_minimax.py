"""Two players: saddles of known games, neutral cases, oracles by hand, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.optim import minimax, sam

KEY = jax.random.key(0)
SGD = optax.sgd


def quadratic(x, y, key, a=1.0, b=2.0, c=1.0):
    """Saddle at (0, 0)."""
    return 0.5 * a * x**2 + b * x * y - 0.5 * c * y**2


def bilinear(x, y, key):
    return x * y


def two_sided_pl(x, y, key):
    """Neither convex nor concave, PL in both players; saddle at (0, 0)."""
    return x**2 + 3 * jnp.sin(x) ** 2 * jnp.sin(y) ** 2 - 4 * y**2 - 10 * jnp.sin(y) ** 2


def nonconvex(x, y, key):
    """max_y f = cos 2x + x^2 / 8 at y = sin x: nonconvex in x, strongly concave in y."""
    return jnp.cos(2 * x) + x**2 / 8 - 2 * (y - jnp.sin(x)) ** 2


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _played(algorithm, f, x, y, steps):
    return minimax.run(algorithm, f, x, y, KEY, steps)


def played(algorithm, f, x=1.0, y=1.0, steps=400):
    return _played(algorithm, f, jnp.float32(x), jnp.float32(y), steps)


def distance(out):
    return float(jnp.hypot(out[0], out[1]))


def test_one_step_by_hand():
    """x climbs by rho, descends by the gradient there; y ascends at the new x."""
    algorithm = minimax.sam_sga(SGD(0.1), SGD(0.2), rho=0.5)
    x, y, state, metrics = algorithm.step(
        algorithm.init(jnp.float32(1), jnp.float32(0.5)), jnp.float32(1), jnp.float32(0.5),
        quadratic, KEY,
    )  # fmt: skip
    # g = x + 2 y = 2 > 0, so e = 0.5; gradient at 1.5: 2.5
    np.testing.assert_allclose(x, 1 - 0.1 * 2.5, rtol=1e-6)
    np.testing.assert_allclose(y, 0.5 + 0.2 * (2 * 0.75 - 0.5), rtol=1e-6)
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics["min_norm"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["f"], 0.5 + 1.0 - 0.125, rtol=1e-6)


def test_a_quadratic_game_converges():
    start = float(np.hypot(1, 1))
    for algorithm in (
        minimax.sam_sga(SGD(0.02), SGD(0.05), rho=0.0),
        minimax.sam_sga(SGD(0.02), SGD(0.05), rho=0.0, k_min=3),
        minimax.descent_ascent(SGD(0.02), SGD(0.05)),
        minimax.extragradient(SGD(0.05), SGD(0.05)),
    ):
        assert distance(played(algorithm, quadratic)) < start / 100


def test_a_sign_error_in_the_ascent_diverges():
    wrong = optax.chain(optax.scale(-1.0), SGD(0.05))
    assert distance(played(minimax.sam_sga(SGD(0.02), wrong, rho=0.0), quadratic)) > 10


def test_sam_settles_within_its_radius():
    out = played(minimax.sam_sga(SGD(0.02), SGD(0.05), rho=0.01), quadratic, steps=800)
    assert distance(out) < 0.05


def test_a_decaying_radius_reaches_the_saddle():
    decay = lambda peak: lambda step: peak / jnp.sqrt(1.0 + step)  # noqa: E731
    algorithm = minimax.sam_sga(SGD(decay(0.2)), SGD(decay(0.5)), rho=decay(0.05))
    assert distance(played(algorithm, quadratic, steps=2000)) < 0.02


def test_a_bilinear_game_needs_the_extragradient():
    """Simultaneous steps spiral out, alternating ones go round, extragradient comes in."""
    assert distance(played(minimax.descent_ascent(SGD(0.1), SGD(0.1)), bilinear)) > 5
    around = distance(played(minimax.alternating(SGD(0.1), SGD(0.1)), bilinear))
    assert 0.5 < around < 3
    assert distance(played(minimax.extragradient(SGD(0.3), SGD(0.3)), bilinear)) < 1e-4


@pytest.mark.parametrize("rho", [0.0, 0.01])
def test_nonconvex_pl_games(rho):
    algorithm = minimax.sam_sga(SGD(0.02), SGD(0.02), rho)
    assert distance(played(algorithm, two_sided_pl, steps=800)) < 0.02 + 2 * rho
    x, y, *_ = played(minimax.sam_sga(SGD(0.005), SGD(0.1), rho), nonconvex, x=0.4, y=-1.0,
                      steps=1500)  # fmt: skip
    slope = -2 * np.sin(2 * x) + x / 4  # of max_y f
    assert abs(float(slope)) < 0.02 + 6 * rho
    np.testing.assert_allclose(y, np.sin(x), atol=0.02)


def noisy(x, y, key):
    """A sum over a drawn batch, with trees for players."""
    z = jax.random.normal(key, (8, 3))
    return (
        jnp.mean((z @ x["w"] + x["b"]) * jnp.tanh(z @ y["v"]))
        + 0.5 * jnp.sum(x["w"] ** 2)
        - 0.5 * jnp.sum(y["v"] ** 2)
    )


TREES = (
    {"w": jnp.array([1.0, -1.0, 0.5]), "b": jnp.float32(0.3)},
    {"v": jnp.array([0.2, 0.4, -0.3])},
)


def steps(algorithm, f, count=3):
    x, y = TREES
    state = algorithm.init(x, y)
    run = jax.jit(lambda s, x, y, k: algorithm.step(s, x, y, f, k))
    for number in range(count):
        x, y, state, metrics = run(state, x, y, jax.random.fold_in(KEY, number))
    assert run._cache_size() == 1
    return x, y, state, metrics


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rho_zero_is_sgd_sga_bitwise():
    plain = steps(minimax.alternating(optax.adam(0.1), optax.adam(0.1), 2), noisy)
    sharp = steps(minimax.sam_sga(optax.adam(0.1), optax.adam(0.1), 0.0, 2), noisy)
    equal(plain[:2], sharp[:2])
    away = steps(minimax.sam_sga(optax.adam(0.1), optax.adam(0.1), 0.1, 2), noisy)
    assert float(jnp.abs(away[0]["w"] - plain[0]["w"]).max()) > 1e-4


def test_against_a_loop_by_hand():
    rho, k = 0.1, 3
    algorithm = minimax.sam_sga(SGD(0.1), SGD(0.05), rho, k)
    x, y, _, _ = steps(algorithm, noisy, count=2)
    a, b = TREES
    for number in range(2):
        keys = jax.random.split(jax.random.fold_in(KEY, number), k + 1)
        for key in keys[:k]:
            g = jax.grad(noisy)(a, b, key)
            norm = jnp.sqrt(sum(jnp.sum(v**2) for v in jax.tree.leaves(g)))
            up = jax.tree.map(lambda w, g, n=norm: w + rho * g / n, a, g)
            a = jax.tree.map(lambda w, g: w - 0.1 * g, a, jax.grad(noisy)(up, b, key))
        up = jax.grad(noisy, argnums=1)(a, b, keys[k])
        b = jax.tree.map(lambda w, g: w + 0.05 * g, b, up)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6), (x, y), (a, b))


def test_a_game_in_two_parts_is_the_same_game():
    parts = minimax.Game(
        lambda y, key: (y, jax.random.normal(key, (8, 3)), key),
        lambda x, made: (noisy(x, made[0], made[2]), {"seen": made[1].mean()}),
    )
    algorithm = minimax.sam_sga(SGD(0.1), SGD(0.05), 0.1, 2)
    whole, split = steps(algorithm, noisy), steps(algorithm, parts)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6), whole[:2], split[:2])
    assert "seen" in split[3]


def test_the_inner_steps_are_one_loop():
    """The program does not grow with k_min."""
    sizes = []
    for k in (2, 50):
        algorithm = minimax.sam_sga(SGD(0.1), SGD(0.05), 0.1, k)
        text = jax.jit(lambda s, x, y, key, a=algorithm: a.step(s, x, y, noisy, key)).lower(
            algorithm.init(*TREES), *TREES, KEY
        )
        sizes.append(len(text.as_text().splitlines()))
    assert sizes[0] == sizes[1]


def test_a_frozen_player_and_an_empty_one():
    algorithm = minimax.sam_sga(SGD(0.1), SGD(0.05), 0.1, 2, k_max=0)
    _, y, state, metrics = steps(algorithm, noisy)
    equal(y, TREES[1])
    assert "f_max" not in metrics
    assert int(state.step) == 3
    algorithm = minimax.sam_sga(SGD(0.1), optax.adam(0.05), 0.1)
    out = algorithm.step(algorithm.init(TREES[0], {}), TREES[0], {},
                         lambda x, y, key: jnp.sum(x["w"] ** 2), KEY)  # fmt: skip
    assert out[1] == {}


def test_players_that_are_projected():
    """A zero-sum matrix game on simplices: the value of rock, paper, scissors with a bias."""
    payoff = jnp.array([[0.0, 1, -2], [-1, 0, 1], [2, -1, 0]])

    def simplex(v):
        return optax.projections.projection_simplex(v)

    algorithm = minimax.extragradient(SGD(0.1), SGD(0.1), project_min=simplex, project_max=simplex)
    start = jnp.array([1.0, 0, 0])
    x, y, *_ = jax.jit(
        lambda: minimax.run(algorithm, lambda x, y, key: x @ payoff @ y, start, start, KEY, 3000)
    )()
    np.testing.assert_allclose(x @ payoff @ y, 0, atol=1e-3)
    np.testing.assert_allclose(x, [0.25, 0.5, 0.25], atol=5e-3)


def test_optimisers_that_ask_for_a_gradient_elsewhere():
    """Also the ascending player may be sharpness-aware."""
    algorithm = minimax.alternating(sam(SGD(0.02), 0.01), sam(SGD(0.05), 0.01))
    assert distance(played(algorithm, quadratic, steps=800)) < 0.1


def test_bad_input():
    good = SGD(0.1)
    with pytest.raises(ValueError, match="rho must be a finite number >= 0 .*got -1"):
        minimax.sam_sga(good, good, rho=-1)
    with pytest.raises(ValueError, match="k_min must be a whole number >= 1, got 0"):
        minimax.sam_sga(good, good, k_min=0)
    with pytest.raises(ValueError, match="k_max must be a whole number >= 0, got -1"):
        minimax.alternating(good, good, k_max=-1)
    with pytest.raises(TypeError, match="max_tx must be an optax transform"):
        minimax.descent_ascent(good, 0.1)
    with pytest.raises(TypeError, match="project_min must be a function"):
        minimax.extragradient(good, good, project_min=3)
    algorithm = minimax.sam_sga(good, good)
    with pytest.raises(TypeError, match="f must be a function"):
        algorithm.step(algorithm.init(*TREES), *TREES, None, KEY)
    with pytest.raises(ValueError, match=r"f must give a scalar, got shape \(3,\)"):
        algorithm.step(algorithm.init(*TREES), *TREES, lambda x, y, key: x["w"], KEY)
