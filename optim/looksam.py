"""LookSAM: a second gradient only in every k-th step, its direction is used again in between.

  every k-th step  g = dL(w);  e = rho g / |g|;  g_s = dL(w + e);  the base optimiser gets g_s
                   g_v = g_s - <g_s, g> g / |g|^2 is kept
  in between       the base optimiser gets g + alpha * |g| / |g_v| * g_v: no second gradient

Where rho is 0 a step is one of the base optimiser and costs one gradient; a k-th one keeps nothing.
A g_v of less than 1e-6 of |g_s| is rounding and is not kept either, or it would be scaled up to
the gradient's size in between. A cheaper first gradient (``steppe.train.ascent``) is refused:
g_s - g of different rows or leaves is not sharpness but sampling noise.

Liu et al., CVPR 2022, arXiv 2203.02714.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.optim import check
from steppe.optim.check import Radius
from steppe.optim.perturbation import displace, dot, global_norm, l2
from steppe.optim.sam import radius_at, safe_divide, static_zero, typed_as

# Share of the sharp gradient below which g_v is rounding.
ROUNDING = 1e-6


class LookSamState(NamedTuple):
    """State of :func:`looksam`.

    Attributes:
      steps: int32 scalar, updates done.
      base: the base optimiser's state.
      direction: g_v of the last SAM step, float32; zeros before the first.
    """

    steps: jax.Array
    base: optax.OptState
    direction: Any


def looksam(
    base: optax.GradientTransformation, rho: Radius = 0.05, *, every: int = 5, alpha: float = 0.7
) -> optax.GradientTransformationExtraArgs:
    """LookSAM: a second gradient only in every k-th step, its direction is used again between.

    Args:
      base, rho: see :func:`sam`.
      every: k; 1 is SAM.
      alpha: weight of the kept direction.

    Raises:
      ValueError: every < 1, alpha is not finite, rho is negative or NaN; from ``update``, a
        cheaper first gradient.
      TypeError: base is not an optax transform.
    """
    check.number(every, "every", "a whole number of steps >= 1", check.whole, array=True)
    check.number(alpha, "alpha", "a finite number", check.within(-math.inf), array=True)
    base = check.base(base)
    check.radius(rho)
    perturb = l2()

    def init(params: Any) -> LookSamState:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
        return LookSamState(jnp.zeros((), jnp.int32), base.init(params), zeros)

    def update(
        grads: Any,
        state: LookSamState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        ascent: Any = None,
        **extra: Any,
    ) -> tuple[Any, LookSamState]:
        check.state(state, LookSamState, "looksam")
        check.no_ascent(ascent, "looksam")
        gradient, g = check.grad_fn(grad_fn, params), grads
        radius = radius_at(rho, state.steps)
        due = state.steps % every == 0

        def stay(_: None) -> tuple[Any, Any]:
            return g, jax.tree.map(lambda v: jnp.where(due, 0.0, v), state.direction)

        def look(_: None) -> tuple[Any, Any]:
            sharp = gradient(displace(params, perturb(g, params, radius)))
            share = safe_divide(dot(sharp, g), dot(g, g))
            kept = jax.tree.map(
                lambda s, g: s.astype(jnp.float32) - share * g.astype(jnp.float32), sharp, g
            )
            some = ~(global_norm(kept) <= ROUNDING * global_norm(sharp))
            kept = jax.tree.map(lambda v: jnp.where(some, v, 0.0), kept)
            # A step that went wrong must not live on in the steps that follow.
            good = jnp.isfinite(global_norm(kept))
            kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), kept, state.direction)
            # What is kept must not see this rounding, which would pass for a direction.
            return typed_as(sharp, g), kept

        def reuse(_: None) -> tuple[Any, Any]:
            scale = alpha * safe_divide(global_norm(g), global_norm(state.direction))
            scale = jnp.where(jnp.isnan(radius), radius, scale)  # a bad rho is seen here too
            used = jax.tree.map(
                lambda g, v: (g.astype(jnp.float32) + scale * v).astype(g.dtype),
                g,
                state.direction,
            )
            return used, state.direction

        def step(_: None) -> tuple[Any, Any]:
            if isinstance(every, int) and every == 1:
                return look(None)
            return jax.lax.cond(due, look, reuse, None)

        if static_zero(rho):
            final, kept = grads, state.direction
        elif isinstance(rho, numbers.Real):
            final, kept = step(None)
        else:
            final, kept = jax.lax.cond(radius == 0, stay, step, None)
        updates, inner = base.update(final, state.base, params, grad_fn=grad_fn, **extra)
        return updates, LookSamState(optax.safe_increment(state.steps), inner, kept)

    return optax.GradientTransformationExtraArgs(init, update)
