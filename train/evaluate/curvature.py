"""Curvature of a loss from Hessian-vector products: eigenvalues, trace, spectral density.

  Lanczos      H Q = Q T + beta q e^T;  eigenpairs (theta, s) of T give (theta, Q s), and
               |H Q s - theta Q s| = beta |s_last|, the residual that is reported
  Hutchinson   tr H = E v^T H v,  v of random signs
  quadrature   density(x) = 1/P sum_p sum_i s_1i^2 delta(x - theta_i),  start of run p: signs

Every new vector is orthogonalised against all earlier ones, twice: without that float32
Lanczos finds the top eigenvalue again and again. So ``basis`` vectors of the size of the
parameters are held, in float32 and in the shards of the parameters (24 of them for 22.7 million
parameters: 2.2 GB). A smaller ``basis`` than ``iterations`` restarts from the best vectors found
(thick restart), at some more products for the same residual.

Lanczos 1950; thick restart: Wu and Simon, SIAM J. Matrix Anal. 2000; Hutchinson 1990;
stochastic Lanczos quadrature: Ubaru, Chen, Saad 2017; on networks: Ghorbani, Krishnan, Xiao,
ICML 2019 (arXiv 1901.10159). An eigenvalue of exact multiplicity m > 1 is found once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.optim.perturbation import global_norm
from steppe.train.evaluate import landscape
from steppe.train.evaluate.landscape import Loss, Placement, Tell
from steppe.train.types import Params

# Below this share of the largest entry of T, a new vector is rounding error.
_NOTHING = 1e-6
_ROUNDING = float(np.finfo(np.float32).eps)


class NotFinite(ValueError):
    """A Hessian-vector product is NaN or infinite: the loss has no curvature at the parameters."""


class Eigen(NamedTuple):
    """What :func:`top_eigenvalues` found; numpy float64.

    Attributes:
      values: largest eigenvalues, descending, [count].
      residuals: |H v - value v| of each unit vector v: an eigenvalue of H lies this close.
      vectors: the unit vectors, trees like the parameters; empty unless asked for.
      products: Hessian-vector products spent.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: tuple[Params, ...]
    products: int


class Trace(NamedTuple):
    """What :func:`trace` found.

    Attributes:
      mean: of the samples.
      standard_error: of the mean.
      samples: v^T H v of each probe, float64 [probes].
    """

    mean: float
    standard_error: float
    samples: np.ndarray


class Density(NamedTuple):
    """What :func:`spectral_density` found: P runs of at most m products each.

    Attributes:
      nodes: eigenvalues of each run's T, ascending, [P] arrays of at most m.
      weights: of the nodes; those of a run add up to 1.
      residuals: of the nodes as eigenvalues; small at the ends of the spectrum.
      samples: v^T H v of each start, float64 [P]: each an unbiased estimate of the trace.
    """

    nodes: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    residuals: tuple[np.ndarray, ...]
    samples: np.ndarray


class _Factor(NamedTuple):
    """A Lanczos factorisation: eigenpairs of T and where its last vector points."""

    values: np.ndarray  # ascending
    rotation: np.ndarray  # columns are the eigenvectors of T
    residuals: np.ndarray
    basis: Any
    products: int


def top_eigenvalues(
    loss: Loss,
    params: Params,
    key: jax.Array,
    *,
    count: int = 1,
    iterations: int = 30,
    tol: float = 1e-3,
    basis: int | None = None,
    vectors: bool = False,
    tell: Tell | None = None,
) -> Eigen:
    """The largest (not the largest in size) eigenvalues of the Hessian.

    Args:
      loss: ``params -> scalar``, such as from ``batched_loss``.
      params: the parameters that the Hessian is with respect to.
      key: of the random start.
      count: how many eigenvalues.
      iterations: most Hessian-vector products; each costs about two gradients.
      tol: stop when the residual of each of them is at most tol times its own size; 0 spends all
        iterations.
      basis: vectors held at once, see above; None = ``iterations``.
      vectors: also return the eigenvectors.
      tell: called after each product.

    Raises:
      ValueError: count < 1 or more than there are parameters or iterations, a basis that leaves
        no room to restart, tol < 0; a loss that is not finite.
    """
    size = tree.count(params)
    landscape.check_key(key)
    landscape.whole("count", count, 1)
    landscape.whole("iterations", iterations, 1)
    if count > min(iterations, size):
        raise ValueError(
            f"count={count} eigenvalues need as many iterations and parameters, got "
            f"iterations={iterations} and {size} parameters"
        )
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0, got {tol}")
    room = min(iterations if basis is None else landscape.whole("basis", basis, 1), size)
    if room < min(iterations, size) and room < count + 2:
        raise ValueError(f"basis must be at least count + 2 = {count + 2}, got {basis}")
    found = _lanczos(loss, params, key, count, iterations, room, tol, tell)
    order = np.argsort(found.values)[::-1][:count]
    kept: tuple[Params, ...] = ()
    if vectors:
        where = landscape.placement(params)
        kept = tuple(
            _combine(found.basis, _column(found.rotation[:, i], room), where=where) for i in order
        )
    return Eigen(found.values[order], found.residuals[order], kept, found.products)


def trace(
    loss: Loss, params: Params, key: jax.Array, *, probes: int = 16, tell: Tell | None = None
) -> Trace:
    """The trace of the Hessian, from one Hessian-vector product a probe.

    Exact with any number of probes where the Hessian is diagonal.

    Raises:
      ValueError: probes < 2, which leaves no standard error; a loss that is not finite.
    """
    landscape.check_key(key)
    landscape.whole("probes", probes, 2)
    argument, where = landscape.as_argument(loss), landscape.placement(params)
    samples = []
    for number, one in enumerate(jax.random.split(key, probes), start=1):
        signs = _signs(one, params, where=where)
        samples.append(float(_dot(signs, _product(argument, params, signs, where=where))))
        _check(samples[-1])
        if tell is not None:
            tell(number, probes)
    return summarise(samples)


def summarise(samples: Any) -> Trace:
    """Mean and standard error of estimates of the trace, from one or several sources."""
    values = np.asarray(samples, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Trace(float(values.mean()), float(error), values)


def spectral_density(
    loss: Loss,
    params: Params,
    key: jax.Array,
    *,
    probes: int = 2,
    iterations: int = 24,
    tell: Tell | None = None,
) -> Density:
    """The distribution of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Its extreme nodes are eigenvalues (see their residuals), its starts estimate the trace; it
    costs ``probes * iterations`` Hessian-vector products.

    Raises:
      ValueError: probes or iterations < 1; a loss that is not finite.
    """
    landscape.check_key(key)
    landscape.whole("probes", probes, 1)
    room = min(landscape.whole("iterations", iterations, 1), tree.count(params))
    nodes, weights, residuals, samples = [], [], [], []
    for number, one in enumerate(jax.random.split(key, probes)):

        def told(done: int, _: int, number: int = number) -> None:
            if tell is not None:
                tell(number * room + done, probes * room)

        found = _lanczos(loss, params, one, None, room, room, 0.0, told)
        share = found.rotation[0] ** 2
        nodes.append(found.values)
        weights.append(share / share.sum())
        residuals.append(found.residuals)
        samples.append(tree.count(params) * float(weights[-1] @ found.values))
    return Density(tuple(nodes), tuple(weights), tuple(residuals), np.asarray(samples))


def smooth(
    density: Density, *, width: float | None = None, points: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """The density with each node as a Gaussian, for a plot.

    Args:
      width: standard deviation; None = a hundredth of the range of the nodes.
      points: of the grid, over the range of the nodes and five widths on both sides.

    Returns:
      (eigenvalues [points], density [points]); the density integrates to 1.

    Raises:
      ValueError: width is not > 0, or so small that the grid steps over a Gaussian.
    """
    every = np.concatenate(density.nodes)
    low, high = float(every.min()), float(every.max())
    sigma = width if width is not None else (high - low) / 100 or max(abs(high), 1e-12) / 100
    if not sigma > 0:
        raise ValueError(f"width must be > 0, got {width}")
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, landscape.whole("points", points, 2))
    if grid[1] - grid[0] > 2 * sigma:
        raise ValueError(
            f"width={sigma:g} is less than half a step of the grid ({grid[1] - grid[0]:g}), which "
            f"would miss eigenvalues; give a larger width, or more points than {points}"
        )
    total = np.zeros(points)
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        bells = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2)
        total += bells @ weights / (sigma * math.sqrt(2 * math.pi))
    return grid, total / len(density.nodes)


def _lanczos(
    loss: Loss,
    params: Params,
    key: jax.Array,
    count: int | None,
    iterations: int,
    room: int,
    tol: float,
    tell: Tell | None,
) -> _Factor:
    """``count`` None: one run from a vector of signs, until nothing is left to find."""
    argument = landscape.as_argument(loss)
    where = landscape.placement(params)
    most = min(iterations, tree.count(params)) if room == tree.count(params) else iterations
    basis = landscape.stack_zeros(params, room, where)
    kind = "normal" if count is not None else "sign"
    vector = _start(key, params, kind=kind, where=where)
    small = np.zeros((room, room))
    held, products = 0, 0
    while True:
        product = _product(argument, params, vector, where=where)
        basis, vector, column, length = _extend(basis, vector, product, np.int32(held), where=where)
        jax.block_until_ready(vector)
        products += 1
        beta = float(length)
        _check(beta)
        small[:, held] = small[held, :] = np.asarray(column, np.float64)
        held += 1
        values, rotation = np.linalg.eigh(small[:held, :held])
        size = float(np.abs(values).max())
        ended = beta <= _NOTHING * size or beta == 0.0
        # No better than what rounding leaves of a product.
        residuals = (0.0 if ended else beta) * np.abs(rotation[-1])
        residuals = np.maximum(residuals, _ROUNDING * size)
        if tell is not None:
            tell(products, most)
        found = _Factor(values, rotation, residuals, basis, products)
        if products >= most:
            return found
        if ended:
            if count is None or held >= count:
                return found
            # The start lay in a subspace that H maps into itself: go on in the rest of space.
            fresh = jax.random.fold_in(key, products)
            vector = _apart(_start(fresh, params, kind="normal", where=where), basis, where=where)
            continue
        if count is not None and tol and held >= count:
            # To their own size: beside a large negative eigenvalue the first small one that comes
            # up at the top would look as if it were found.
            wanted = np.maximum(tol * np.abs(values[-count:]), _ROUNDING * size)
            if (residuals[-count:] <= wanted).all():
                return found
        if held == room:
            assert count is not None
            kept = min(room - 1, max(count + 1, room // 2))
            best = rotation[:, -kept:]
            whole_turn = np.zeros((room, room), np.float32)
            whole_turn[:, :kept] = best
            basis = _turn(basis, whole_turn, where=where)
            small = np.zeros((room, room))
            small[np.arange(kept), np.arange(kept)] = values[-kept:]
            held = kept


def _check(value: float) -> None:
    if not math.isfinite(value):
        raise NotFinite(
            "the Hessian-vector product is not finite; look for a loss of NaN or infinity at params"
        )


def _column(values: np.ndarray, room: int) -> np.ndarray:
    return np.pad(values.astype(np.float32), (0, room - len(values)))


@functools.partial(jax.jit, static_argnames=("kind", "where"))
def _start(key: jax.Array, params: Params, *, kind: str, where: Placement) -> Params:
    drawn = landscape.draw(key, params, kind, where)
    length = global_norm(drawn)
    return landscape.pin(jax.tree.map(lambda x: x / length, drawn), where)


@functools.partial(jax.jit, static_argnames=("where",))
def _product(loss: Any, params: Params, vector: Params, *, where: Placement) -> Params:
    found = landscape.hvp(loss, params, vector)
    return landscape.pin(jax.tree.map(lambda x: x.astype(jnp.float32), found), where)


@functools.partial(jax.jit, static_argnames=("where",), donate_argnums=(0, 1))
def _extend(
    basis: Any, vector: Params, product: Params, held: jax.Array, *, where: Placement
) -> tuple[Any, Params, jax.Array, jax.Array]:
    """Puts ``vector`` at row ``held`` and returns the next, column ``held`` of T, and beta."""
    basis = jax.tree.map(
        lambda rows, v: jax.lax.dynamic_update_index_in_dim(rows, v, held, 0), basis, vector
    )
    room = jax.tree.leaves(basis)[0].shape[0]
    none = jnp.zeros(room, jnp.float32)
    product, first = _against(basis, product, held + 1, none)
    product, column = _against(basis, product, held + 1, first)
    beta = global_norm(product)
    following = jax.tree.map(lambda x: x / jnp.where(beta == 0, 1.0, beta), product)
    return (
        landscape.pin(basis, where, leading=1),
        landscape.pin(following, where),
        column,
        beta,
    )


def _against(
    basis: Any, vector: Params, rows: jax.Array, found: jax.Array
) -> tuple[Params, jax.Array]:
    """``vector`` less its parts along the first ``rows`` rows, which are added to ``found``."""

    def remove(i: jax.Array, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        rest, parts = carry
        row = jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, i, 0, False), basis)
        part = landscape.dot(row, rest)
        return jax.tree.map(lambda x, r: x - part * r, rest, row), parts.at[i].add(part)

    return jax.lax.fori_loop(0, rows, remove, (vector, found))


@functools.partial(jax.jit, static_argnames=("where",))
def _apart(vector: Params, basis: Any, *, where: Placement) -> Params:
    """A unit vector at right angles to every row of ``basis``."""
    room = jax.tree.leaves(basis)[0].shape[0]
    none = jnp.zeros(room, jnp.float32)
    rest, _ = _against(basis, vector, room, none)
    rest, _ = _against(basis, rest, room, none)
    length = global_norm(rest)
    return landscape.pin(
        jax.tree.map(lambda x: x / jnp.where(length == 0, 1.0, length), rest), where
    )


@functools.partial(jax.jit, static_argnames=("where",), donate_argnums=(0,))
def _turn(basis: Any, rotation: jax.Array, *, where: Placement) -> Any:
    """Row i of the result is ``sum_j rotation[j, i] basis[j]``."""
    turned = jax.tree.map(
        lambda rows: jnp.einsum(
            "ji,j...->i...", rotation, rows, precision=jax.lax.Precision.HIGHEST
        ),
        basis,
    )
    return landscape.pin(turned, where, leading=1)


@functools.partial(jax.jit, static_argnames=("where",))
def _combine(basis: Any, column: jax.Array, *, where: Placement) -> Params:
    total = jax.tree.map(
        lambda rows: jnp.einsum("j,j...->...", column, rows, precision=jax.lax.Precision.HIGHEST),
        basis,
    )
    return landscape.pin(total, where)


@functools.partial(jax.jit, static_argnames=("where",))
def _signs(key: jax.Array, params: Params, *, where: Placement) -> Params:
    return landscape.pin(landscape.draw(key, params, "sign", where), where)


_dot = jax.jit(landscape.dot)
