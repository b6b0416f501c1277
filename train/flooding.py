"""Flooding, and how to find its level: gradient accordance.

  flooded loss      L~ = |L - b| + b, of the mean loss of the global batch
  accordance        of M samples or batches with gradients g_i at one point:
    dot             mean_{i != j} g_i . g_j     = (|sum g|^2 - sum |g|^2) / (M (M - 1))
    cos             mean_{i != j} cos(g_i, g_j) = (|sum g / |g||^2 - M) / (M (M - 1))
    sign            mean_{i != j} sign(g_i . g_j)
  level             b* = mean training loss at the first point where the accordance is <= 0

A step along g_i changes L_j by -eta g_i . g_j to first order: while the model learns what the
samples share, steps on one help the others; when the accordance turns it fits one at the
expense of the others. Run once without flooding, record accordance and mean training loss a
quarter of an epoch or so, and try a few values around b*, such as half and twice it.

Liu et al., Flooding-X, ACL 2022 (long papers, 386); Ishida et al., ICML 2020 (flooding,
arXiv 2002.08709); Fort et al., 2019 (stiffness, 1901.09491).

Deviations: the published code has no criterion; accordance follows the stiffness of Fort et
al., and over the steps of an epoch :func:`step_accordance` and :func:`loss_accordance`.

|.| is not linear: with micro-batches or devices take ``optim.flooding``, which sees the mean of
the whole batch. Log and select by the plain loss, never by the flooded one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from steppe.optim.perturbation import dot

Kind: TypeAlias = Literal["sign", "cos", "dot"]
# (params, batch) -> mean loss, a scalar in nats.
LossFn: TypeAlias = Callable[[Any, Any], jax.Array]


def flood(loss: Any, level: Any) -> jax.Array:
    """``|loss - level| + level`` of a mean loss, float32: the loss above the level.

    Raises:
      ValueError: the loss is not a scalar; of a vector see :func:`flood_per_example`.
    """
    mean = jnp.asarray(loss, jnp.float32)
    if mean.shape:
        raise ValueError(
            f"loss must be the mean of the batch, a scalar, got shape {mean.shape}: "
            "flood_per_example floods each loss by itself, which is another method"
        )
    return flood_per_example(mean, level)


def flood_per_example(losses: Any, level: Any) -> jax.Array:
    """``|loss - level| + level`` of every loss by itself, float32, of the shape of ``losses``."""
    away = jnp.asarray(losses, jnp.float32) - level
    # Not abs, whose derivative at 0 is 1 in JAX: exactly at the level there is no direction.
    return jax.lax.stop_gradient(jnp.sign(away)) * away + level


def gram(grads_stacked: Any) -> jax.Array:
    """The dot products [M, M] of M gradients, float32; leaves are [M, ...].

    Raises:
      ValueError: the leaves do not agree in M.
    """
    leaves = jax.tree.leaves(grads_stacked)
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every leaf must be [M, ...] with one M >= 1, got M of {sorted(counts)}")
    rows = [leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in leaves]
    products = (jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) for x in rows)
    return sum(products, jnp.float32(0))


def accordance_of_gram(products: jax.Array, kind: Kind = "cos") -> jax.Array:
    """Accordance from the dot products [M, M], a float32 scalar.

    A gradient of 0 has the cosine 0 with all others.

    Raises:
      ValueError: products are not square, M < 2, or an unknown kind.
    """
    _check_kind(kind)
    if products.ndim != 2 or products.shape[0] != products.shape[1]:
        raise ValueError(f"products must be [M, M], got shape {products.shape}")
    count = _check_count(products.shape[0])
    off = 1.0 - jnp.eye(count)
    if kind == "sign":
        values = jnp.sign(products)
    elif kind == "cos":
        norms = jnp.sqrt(jnp.diag(products))
        safe = jnp.where(norms == 0, 1.0, norms)
        values = products / safe[:, None] / safe[None, :]
    else:
        values = products
    return (values * off).sum() / (count * (count - 1))


def gradient_accordance(grads_stacked: Any, kind: Kind = "cos") -> jax.Array:
    """Accordance of M gradients at one point: 1 = all alike, 0 = orthogonal, < 0 = at odds.

    Args:
      grads_stacked: tree of [M, ...].
      kind: "cos" and "sign" lie in [-1, 1]; "dot" has the unit of a squared gradient.

    Raises:
      ValueError: leaves that do not agree in M, M < 2, or an unknown kind.
    """
    return accordance_of_gram(gram(grads_stacked), kind)


def gram_from_batches(
    loss_fn: LossFn,
    params: Any,
    batches: Iterable[Any],
    *,
    select: Callable[[Any], Any] | None = None,
) -> jax.Array:
    """The dot products [M, M] of the gradients of M batches, which are made one by one.

    The gradients of all batches seen so far are held: of a large model ``select`` a part of the
    tree, or take :func:`streaming_accordance`.

    Args:
      loss_fn: ``(params, batch) -> mean loss``.
      batches: of one shape, or each shape compiles its own gradient.
      select: ``gradient tree -> tree``, such as ``lambda g: g["layers"]``.

    Raises:
      ValueError: fewer than two batches.
    """
    grad = jax.jit(lambda p, batch: (select or _same)(jax.grad(loss_fn)(p, batch)))
    product = jax.jit(dot)
    seen: list[Any] = []
    rows: list[list[jax.Array]] = []
    for batch in batches:
        seen.append(grad(params, batch))
        rows.append([product(seen[-1], other) for other in seen])
    count = _check_count(len(rows))
    lower = jnp.stack([jnp.stack(row + [jnp.float32(0)] * (count - len(row))) for row in rows])
    return lower + jnp.tril(lower, -1).T


def streaming_accordance(
    loss_fn: LossFn, params: Any, batches: Iterable[Any], kind: Literal["cos", "dot"] = "cos"
) -> jax.Array:
    """Accordance of any number of batches in the memory of two gradients: no pair is formed.

    The mean over pairs follows from the norm of the sum and the sum of the squared norms.

    Raises:
      ValueError: fewer than two batches, or a kind without that identity.
    """
    if kind not in ("cos", "dot"):
        raise ValueError(f"kind must be 'cos' or 'dot', got {kind!r}: signs need gram_from_batches")

    @jax.jit
    def add(total: Any, squares: Any, params: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(params, batch)
        square = dot(grads, grads)
        scale = jnp.float32(1)
        if kind == "cos":
            scale = jnp.where(square == 0, 0.0, jax.lax.rsqrt(jnp.where(square == 0, 1.0, square)))
        total = jax.tree.map(lambda t, g: t + scale * g.astype(jnp.float32), total, grads)
        return total, squares + scale**2 * square

    total: Any = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.float32), params)
    squares: Any = jnp.float32(0)
    count = 0
    for batch in batches:
        total, squares = add(total, squares, params, batch)
        count += 1
    _check_count(count)
    return (dot(total, total) - squares) / (count * (count - 1))


def step_accordance(step_grads: Any, probe_grads: Any) -> jax.Array:
    """Mean cosine of the gradients that steps were taken along with those of probe batches.

    Args:
      step_grads: tree of [S, ...], gradients g_t of S steps.
      probe_grads: tree of [S, M, ...], gradients of M probes at the point of each step.
    """

    def one(step: Any, probes: Any) -> jax.Array:
        norm = jnp.sqrt(dot(step, step))

        def cosine(probe: Any) -> jax.Array:
            both = norm * jnp.sqrt(dot(probe, probe))
            return jnp.where(both == 0, 0.0, dot(step, probe) / jnp.where(both == 0, 1.0, both))

        return jax.vmap(cosine)(probes).mean()

    return jax.vmap(one)(step_grads, probe_grads).mean()


def loss_accordance(start: Any, end: Any) -> jax.Array:
    """``mean_j sign(L_j(start) - L_j(end))``: which share of the probes an epoch has helped.

    Needs no gradients.

    Args:
      start, end: losses [M] of the probe batches before and after the epoch, nats.

    Raises:
      ValueError: they are not one loss a probe, [M].
    """
    before, after = jnp.asarray(start, jnp.float32), jnp.asarray(end, jnp.float32)
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise ValueError(
            f"start and end must be losses [M] of M >= 1 probes, got {before.shape}, {after.shape}"
        )
    return jnp.sign(before - after).mean()


def suggest_flood_level(history: Sequence[tuple[float, float]]) -> float:
    """The flood level b* that a run without flooding suggests.

    Args:
      history: (accordance, mean training loss in nats) at points of the run, in order.

    Returns:
      The loss at the first point with accordance <= 0, or the last loss if it never turns.

    Raises:
      ValueError: an empty history, or a value that is not finite.
    """
    if not history:
        raise ValueError("history must not be empty: record (accordance, mean loss) pairs")
    for number, (accordance, loss) in enumerate(history):
        if not (math.isfinite(accordance) and math.isfinite(loss)):
            raise ValueError(f"history[{number}] must be finite, got ({accordance}, {loss})")
    for accordance, loss in history:
        if accordance <= 0:
            return float(loss)
    return float(history[-1][1])


def _same(value: Any) -> Any:
    return value


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def _check_count(count: int) -> int:
    if count < 2:
        raise ValueError(f"accordance is of pairs: two gradients at least, got {count}")
    return count
