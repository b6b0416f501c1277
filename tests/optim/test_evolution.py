"""CMA-ES: its constants, every update against a numpy oracle, what it reaches on standard
functions, what it may depend on, and what it says of bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.optim import evolution
from steppe.optim.evolution import cma_es, constants


@pytest.fixture
def double():
    """float64 within a test."""
    with jax.enable_x64(True):
        yield


def test_the_constants_of_the_papers_setting():
    c = constants(500, 20)
    assert c.mu == 10
    assert c.mu_eff == pytest.approx(5.93880, abs=1e-5)
    assert c.c_1 == pytest.approx(7.9584e-6, rel=1e-4)
    assert c.c_mu == pytest.approx(3.45795e-5, rel=1e-5)
    assert c.c_c == pytest.approx(7.95970e-3, rel=1e-5)
    assert c.c_s == pytest.approx(1.55987e-2, rel=1e-5)
    assert c.d_s == pytest.approx(1.0155987, rel=1e-7)
    assert c.weights[:3] == pytest.approx((0.279615, 0.197189, 0.148973), abs=1e-6)
    assert sum(w for w in c.weights if w < 0) == pytest.approx(-1.2302, abs=1e-4)
    assert sum(w for w in c.weights if w > 0) == pytest.approx(1.0, abs=1e-12)
    assert 4 < c.gap < 5  # every fifth generation
    plain = constants(500, 20, active=False)
    assert min(plain.weights) == 0.0
    assert plain.weights[:10] == c.weights[:10]
    assert constants(7, 5).weights[2] == 0.0  # the middle one


def test_the_length_of_a_normal_vector():
    for n in (5, 50, 500):
        exact = math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
        assert constants(n, 10).length == pytest.approx(exact, rel=0.03 / n**2)


class Oracle:
    """The equations of the spec, one after the other, in numpy."""

    def __init__(self, n, popsize, sigma, start):
        raw = np.log((popsize + 1) / 2) - np.log(np.arange(1, popsize + 1))
        mu = popsize // 2
        self.w = np.where(np.arange(popsize) < mu, raw / raw[:mu].sum(), 0.0)
        self.mueff = 1 / (self.w**2).sum()
        me = self.mueff
        self.cc = (4 + me / n) / (n + 4 + 2 * me / n)
        self.c1 = 2 / ((n + 1.3) ** 2 + me)
        self.cmu = min(1 - self.c1, 2 * (0.25 + me + 1 / me - 2) / ((n + 2) ** 2 + me))
        self.cs = (me + 2) / (n + me + 3)
        self.ds = 1 + self.cs + 2 * max(0, np.sqrt((me - 1) / (n + 1)) - 1)
        bad = np.minimum(raw, 0)
        mubad = bad.sum() ** 2 / (bad**2).sum()
        size = min(
            1 + self.c1 / self.cmu,
            1 + 2 * mubad / (me + 2),
            (1 - self.c1 - self.cmu) / (n * self.cmu),
        )
        self.w = self.w + bad / abs(bad.sum()) * size
        self.n, self.mu, self.m, self.s = n, mu, np.array(start, float), sigma
        self.C, self.B, self.D = np.eye(n), np.eye(n), np.ones(n)
        self.ps, self.pc, self.g, self.at = np.zeros(n), np.zeros(n), 0, 0

    def tell(self, X, f):
        n, me = self.n, self.mueff
        self.g += 1
        Y = ((X - self.m) / self.s)[np.argsort(f, kind="stable")]
        root = self.B @ np.diag(1 / self.D) @ self.B.T
        yw = sum(self.w[i] * Y[i] for i in range(self.mu))
        self.m = self.m + self.s * yw
        self.ps = (1 - self.cs) * self.ps + np.sqrt(self.cs * (2 - self.cs) * me) * root @ yw
        norm2 = self.ps @ self.ps
        h = float(norm2 / (1 - (1 - self.cs) ** (2 * self.g)) < (2 + 4 / (n + 1)) * n)
        self.pc = (1 - self.cc) * self.pc + h * np.sqrt(self.cc * (2 - self.cc) * me) * yw
        C = (
            1 + self.c1 * (1 - h) * self.cc * (2 - self.cc) - self.c1 - self.cmu * self.w.sum()
        ) * self.C + self.c1 * np.outer(self.pc, self.pc)
        for w, y in zip(self.w, Y, strict=True):
            scale = w if w >= 0 else w * n / (np.linalg.norm(root @ y) + 1e-9) ** 2
            C = C + self.cmu * scale * np.outer(y, y)
        length = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        self.s *= np.exp(self.cs / self.ds * (np.sqrt(norm2) / length - 1))
        self.C = (C + C.T) / 2
        if self.g - self.at >= 1 / (10 * n * (self.c1 + self.cmu)):
            values, self.B = np.linalg.eigh(self.C)
            self.D, self.at = np.sqrt(values), self.g


@pytest.mark.parametrize("n", [4, 30])
def test_every_update_is_the_oracles(double, n):
    """30 dimensions: the decomposition is not due in every generation."""
    popsize, scale = 12, np.logspace(0, 3, n)
    init, ask, tell = cma_es(popsize, 0.7, n)
    ask, tell = jax.jit(ask), jax.jit(tell)
    start = np.linspace(-1, 2, n)
    state, oracle = init(start), Oracle(n, popsize, 0.7, start)
    skipped = 0
    for g in range(40):
        X = np.asarray(ask(state, jax.random.key(g)))
        f = (scale * X**2).sum(1)
        state = tell(state, X, f)
        oracle.tell(X, f)
        skipped += int(state.decomposed) < int(state.generation)
        for name, wanted in (
            ("mean", oracle.m),
            ("sigma", oracle.s),
            ("covariance", oracle.C),
            ("path_s", oracle.ps),
            ("path_c", oracle.pc),
            ("scales", oracle.D),
        ):
            np.testing.assert_allclose(getattr(state, name), wanted, rtol=1e-8, atol=1e-10)
    assert (skipped > 0) == (constants(n, popsize).gap > 1)
    X = np.asarray(ask(state, jax.random.key(0)))
    normal = np.asarray(jax.random.normal(jax.random.key(0), (popsize, n), jnp.float64))
    B, D = np.asarray(state.basis), np.asarray(state.scales)
    np.testing.assert_allclose(X, oracle.m + oracle.s * (normal * D) @ B.T, atol=1e-8)


def sphere(x):
    return (x**2).sum(-1)


def rosenbrock(x):
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def ellipsoid(x, condition=1e3):
    n = x.shape[-1]
    return (condition ** (jnp.arange(n) / (n - 1)) * x**2).sum(-1)


def test_it_reaches_what_the_package_reaches_on_an_ellipsoid(double):
    """N = 20, condition 1e3, 20 candidates, sigma 0.5 from 1, 200 generations: the package's median
    of log10 f is -2.3 over 10 seeds, from -2.7 to -1.5."""
    algorithm = cma_es(20, 0.5, 20)

    @jax.jit
    @jax.vmap
    def reached(key):
        state = algorithm.init(jnp.ones(20))
        state, _ = evolution.run(algorithm, ellipsoid, state, key, 200)
        return jnp.log10(ellipsoid(state.mean))

    found = np.asarray(reached(jax.random.split(jax.random.key(0), 10)))
    assert -2.9 < np.median(found) < -1.6
    assert found.min() > -4.0
    assert found.max() < -0.8


def test_sphere_and_rosenbrock(double):
    """Both in one program, from 0 and from 3."""
    algorithm = cma_es(12, 0.5, 6)

    @jax.jit
    def reached(key):
        near = evolution.run(algorithm, rosenbrock, algorithm.init(), key, 600)[0]
        far = evolution.run(algorithm, sphere, algorithm.init(jnp.full(6, 3.0)), key, 250)
        return near, *far

    curved, round_, rows = reached(jax.random.key(2))
    np.testing.assert_allclose(curved.mean, np.ones(6), atol=1e-4)
    assert float(round_.best_value) < 1e-15
    assert float(round_.best_value) == np.asarray(rows["best"]).min()
    assert np.asarray(rows["failed"]).sum() == 0


def test_only_the_order_of_the_values_counts(double):
    algorithm = cma_es(8, 0.5, 5)
    ask, tell = jax.jit(algorithm.ask), jax.jit(algorithm.tell)
    a = b = algorithm.init(np.ones(5))
    for g in range(15):
        X = ask(a, jax.random.key(g))
        f = sphere(np.asarray(X))
        a, b = tell(a, X, f), tell(b, X, np.exp(f))
    for name in ("mean", "sigma", "covariance", "path_s", "path_c", "best"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_a_turned_problem_is_the_same_problem(double):
    """From the same steps, turned: m, p_c and C turn along, sigma is the same."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    algorithm = cma_es(8, 0.5, 5)
    ask, tell = jax.jit(algorithm.ask), jax.jit(algorithm.tell)
    a, b = algorithm.init(np.ones(5)), algorithm.init(turn @ np.ones(5))
    for g in range(15):
        X = np.asarray(ask(a, jax.random.key(g)))
        f = X**2 @ np.logspace(0, 3, 5)
        a, b = tell(a, X, f), tell(b, X @ turn.T, f)
    np.testing.assert_allclose(b.mean, turn @ a.mean, atol=1e-10)
    np.testing.assert_allclose(b.covariance, turn @ a.covariance @ turn.T, atol=1e-10)
    np.testing.assert_allclose(b.sigma, a.sigma, rtol=1e-10)


def test_candidates_without_a_value_are_never_selected():
    algorithm = cma_es(8, 0.5, 3)
    tell = jax.jit(algorithm.tell)
    start = algorithm.init(jnp.ones(3))
    X = jax.jit(algorithm.ask)(start, jax.random.key(0))
    f = sphere(np.asarray(X))
    order = np.argsort(f)
    broken = f.copy()
    broken[order[0]], broken[order[2]] = np.nan, np.inf  # they would have been selected
    found = tell(start, X, broken)
    assert int(found.failed) == 2
    np.testing.assert_array_equal(found.best, X[order[1]])
    # The same whatever stood there.
    moved = X.at[order[0]].set(jnp.nan).at[order[2]].set(1e30)
    again = tell(start, moved, broken)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    # Six have a value, of which the first four keep their ratio.
    w = np.array(constants(3, 8).weights[:4])
    kept = [i for i in order if np.isfinite(broken[i])]
    wanted = (w / w.sum()) @ np.asarray(X)[kept[:4]]
    np.testing.assert_allclose(found.mean, wanted, rtol=1e-5)
    # Two have one: their weights are scaled to the sum 1.
    few = np.full(8, np.nan, np.float32)
    few[order[3]], few[order[5]] = 1.0, 2.0
    wanted = (w[:2] / w[:2].sum()) @ np.asarray(X)[[order[3], order[5]]]
    np.testing.assert_allclose(tell(start, X, few).mean, wanted, rtol=1e-5)
    none = tell(start, X, np.full(8, np.nan))
    for name in ("mean", "sigma", "covariance", "path_s", "path_c", "best", "best_value"):
        np.testing.assert_array_equal(getattr(none, name), getattr(start, name))
    assert int(none.failed) == 8
    assert bool(evolution.stops(none).broken)
    assert not any(map(bool, evolution.stops(found)))


def test_stops_are_data(double):
    algorithm = cma_es(6, 0.3, 2)
    ask, tell = jax.jit(algorithm.ask), jax.jit(algorithm.tell)

    def after(f, generations, **options):
        state = algorithm.init(np.ones(2))
        for g in range(generations):
            points = ask(state, jax.random.key(g))
            state = tell(state, points, f(np.asarray(points)))
        state = jax.tree.map(np.asarray, state)
        found = evolution.stops(state, **options)
        return {name for name, value in found._asdict().items() if bool(value)}

    assert after(sphere, 5) == set()
    assert after(sphere, 150, target=1e-3) >= {"target", "tol_fun"}
    assert "tol_x" in after(sphere, 60, tol_x=1e-2)
    assert "flat" in after(lambda x: np.zeros(len(x)), 1)
    assert "up_sigma" in after(lambda x: -x[:, 0], 60, up_sigma=10.0)
    assert "condition" in after(lambda x: x[:, 0] ** 2 + 1e8 * x[:, 1] ** 2, 90, condition=1e4)
    assert "no_effect" in after(lambda x: sphere(x - 1e3), 300)


def test_it_vmaps_and_stays_in_its_dtype():
    algorithm = cma_es(6, 0.3, 4)
    states = jax.vmap(algorithm.init)(jnp.arange(12.0).reshape(3, 4))
    keys = jax.random.split(jax.random.key(0), 3)
    X = jax.jit(jax.vmap(algorithm.ask))(states, keys)
    f = sphere(np.asarray(X))
    together = jax.jit(jax.vmap(algorithm.tell))(states, X, f)
    traced = jax.jit(algorithm.tell)
    alone = traced(algorithm.init(jnp.arange(4.0, 8.0)), X[1], f[1])
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1], b, atol=1e-5)
        assert a.dtype == b.dtype
        assert a.dtype in (jnp.float32, jnp.int32)
    traced(alone, X[2], f[2])
    assert traced._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cma_es(1, 0.5, 3), "popsize must be a whole number >= 2, got 1"),
        (lambda: cma_es(2.5, 0.5, 3), "popsize must be a whole number >= 2"),
        (lambda: cma_es(4, 0.5, 0), "dim must be a whole number >= 1, got 0"),
        (lambda: cma_es(4, 0.0, 3), "sigma0 must be positive and finite, got 0.0"),
        (lambda: cma_es(4, math.nan, 3), "sigma0 must be positive and finite"),
        (lambda: cma_es(4, -1, 3), "sigma0 must be positive"),
        (lambda: cma_es(4, 0.5, 3).init(jnp.zeros(2)), r"mean must have shape \(3,\)"),
        (
            lambda: cma_es(4, 0.5, 3).tell(
                cma_es(4, 0.5, 3).init(), jnp.zeros((3, 3)), jnp.ones(4)
            ),
            r"tell takes candidates \(4, 3\) and values \(4,\), got \(3, 3\)",
        ),
    ],
)
def test_mistakes(call, said):
    with pytest.raises(ValueError, match=said):
        call()
