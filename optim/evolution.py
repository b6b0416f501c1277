"""CMA-ES: a normal distribution that learns scales and directions from the order of values alone.

  x_i = m + sigma y_i,   y_i ~ N(0, C),   f(x_{1:l}) <= f(x_{2:l}) <= ...   i = 1..l
  m     <- m + sigma y_w,                 y_w = sum_{i <= mu} w_i y_{i:l}
  p_s   <- (1 - c_s) p_s + sqrt(c_s (2 - c_s) mu_eff) C^{-1/2} y_w
  sigma <- sigma exp((c_s / d_s) (|p_s| / E - 1)),   E = sqrt(N) (1 - 1/(4N) + 1/(21 N^2))
  h      = [ |p_s|^2 / (1 - (1 - c_s)^{2g}) < (2 + 4/(N + 1)) N ]
  p_c   <- (1 - c_c) p_c + h sqrt(c_c (2 - c_c) mu_eff) y_w
  C     <- (1 + c_1 (1 - h) c_c (2 - c_c) - c_1 - c_mu sum_i w_i) C
           + c_1 p_c p_c^T + c_mu sum_i w°_i y_{i:l} y_{i:l}^T

w°_i = w_i, and for the negative weights of the active form w_i N / |C^{-1/2} y_i|^2, which keeps
C positive definite. C = B D^2 B^T is decomposed once in 1 / (10 N (c_1 + c_mu)) generations (N =
500, 20 candidates: every fifth); in between, sampling and the norms use the last B and D. Under
``vmap`` the choice becomes a selection and every generation pays for the decomposition; a
``lax.scan`` does not.

Everything is a pure function of a pytree, in the dtype of the start: float64 where
``jax_enable_x64`` is on, float32 otherwise (enough for N = 500).

Hansen 2016, arXiv 1604.00772; Hansen and Ostermeier, Evolutionary Computation 9(2), 2001; as the
optimiser of black-box tuning: Sun et al., ICML 2022, arXiv 2201.03514.

Deviations: c_1 has the factor min(1, l/6) of the package ``cma``, which is 1 from six candidates
on. Its version 4 further caps c_s at 1/2 (it is above where mu_eff > N - 1), damps more where
mu_eff is not small beside N, and has a more exact E: here stand the formulas of the paper.
Candidates without a value (NaN, +inf) get no weight of either sign, and the other positive
weights are scaled to the sum 1; the package gives a NaN the median.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steppe.optim import check


class Constants(NamedTuple):
    """What follows from N and the number of candidates.

    Attributes:
      weights: [l], decreasing; the first mu are positive and sum to 1, those that follow are
        negative (0 in the form that is not active).
      mu: number of positive weights.
      mu_eff: 1 / sum of the squared positive weights.
      c_s, d_s: rate and damping of the step size.
      c_c: rate of p_c.
      c_1, c_mu: rates of the rank-one and the rank-mu update.
      length: E |N(0, I)|.
      gap: generations between two decompositions, not rounded.
    """

    weights: tuple[float, ...]
    mu: int
    mu_eff: float
    c_s: float
    d_s: float
    c_c: float
    c_1: float
    c_mu: float
    length: float
    gap: float


class CMAState(NamedTuple):
    """The distribution and its paths.

    Attributes:
      mean: m [N].
      sigma, start: step size now and in the beginning.
      covariance: C [N, N].
      basis, scales: B [N, N] (columns) and D [N], ascending, of the last decomposition.
      path_s, path_c: p_s, p_c [N].
      generation, decomposed: int32, ``tell`` calls so far and at the last decomposition.
      best, best_value: the best candidate ever [N] and its value; +inf before the first.
      recent: best values of the latest generations, newest first, +inf where there is none yet.
      spread: largest less smallest value of the last generation.
      failed: int32, candidates without a value (NaN, +inf) in the last generation.
    """

    mean: jax.Array
    sigma: jax.Array
    start: jax.Array
    covariance: jax.Array
    basis: jax.Array
    scales: jax.Array
    path_s: jax.Array
    path_c: jax.Array
    generation: jax.Array
    decomposed: jax.Array
    best: jax.Array
    best_value: jax.Array
    recent: jax.Array
    spread: jax.Array
    failed: jax.Array


class Stops(NamedTuple):
    """Why an optimisation may end; booleans.

    Attributes:
      target: the best value has been reached that was asked for.
      tol_fun: values differ too little, within the generation and over the latest ones.
      tol_x: steps are too small in every coordinate, and so is the path.
      condition: the axes of C differ too much.
      up_sigma: the step size has grown beyond all bounds: no minimum.
      no_effect: a fifth of a standard deviation does not change a coordinate of the mean.
      flat: all candidates of the last generation had the same value.
      broken: mean, step size or C are not finite, or no candidate had a value.
    """

    target: jax.Array
    tol_fun: jax.Array
    tol_x: jax.Array
    condition: jax.Array
    up_sigma: jax.Array
    no_effect: jax.Array
    flat: jax.Array
    broken: jax.Array


class CMA(NamedTuple):
    """The three functions of a CMA-ES.

    Attributes:
      init: ``(mean=None) -> CMAState``, at 0 or at a point [N].
      ask: ``(state, key) -> X`` [l, N], candidates.
      tell: ``(state, X, f) -> state`` with the values f [l], less being better.
    """

    init: Callable[..., CMAState]
    ask: Callable[[CMAState, jax.Array], jax.Array]
    tell: Callable[[CMAState, jax.Array, jax.Array], CMAState]


def cma_es(popsize: int, sigma0: float, dim: int, active: bool = True) -> CMA:
    """CMA-ES as three pure functions, which jit and vmap.

    Args:
      popsize: l, candidates a generation.
      sigma0: step size in the beginning, in units of x.
      dim: N.
      active: also learn from the worse half, by negative weights.

    Raises:
      ValueError: popsize below 2, dim below 1, sigma0 not positive and finite. From ``init`` and
        ``tell``: a point, candidates or values of another shape.
    """
    c = constants(dim, popsize, active)
    check.number(sigma0, "sigma0", "positive and finite", lambda v: 0 < v < math.inf)
    return CMA(
        functools.partial(_init, c, float(sigma0), dim),
        functools.partial(_ask, c),
        functools.partial(_tell, c),
    )


def constants(dim: int, popsize: int, active: bool = True) -> Constants:
    """The constants of N dimensions and l candidates.

    Raises:
      ValueError: as :func:`cma_es`.
    """
    check.number(popsize, "popsize", "a whole number >= 2", _whole(2))
    check.number(dim, "dim", "a whole number >= 1", _whole(1))
    n = float(dim)
    raw = math.log((popsize + 1) / 2) - np.log(np.arange(1, popsize + 1))
    # The middle one of an odd number is 0, but for the rounding.
    raw[np.abs(raw) < 1e-12] = 0.0
    good, bad = np.where(raw > 0, raw, 0.0), np.where(raw < 0, -raw, 0.0)
    good = good / good.sum()
    mu_eff = 1.0 / float((good**2).sum())
    c_1 = min(1.0, popsize / 6) * 2 / ((n + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))
    weights = good
    if active and c_mu > 0:
        mu_bad = float(bad.sum() ** 2 / (bad**2).sum())
        most = min(
            1 + c_1 / c_mu,
            1 + 2 * mu_bad / (mu_eff + 2),
            (1 - c_1 - c_mu) / (n * c_mu),
        )
        weights = good - bad / bad.sum() * most
    c_s = (mu_eff + 2) / (n + mu_eff + 3)
    return Constants(
        weights=tuple(float(w) for w in weights),
        mu=int((good > 0).sum()),
        mu_eff=mu_eff,
        c_s=c_s,
        d_s=1 + c_s + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1),
        c_c=(4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n),
        c_1=c_1,
        c_mu=c_mu,
        length=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2)),
        gap=1 / (10 * n * (c_1 + c_mu)),
    )


def _whole(least: int) -> Callable[[float], bool]:
    return lambda value: value >= least and value % 1 == 0


def stops(
    state: CMAState,
    *,
    target: float = -math.inf,
    tol_fun: float = 1e-11,
    tol_x: float = 1e-11,
    condition: float = 1e14,
    up_sigma: float = 1e20,
) -> Stops:
    """Why the optimisation of ``state`` may end, as data: nothing is decided here.

    Args:
      target, tol_fun, tol_x, condition, up_sigma: bounds, see :class:`Stops`; the defaults are
        those of the package ``cma``.
    """
    deviations = state.sigma * jnp.sqrt(jnp.diagonal(state.covariance))
    known = jnp.isfinite(state.recent)
    full = known.all()
    highest = jnp.where(known, state.recent, -jnp.inf).max()
    lowest = jnp.where(known, state.recent, jnp.inf).min()
    flat = (state.generation > 0) & (state.spread == 0)
    numbers = (state.mean, state.sigma, state.covariance, state.scales)
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    values = state.recent[0]
    return Stops(
        target=state.best_value <= target,
        tol_fun=full & (highest - lowest < tol_fun) & (state.spread < tol_fun),
        tol_x=(deviations < tol_x).all() & (state.sigma * jnp.abs(state.path_c) < tol_x).all(),
        condition=(state.scales[-1] / state.scales[0]) ** 2 > condition,
        up_sigma=state.sigma / state.start > up_sigma * state.scales[-1],
        no_effect=(state.mean == state.mean + 0.2 * deviations).any(),
        flat=flat,
        broken=~finite | ((state.generation > 0) & ~(values < jnp.inf)),
    )


def _init(
    c: Constants, sigma0: float, dim: int, mean: Float[Array, " N"] | None = None
) -> CMAState:
    start = jnp.zeros(dim) if mean is None else jnp.asarray(mean)
    if start.shape != (dim,):
        raise ValueError(f"mean must have shape ({dim},), got {start.shape}")
    dtype = start.dtype if jnp.issubdtype(start.dtype, jnp.floating) else jnp.zeros(()).dtype
    start = start.astype(dtype)
    sigma, inf = jnp.asarray(sigma0, dtype), jnp.asarray(jnp.inf, dtype)
    zeros, eye, zero = jnp.zeros(dim, dtype), jnp.eye(dim, dtype=dtype), jnp.zeros((), jnp.int32)
    kept = 10 + math.ceil(30 * dim / len(c.weights))
    return CMAState(
        mean=start,
        sigma=sigma,
        start=sigma,
        covariance=eye,
        basis=eye,
        scales=jnp.ones(dim, dtype),
        path_s=zeros,
        path_c=zeros,
        generation=zero,
        decomposed=zero,
        best=start,
        best_value=inf,
        recent=jnp.full(kept, jnp.inf, dtype),
        spread=inf,
        failed=zero,
    )


def _ask(c: Constants, state: CMAState, key: jax.Array) -> Float[Array, "l N"]:
    shape = (len(c.weights), state.mean.shape[0])
    normal = jax.random.normal(key, shape, state.mean.dtype)
    return state.mean + state.sigma * ((normal * state.scales) @ state.basis.T)


def _tell(
    c: Constants, state: CMAState, points: Float[Array, "l N"], values: Float[Array, " l"]
) -> CMAState:
    dtype, dim = state.mean.dtype, state.mean.shape[0]
    x, f = jnp.asarray(points, dtype), jnp.asarray(values, dtype)
    wanted = (len(c.weights), dim)
    if x.shape != wanted or f.shape != wanted[:1]:
        raise ValueError(
            f"tell takes candidates {wanted} and values {wanted[:1]}, got {x.shape} and {f.shape}"
        )
    usable = f < jnp.inf  # NaN is not
    f = jnp.where(usable, f, jnp.inf)
    order = jnp.argsort(f, stable=True)
    f, x, usable = f[order], x[order], usable[order]
    count = usable.sum().astype(jnp.int32)

    best, best_value = state.best, state.best_value
    better = f[0] < best_value
    finite = jnp.where(usable, f, -jnp.inf).max()
    noted = state._replace(
        generation=state.generation + 1,
        best=jnp.where(better, x[0], best),
        best_value=jnp.where(better, f[0], best_value),
        recent=jnp.concatenate([f[:1], state.recent[:-1]]),
        spread=jnp.where(count > 0, finite - f[0], jnp.inf),
        failed=len(c.weights) - count,
    )
    # Candidates that broke may hold anything: 0 times NaN is NaN.
    y = jnp.where(usable[:, None], (x - state.mean) / state.sigma, 0.0)
    moved = _moved(c, noted, y, usable)
    # Without a single value there is nothing to learn.
    return jax.tree.map(lambda a, b: jnp.where(count > 0, a, b), moved, noted)


def _moved(c: Constants, state: CMAState, y: jax.Array, usable: jax.Array) -> CMAState:
    """Mean, paths, step size and C after a generation; y [l, N] are its steps, best first."""
    dtype, n = y.dtype, y.shape[1]
    weights = jnp.asarray(c.weights, dtype) * usable
    good = jnp.where(weights > 0, weights, 0.0)
    total = good.sum()
    good = good / jnp.where(total > 0, total, 1.0)
    weights = jnp.where(weights > 0, good, weights)
    mu_eff = 1.0 / jnp.maximum((good**2).sum(), 1e-30)
    step = good @ y

    def whitened(v: jax.Array) -> jax.Array:
        return (v @ state.basis) / state.scales

    turned = whitened(step) @ state.basis.T
    path_s = (1 - c.c_s) * state.path_s + jnp.sqrt(c.c_s * (2 - c.c_s) * mu_eff) * turned
    squared = (path_s**2).sum()
    age = state.generation.astype(dtype)
    started = 1 - (1 - c.c_s) ** (2 * age)
    steady = (squared / started < (2 + 4 / (n + 1)) * n).astype(dtype)
    path_c = (1 - c.c_c) * state.path_c
    path_c = path_c + steady * jnp.sqrt(c.c_c * (2 - c.c_c) * mu_eff) * step

    # 1e-9, as in the package: the length of a step of 0.
    lengths = (jnp.sqrt((whitened(y) ** 2).sum(1)) + 1e-9) ** 2
    scaled = jnp.where(weights < 0, weights * n / lengths, weights)
    kept = 1 + c.c_1 * (1 - steady) * c.c_c * (2 - c.c_c) - c.c_1 - c.c_mu * weights.sum()
    covariance = (
        kept * state.covariance
        + c.c_1 * jnp.outer(path_c, path_c)
        + c.c_mu * (scaled[:, None] * y).T @ y
    )
    covariance = (covariance + covariance.T) / 2

    # e at most in one generation, as in the package.
    turn = jnp.clip((c.c_s / c.d_s) * (jnp.sqrt(squared) / c.length - 1), -1.0, 1.0)
    due = state.generation - state.decomposed >= c.gap
    basis, scales = jax.lax.cond(due, _decompose, lambda _: (state.basis, state.scales), covariance)
    return state._replace(
        mean=state.mean + state.sigma * step,
        sigma=state.sigma * jnp.exp(turn),
        covariance=covariance,
        basis=basis,
        scales=scales,
        path_s=path_s,
        path_c=path_c,
        decomposed=jnp.where(due, state.generation, state.decomposed),
    )


def _decompose(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """B and D of C; what rounding made too small or negative is lifted to a relative epsilon."""
    values, vectors = jnp.linalg.eigh(covariance)
    least = jnp.finfo(values.dtype).eps * jnp.maximum(values[-1], 0)
    return vectors, jnp.sqrt(jnp.maximum(values, least))


def run(
    algorithm: CMA,
    f: Callable[[jax.Array], jax.Array],
    state: CMAState,
    key: jax.Array,
    generations: int,
) -> tuple[CMAState, dict[str, Any]]:
    """``generations`` of asking and telling as one scan. Jit it.

    Args:
      f: values [l] of candidates [l, N].

    Returns:
      The state, and by generation ``best`` (of the generation), ``sigma`` and ``failed``.
    """

    def body(state: CMAState, key: jax.Array) -> tuple[CMAState, dict[str, Any]]:
        points = algorithm.ask(state, key)
        state = algorithm.tell(state, points, f(points))
        return state, {"best": state.recent[0], "sigma": state.sigma, "failed": state.failed}

    return jax.lax.scan(body, state, jax.random.split(key, generations))
