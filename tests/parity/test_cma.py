"""CMA-ES against the package ``cma``: the same candidates and values give the same distribution."""

import warnings

import jax
import numpy as np
import pytest

from steppe.optim.evolution import cma_es, constants

cma = pytest.importorskip("cma")

pytestmark = pytest.mark.parity


def peer(start, sigma, popsize, c):
    """A strategy of the package with the two constants that its version 4 has changed, see
    ``evolution``, and C exactly the identity (it adds 1e-4 against equal eigenvalues)."""
    options = {"popsize": popsize, "verbose": -9, "seed": 1}
    options["AdaptSigma"] = cma.sigma_adaptation.CMAAdaptSigmaCSA
    es = cma.CMAEvolutionStrategy(start, sigma, options)
    n = len(start)
    es.sm.C, es.sm.B, es.sm.D = np.eye(n), np.eye(n), np.ones(n)
    es.adapt_sigma.initialize(es)
    es.adapt_sigma.cs, es.adapt_sigma.damps = c.c_s, c.d_s
    return es


def test_the_constants():
    for n, popsize in ((3, 4), (8, 7), (20, 20), (500, 20)):
        ours = constants(n, popsize)
        es = peer(np.ones(n), 1.0, popsize, ours)
        rates = es.sm.parameters(mueff=es.sp.weights.mueff, lam=popsize)
        assert ours.weights == pytest.approx(tuple(es.sp.weights), abs=1e-14)
        assert ours.mu == es.sp.weights.mu
        assert ours.mu_eff == pytest.approx(es.sp.weights.mueff, rel=1e-14)
        assert ours.c_1 == pytest.approx(rates["c1"], rel=1e-14)
        assert ours.c_mu == pytest.approx(rates["cmu"], rel=1e-14)
        assert ours.c_c == pytest.approx(es.sp.cc, rel=1e-14)
        assert ours.gap == pytest.approx(es.sm.lazy_update_gap, rel=1e-12)
    theirs = cma.CMAEvolutionStrategy(
        np.ones(500),
        1.0,
        {"popsize": 20, "verbose": -9, "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA},
    )
    theirs.adapt_sigma.initialize(theirs)
    # At the size of the paper nothing has changed.
    assert ours.c_s == pytest.approx(theirs.adapt_sigma.cs, rel=1e-14)
    assert ours.d_s == pytest.approx(theirs.adapt_sigma.damps, rel=1e-14)


@pytest.mark.parametrize(("n", "popsize"), [(3, 8), (24, 20)])
def test_many_generations(n, popsize, monkeypatch):
    """24 dimensions: several generations share a decomposition."""
    c = constants(n, popsize)
    monkeypatch.setattr(cma.utilities.math.Mh, "chiN", staticmethod(lambda dim: c.length))
    scale = np.logspace(0, 4, n)
    start = np.linspace(-1, 1.5, n)
    es = peer(start, 0.4, popsize, c)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm = cma_es(popsize, 0.4, n)
        tell = jax.jit(algorithm.tell)
        state = algorithm.init(start)
        shared = 0
        for _ in range(120):
            X = np.asarray(es.ask())
            f = (scale * X**2).sum(1)
            es.tell(list(X), list(f))
            state = tell(state, X, f)
            es.sm.update_now()  # the package decomposes when it is asked, steppe when it is told
            shared += int(state.decomposed) < int(state.generation)
            near = {"rtol": 1e-10, "atol": 1e-10}
            np.testing.assert_allclose(state.mean, es.mean, **near)
            np.testing.assert_allclose(state.sigma, es.sigma, **near)
            np.testing.assert_allclose(state.covariance, es.sm.C, **near)
            np.testing.assert_allclose(state.path_s, es.adapt_sigma.ps, **near)
            np.testing.assert_allclose(state.path_c, es.pc, **near)
            np.testing.assert_allclose(state.scales, es.sm.D, **near)
        assert (shared > 0) == (c.gap > 1)
        best = es.result.xbest
        np.testing.assert_array_equal(state.best, best)
        assert float(state.best_value) == es.result.fbest
