"""The largest loss within a ball around the parameters, by projected normalised ascent.

  gap(rho) = max_{|T^-1 e| <= rho} L(w + e) - L(w)       T = 1 (l2), or |w| + eta (adaptive)
  u_{t+1}  = P(u_t + stride * rho * T g_t / |T g_t|),    e = T u,  g_t = grad L(w + T u_t)

P scales back onto the ball, and u_0 = 0. With ``stride = 1`` the first step is exactly SAM's
(ASAM's) perturbation, so ``trace[1] - clean`` is the one-step sharpness that those optimisers
minimise; the later steps turn along the sphere. The largest loss of the whole path is reported:
a lower bound of the true maximum, which is out of reach. Where the gradient vanishes, as at a
minimum, the climb begins in a random direction.

Foret et al., ICLR 2021 (arXiv 2010.01412); adaptive: Kwon et al., ICML 2021 (arXiv 2102.11600).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from steppe.optim import check
from steppe.optim.perturbation import displace, global_norm, sizes
from steppe.train.evaluate import landscape
from steppe.train.evaluate.landscape import Loss, Placement
from steppe.train.types import Params


class Ball(NamedTuple):
    """What :func:`ball_max` found; float32, in the unit of the loss.

    Attributes:
      clean: loss at the parameters.
      worst: largest loss on the path; NaN when the loss was NaN anywhere on it, or a gradient
        NaN or too long for float32.
      gap: worst - clean, never below 0.
      trace: loss at each point of the path, [steps + 1]; the first is ``clean``.
      gradient_norm: L2 norm of the gradient at the parameters.
    """

    clean: jax.Array
    worst: jax.Array
    gap: jax.Array
    trace: jax.Array
    gradient_norm: jax.Array


def ball_max(
    loss: Loss,
    params: Params,
    rho: float,
    *,
    steps: int = 20,
    norm: Literal["l2", "adaptive"] = "l2",
    eta: float = 0.01,
    scaled: Literal["matrices", "all"] = "matrices",
    stride: float = 1.0,
    key: jax.Array | None = None,
) -> Ball:
    """The largest loss that ``steps`` of ascent find within rho of the parameters.

    It costs ``steps + 1`` gradients. Another rho, or another number of steps, compiles nothing.

    Args:
      loss: ``params -> scalar``, such as from ``batched_loss``.
      params: the parameters that may move.
      rho: radius: of the perturbation's L2 norm over all leaves, or (adaptive) of its norm
        relative to each parameter's size.
      norm: which ball.
      eta: added to |w| in the adaptive ball, so that a weight of 0 can move.
      scaled: which leaves the adaptive ball measures by their size, as in ``optim.asam``.
      stride: length of a step in units of rho.
      key: of the random direction, needed only where the gradient vanishes; default seed 0.

    Raises:
      ValueError: rho or eta < 0 or not finite, steps < 1, stride <= 0, an unknown norm.
      TypeError: key is none.
    """
    check.number(rho, "rho", "a finite number >= 0", check.within(0))
    landscape.whole("steps", steps, 1)
    if norm not in ("l2", "adaptive"):
        raise ValueError(f"norm must be 'l2' or 'adaptive', got {norm!r}")
    check.number(eta, "eta", ">= 0 and finite", check.within(0))
    if scaled not in ("matrices", "all"):
        raise ValueError(f"scaled must be 'matrices' or 'all', got {scaled!r}")
    check.number(stride, "stride", "> 0 and finite", lambda value: 0 < value < math.inf)
    argument, where = landscape.as_argument(loss), landscape.placement(params)
    key = jax.random.key(0) if key is None else key
    landscape.check_key(key)
    numbers = jnp.array([rho, eta, stride], jnp.float32)
    sized = "none" if norm == "l2" else scaled
    at = _origin(params, where=where)
    values, norms = [], []
    for number in range(int(steps) + 1):
        at, value, length, slope = _climb(argument, params, at, numbers, sized=sized, where=where)
        if float(slope) == 0.0:
            # Not a branch of the step: the draw would double what the step takes to compile.
            at = _wander(params, at, numbers, jax.random.fold_in(key, number), where=where)
        values.append(value)
        norms.append(length)
    trace = jnp.stack(values).astype(jnp.float32)
    worst = trace.max()
    return Ball(trace[0], worst, worst - trace[0], trace, norms[0])


@functools.partial(jax.jit, static_argnames=("where",))
def _origin(params: Params, *, where: Placement) -> Params:
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    return landscape.pin(zeros, where)


@functools.partial(jax.jit, static_argnames=("sized", "where"), donate_argnums=(2,))
def _climb(
    loss: Any,
    params: Params,
    u: Params,
    numbers: jax.Array,
    *,
    sized: str,
    where: Placement,
) -> tuple[Params, jax.Array, jax.Array, jax.Array]:
    """The next u; at this one the loss, the norm of the gradient, and of the way up (0: none)."""
    rho, eta, stride = numbers

    t = sizes(params, eta, sized)
    here = displace(params, jax.tree.map(jnp.multiply, t, u))
    value, grads = landscape.value_and_grad(loss, here)
    climb = jax.tree.map(lambda t, g: t * g.astype(jnp.float32), t, grads)
    slope = global_norm(climb)
    # A gradient too long for its norm has no direction: 0 there would end the climb quietly.
    scale = jnp.where(jnp.isinf(slope), jnp.nan, jnp.where(slope == 0, 1.0, slope))
    direction = jax.tree.map(lambda x: x / scale, climb)
    moved = landscape.pin(_within(u, direction, rho, stride), where)
    return moved, value, global_norm(grads), slope


@functools.partial(jax.jit, static_argnames=("where",), donate_argnums=(1,))
def _wander(
    params: Params, u: Params, numbers: jax.Array, key: jax.Array, *, where: Placement
) -> Params:
    """A step in a random direction."""
    rho, _, stride = numbers
    drawn = landscape.draw(key, params, "normal", where)
    total = global_norm(drawn)
    direction = jax.tree.map(lambda x: x / total, drawn)
    return landscape.pin(_within(u, direction, rho, stride), where)


def _within(u: Params, direction: Params, rho: jax.Array, stride: jax.Array) -> Params:
    """A step along a unit vector, and back to the ball where it left it."""
    moved = jax.tree.map(lambda u, d: u + stride * rho * d, u, direction)
    norm = global_norm(moved)
    # A NaN norm must not be hidden: the next value is then NaN, and so is the result.
    shrink = jnp.where(norm > rho, rho / jnp.where(norm == 0, 1.0, norm), 1.0)
    shrink = jnp.where(jnp.isnan(norm), norm, shrink)
    return jax.tree.map(lambda u: u * shrink, moved)
