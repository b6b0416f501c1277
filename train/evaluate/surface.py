"""Losses along lines and over planes through the parameters.

  L(w + a d)   L(w + a d1 + b d2)   L((1 - t) w0 + t w1)

A random direction means little by itself: a network whose weights are ten times larger, with
the layer after it ten times smaller, is the same function and looks ten times flatter.
*Filter normalisation* gives every filter of the direction the norm of the same filter of the
weights, ``d_f <- d_f |w_f| / |d_f|``, so that a = 1 is "as large as the weights" everywhere.
A filter is what makes one output: a column of a kernel [in, out], a row of a table [V, D];
stacked leaves hold such matrices for each layer. Biases and norms stay where they are.

Li, Xu, Taylor, Studer, Goldstein, NeurIPS 2018 (arXiv 1712.09913). Barrier of a line: Frankle
et al., ICML 2020 (arXiv 1912.05671).

Deviations: the authors' code draws a direction for every entry of a convolution and normalises
over one output channel; a transformer's embedding tables have no such channel, so each entry of
the vocabulary counts as one filter.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.optim.perturbation import dimensions, global_norm
from steppe.train.evaluate import landscape
from steppe.train.evaluate.landscape import Loss, Placement, Tell
from steppe.train.types import Params

Kind = Literal["filter", "tensor", "whole"]


class Curve(NamedTuple):
    """Losses along a line, numpy float64.

    Attributes:
      at: positions, [points]; the middle one is 0, at the parameters.
      losses: [points].
    """

    at: np.ndarray
    losses: np.ndarray


class Surface(NamedTuple):
    """Losses over a plane, numpy float64.

    Attributes:
      at: positions along both directions, [points].
      losses: [points, points]; row i at ``at[i]`` along the first direction, column j at
        ``at[j]`` along the second.
    """

    at: np.ndarray
    losses: np.ndarray


class Line(NamedTuple):
    """Losses between two sets of parameters, numpy float64.

    Attributes:
      at: from 0 (the first set) to 1, [points].
      losses: [points].
      barrier: largest excess over the straight line between the losses of the two ends; 0
        where there is none. Weights with a small barrier can be averaged.
    """

    at: np.ndarray
    losses: np.ndarray
    barrier: float


def directions(
    key: jax.Array,
    params: Params,
    kind: Kind = "filter",
    *,
    count: int = 1,
    vectors: bool = False,
) -> tuple[Params, ...]:
    """Random normal directions, scaled to the size of the parameters.

    The same key gives the same directions before they are scaled, so that two trained states of
    one model are seen from the same side.

    Args:
      params: the parameters that vary.
      kind: norm of what is matched: each filter's, each tensor's (of one layer), or the whole
        tree's.
      count: how many.
      vectors: also vary biases and norms, each matched as one tensor; else they are 0.

    Raises:
      ValueError: an unknown kind, count < 1, or nothing varies.
      TypeError: key is none.
    """
    if kind not in ("filter", "tensor", "whole"):
        raise ValueError(f"kind must be 'filter', 'tensor' or 'whole', got {kind!r}")
    landscape.check_key(key)
    landscape.whole("count", count, 1)
    matrices = [
        dimensions(path, leaf) >= 2
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    if not (vectors or any(matrices)):
        raise ValueError("params holds no matrix, so nothing would vary; pass vectors=True")
    where = landscape.placement(params)
    keys = jax.random.split(key, count)
    return tuple(_direction(k, params, kind=kind, vectors=vectors, where=where) for k in keys)


@functools.partial(jax.jit, static_argnames=("kind", "vectors", "where"))
def _direction(
    key: jax.Array, params: Params, *, kind: str, vectors: bool, where: Placement
) -> Params:
    drawn = landscape.draw(key, params, "normal", where)

    def one(path: Any, d: jax.Array, w: jax.Array) -> jax.Array:
        matrix = dimensions(path, w) >= 2
        if not (matrix or vectors):
            return jnp.zeros_like(d)
        if kind == "whole":
            return d
        layers = w.ndim - dimensions(path, w)
        axes = tuple(range(layers, w.ndim))
        if kind == "filter" and matrix:
            table = getattr(path[-1], "key", None) == "table"
            axes = axes[1:] if table else axes[:-1]
        return d * _ratio(_norm(w, axes), _norm(d, axes))

    scaled = jax.tree_util.tree_map_with_path(one, drawn, params)
    if kind == "whole":
        moved = jax.tree_util.tree_map_with_path(
            lambda p, w: w if vectors or dimensions(p, w) >= 2 else jnp.zeros_like(w), params
        )
        factor = _ratio(global_norm(moved), global_norm(scaled))
        scaled = jax.tree.map(lambda d: d * factor, scaled)
    return landscape.pin(scaled, where)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def _ratio(size: jax.Array, drawn: jax.Array) -> jax.Array:
    return size / jnp.where(drawn == 0, 1.0, drawn)


def surface_1d(
    loss: Loss, params: Params, direction: Params, span: float = 1.0, points: int = 21
) -> Curve:
    """Losses at ``w + a d`` for a from -span to span.

    Args:
      direction: tree like ``params``, such as from :func:`directions`.
      points: evaluations, evenly spaced; an odd number has one at the parameters themselves.

    Raises:
      ValueError: points < 2, span not above 0, a direction for other parameters.
    """
    at = _positions(span, points)
    tree.same_structure(params, direction, ("params", "direction"))
    none = jax.tree.map(lambda d: jnp.zeros_like(d), direction)
    found = _row(landscape.as_argument(loss), params, none, direction, jnp.float32(0), at)
    return Curve(_floats(at), _floats(found))


def surface_2d(
    loss: Loss,
    params: Params,
    pair: tuple[Params, Params],
    span: float = 1.0,
    points: int = 21,
    *,
    tell: Tell | None = None,
) -> Surface:
    """Losses at ``w + a d1 + b d2``: points x points evaluations.

    One compiled program evaluates a row and is used for all of them.

    Args:
      pair: two directions, trees like ``params``.
      span, points: along both, as :func:`surface_1d`.
      tell: called after each row.

    Raises:
      ValueError: as :func:`surface_1d`, or a pair that is not of two.
    """
    at = _positions(span, points)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            "pair must be two directions, such as directions(key, params, count=2), got "
            + (str(len(pair)) if isinstance(pair, (tuple, list)) else type(pair).__name__)
        )
    first, second = pair
    for number, direction in enumerate(pair, start=1):
        tree.same_structure(params, direction, ("params", f"direction {number}"))
    argument = landscape.as_argument(loss)
    rows = []
    for number in range(points):
        rows.append(_floats(_row(argument, params, first, second, at[number], at)))
        if tell is not None:
            tell(number + 1, points)
    return Surface(_floats(at), np.stack(rows))


def line(loss: Loss, start: Params, end: Params, points: int = 21) -> Line:
    """Losses on the straight line between two sets of parameters.

    Raises:
      ValueError: points < 2, or the trees hold other parameters.
    """
    landscape.whole("points", points, 2)
    tree.same_structure(start, end, ("start", "end"))
    at = np.linspace(0.0, 1.0, points, dtype=np.float32)
    found = _floats(_between(landscape.as_argument(loss), start, end, at))
    chord = np.linspace(found[0], found[-1], points)
    return Line(_floats(at), found, max(float((found - chord).max()), 0.0))


@jax.jit
def _row(
    loss: Any, params: Params, first: Params, second: Params, a: jax.Array, bs: jax.Array
) -> jax.Array:
    def at(b: jax.Array) -> jax.Array:
        moved = jax.tree.map(
            lambda w, d1, d2: (w.astype(jnp.float32) + a * d1 + b * d2).astype(w.dtype),
            params,
            first,
            second,
        )
        return landscape.scalar(loss, moved).astype(jnp.float32)

    return jax.lax.map(at, bs)


@jax.jit
def _between(loss: Any, start: Params, end: Params, ts: jax.Array) -> jax.Array:
    def at(t: jax.Array) -> jax.Array:
        moved = jax.tree.map(
            lambda p, q: ((1 - t) * p.astype(jnp.float32) + t * q.astype(jnp.float32)).astype(
                p.dtype
            ),
            start,
            end,
        )
        return landscape.scalar(loss, moved).astype(jnp.float32)

    return jax.lax.map(at, ts)


def _positions(span: float, points: int) -> np.ndarray:
    landscape.whole("points", points, 2)
    if not 0 < span < math.inf:
        raise ValueError(f"span must be a finite number > 0, got {span}")
    # Symmetric to the last bit, so that the middle of an odd number is 0 and not 1e-17.
    return (span * (2 * np.arange(points) - (points - 1)) / (points - 1)).astype(np.float32)


def _floats(values: Any) -> np.ndarray:
    return np.asarray(jax.block_until_ready(values), np.float64)
