"""Merging entry by entry: averages, task vectors and their arithmetic, spherical interpolation.

  average           theta = sum_i w_i theta_i,               w_i = 1/N unless weights are given
  task vectors      tau_i = theta_i - theta_0
  task arithmetic   theta = theta_0 + lam sum_i tau_i        lam = 1/N averages, lam < 0 forgets
  slerp             theta = (sin((1-t) phi) a + sin(t phi) b) / sin(phi),  cos(phi) = a.b / |a||b|

Task vectors of N tasks are one tree, stacked on axis 0 of every leaf. Sums are in float32
whatever the dtype of the leaves, and are returned in it. Integer and boolean leaves are never
merged: they are copied from the base, or from the first model where there is none. A leaf of
the base that the task vectors do not hold is copied too.

Wortsman et al., ICML 2022 (model soups, arXiv 2203.05482); Ilharco et al., ICLR 2023 (task
arithmetic, 2212.04089); Shoemake, SIGGRAPH 1985 (slerp).

Deviations: slerp is taken tensor by tensor as in the published tools, a stacked leaf counting
as one tensor a layer; nearly parallel tensors (|cos| > 0.9995) are interpolated linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.models.tree import Params

PARALLEL = 0.9995


def mergeable(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers; others are copied, never merged."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def total(parts: Sequence[jax.Array], weights: Sequence[Any] | None = None) -> jax.Array:
    """``sum_i weights_i parts_i`` in float32.

    Written out rather than reduced over a stacked axis: on a CPU that is one pass at the speed
    of memory, and a reduction over the leading axis takes 25 times as long.
    """
    terms = [part.astype(jnp.float32) for part in parts]
    if weights is not None:
        terms = [term * jnp.asarray(w, jnp.float32) for term, w in zip(terms, weights, strict=True)]
    out = terms[0]
    for term in terms[1:]:
        out = out + term
    return out


def rows(leaf: jax.Array) -> list[jax.Array]:
    """The tasks' slices of a stacked leaf."""
    return [leaf[i] for i in range(leaf.shape[0])]


def tasks(taus: Mapping[str, Any]) -> int:
    """N, the number of tasks that are stacked in ``taus``.

    Raises:
      ValueError: there is no leaf, or the leaves disagree.
    """
    flat = tree.flatten(taus)
    if not flat:
        raise ValueError("taus hold no parameter: there is nothing to merge")
    counts = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in flat.items()}
    first = next(iter(counts))
    for path, count in counts.items():
        if count is None or count != counts[first] or count < 1:
            raise ValueError(
                f"every leaf of taus must have the tasks on axis 0: {first!r} has "
                f"{counts[first]}, {path!r} has {count}"
            )
    return int(flat[first].shape[0])


def check_models(thetas: Sequence[Mapping[str, Any]]) -> None:
    """Checks that there is a model and that all hold the same paths and shapes.

    Raises:
      ValueError: names the first path that differs.
    """
    if not thetas:
        raise ValueError("there must be at least one model to merge, got none")
    for number, theta in enumerate(thetas[1:], 1):
        tree.same_structure(thetas[0], theta, ("model 0", f"model {number}"))


def apply(
    theta0: Mapping[str, Any],
    taus: Mapping[str, Any],
    fn: Callable[[str, jax.Array, jax.Array], jax.Array],
) -> Params:
    """``fn(path, base leaf, stacked leaf)`` on every leaf of ``taus``; the others are copied.

    Raises:
      ValueError: ``taus`` hold a path that the base lacks, or a leaf of another shape.
    """
    tasks(taus)
    base, moves = tree.flatten(theta0), tree.flatten(taus)
    for path, move in moves.items():
        if path not in base:
            raise ValueError(f"taus hold {path!r}, which the base lacks: they are of another model")
        if tuple(move.shape[1:]) != tuple(base[path].shape):
            raise ValueError(
                f"taus at {path!r} must have shape (N, *{tuple(base[path].shape)}), "
                f"got {tuple(move.shape)}"
            )
    return tree.unflatten(
        {
            path: fn(path, leaf, moves[path]) if path in moves and mergeable(leaf) else leaf
            for path, leaf in base.items()
        }
    )


def average(thetas: Sequence[Mapping[str, Any]], weights: Sequence[Any] | None = None) -> Params:
    """The mean of the models, or their weighted mean.

    Args:
      thetas: N trees of one structure.
      weights: N numbers; they are divided by their sum. Default: all equal.

    Raises:
      ValueError: no model, different structures, or weights that are not finite, whose number
        is not N or whose sum is 0.
    """
    check_models(thetas)
    if weights is None:
        # One division after the sum: equal models give themselves to the last bit.
        def mean(path: str, *leaves: Any) -> Any:
            first = leaves[0]
            return (total(leaves) / len(leaves)).astype(first.dtype) if mergeable(first) else first

        return tree.map_with_path(mean, *thetas)
    if len(weights) != len(thetas):
        raise ValueError(f"weights must be {len(thetas)}, one a model, got {len(weights)}")
    whole = sum(weights[1:], weights[0])
    if not isinstance(whole, jax.core.Tracer) and float(whole) == 0:
        raise ValueError(f"weights must not sum to 0, got {tuple(weights)}")
    check_weights(weights)
    return weighted(thetas, [w / whole for w in weights])


def weighted(thetas: Sequence[Mapping[str, Any]], weights: Sequence[Any]) -> Params:
    """``sum_i weights_i theta_i``; the weights are taken as they are.

    Raises:
      ValueError: as :func:`average`.
    """
    check_models(thetas)
    if len(weights) != len(thetas):
        raise ValueError(f"weights must be {len(thetas)}, one a model, got {len(weights)}")
    check_weights(weights)

    def one(path: str, *leaves: Any) -> Any:
        if not mergeable(leaves[0]):
            return leaves[0]
        return total(leaves, weights).astype(leaves[0].dtype)

    return tree.map_with_path(one, *thetas)


def check_weights(weights: Sequence[Any]) -> None:
    """
    Raises:
      ValueError: a weight that is not finite; traced ones are not looked at.
    """
    known = [w for w in weights if not isinstance(w, jax.core.Tracer)]
    if not all(np.isfinite(np.asarray(w, np.float64)).all() for w in known):
        raise ValueError(f"weights must be finite numbers, got {tuple(weights)}")


def check_finite(name: str, value: Any) -> None:
    """
    Args:
      name: of the argument, for the message.
      value: a number, or a list or tuple of numbers. Arrays of jax are not looked at: they may
        be traced, or still on their way.

    Raises:
      ValueError: a number that is not finite.
    """
    for one in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(one, jax.Array) and not np.isfinite(np.asarray(one, np.float64)).all():
            raise ValueError(f"{name} must be finite, got {value}")


def task_vectors(theta0: Mapping[str, Any], thetas: Sequence[Mapping[str, Any]]) -> Params:
    """The task vectors ``theta_i - theta_0``, stacked: leaves [N, ...] in float32.

    Integer and boolean leaves are left out. Rounded to a narrower dtype of the base, vectors
    would no longer lead back to the models.

    Raises:
      ValueError: no model, or one whose structure is not the base's.
    """
    check_models(thetas)
    for number, theta in enumerate(thetas):
        tree.same_structure(theta0, theta, ("the base", f"model {number}"))
    models = [tree.flatten(theta) for theta in thetas]

    def one(base: Any, leaves: Sequence[Any]) -> jax.Array:
        low = base.astype(jnp.float32)
        return jnp.stack([leaf.astype(jnp.float32) - low for leaf in leaves])

    return tree.unflatten(
        {
            path: one(base, [model[path] for model in models])
            for path, base in tree.flatten(theta0).items()
            if mergeable(base)
        }
    )


def task_arithmetic(theta0: Mapping[str, Any], taus: Mapping[str, Any], lam: Any) -> Params:
    """``theta_0 + lam sum_i tau_i``, or ``theta_0 + sum_i lam_i tau_i``.

    Args:
      theta0: the base.
      taus: stacked task vectors.
      lam: a number (0.3 for eight tasks in the paper's setting; negative forgets), or one a
        task [N].

    Raises:
      ValueError: ``taus`` are not of this base; lam has neither shape, or is not finite.

    Example:
      >>> base = {"w": jnp.array([1.0, 1.0])}
      >>> taus = task_vectors(base, [{"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}])
      >>> task_arithmetic(base, taus, 0.5)["w"].tolist()
      [2.0, 0.5]
    """
    count = tasks(taus)
    coefficients = coefficient(lam, count)

    def one(path: str, base: jax.Array, tau: jax.Array) -> jax.Array:
        parts = rows(tau)
        if coefficients is None:
            move = jnp.asarray(lam, jnp.float32) * total(parts)
        else:
            move = total(parts, coefficients)
        return (base.astype(jnp.float32) + move).astype(base.dtype)

    return apply(theta0, taus, one)


def coefficient(lam: Any, count: int) -> list[Any] | None:
    """A coefficient a task, or None where one number serves all.

    Raises:
      ValueError: there are neither one nor N, or one is not finite.
    """
    check_finite("lam", lam)
    shape = np.shape(lam)
    if shape == ():
        return None
    if shape != (count,):
        raise ValueError(f"lam must be a number or {count} of them, one a task, got shape {shape}")
    return [lam[i] for i in range(count)]


def slerp(first: Mapping[str, Any], second: Mapping[str, Any], t: Any = 0.5) -> Params:
    """Spherical interpolation between two models, tensor by tensor.

    Args:
      first, second: the models at t = 0 and t = 1.
      t: where between them.

    Raises:
      ValueError: the models have different structures, or t is not finite.
    """
    check_models([first, second])
    check_finite("t", t)

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        x, y = a.astype(jnp.float32), b.astype(jnp.float32)
        # The angle is that of the directions: squares of the values may leave float32.
        u, v = (z / jnp.where((z != 0).any(), jnp.abs(z).max(), 1.0) for z in (x, y))
        norms = jnp.sqrt(jnp.sum(u * u)) * jnp.sqrt(jnp.sum(v * v))
        cosine = jnp.sum(u * v) / jnp.where(norms > 0, norms, 1.0)
        straight = (jnp.abs(cosine) > PARALLEL) | (norms == 0)
        angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
        share = jnp.asarray(t, jnp.float32)
        left = jnp.where(straight, 1 - share, jnp.sin((1 - share) * angle) / jnp.sin(angle))
        right = jnp.where(straight, share, jnp.sin(share * angle) / jnp.sin(angle))
        return (left * x + right * y).astype(a.dtype)

    def leaf(path: str, a: Any, b: Any) -> Any:
        if not mergeable(a):
            return a
        return jax.vmap(one)(a, b) if tree.is_stacked(path) else one(a, b)

    return tree.map_with_path(leaf, first, second)
