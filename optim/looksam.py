"""LookSAM: a second gradient only in every k-th step, its direction is used again in between.

  every k-th step  g = dL(w);  e = rho g / |g|;  g_s = dL(w + e);  the base optimiser gets g_s
                   g_v = g_s - <g_s, g> g / |g|^2 is kept
  in between       the base optimiser gets g + alpha * |g| / |g_v| * g_v: no second gradient

With a cheaper first gradient (see ``steppe.train.ascent``) g of the k-th step is that one; the
steps in between take the gradient of the whole batch in their own branch.

Liu et al., CVPR 2022, arXiv 2203.02714.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.optim.perturbation import displace, global_norm, l2
from steppe.optim.sam import (
    First,
    Radius,
    check_base,
    check_finite,
    check_radius,
    dot,
    radius_at,
    require,
    safe_divide,
    static_zero,
)


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
      ValueError: every < 1, alpha is not finite, rho is negative or NaN.
      TypeError: base is not an optax transform.
    """
    if every < 1 or int(every) != every:
        raise ValueError(f"every must be a whole number >= 1, got {every}")
    check_finite(alpha, "alpha")
    base = check_base(base)
    check_radius(rho)
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
        first = First.of(grads, require(grad_fn, params), params, ascent)
        radius = radius_at(rho, state.steps)

        def look(_: None) -> tuple[Any, Any]:
            g = first.direction
            sharp = first.grad_fn(displace(params, perturb(g, params, radius)))
            share = safe_divide(dot(sharp, g), dot(g, g))
            kept = jax.tree.map(
                lambda s, g: s.astype(jnp.float32) - share * g.astype(jnp.float32), sharp, g
            )
            # A step that went wrong must not live on in the steps that follow.
            good = jnp.isfinite(global_norm(kept))
            kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), kept, state.direction)
            return sharp, kept

        def reuse(_: None) -> tuple[Any, Any]:
            g = first.plain()
            scale = alpha * safe_divide(global_norm(g), global_norm(state.direction))
            used = jax.tree.map(
                lambda g, v: (g.astype(jnp.float32) + scale * v).astype(g.dtype),
                g,
                state.direction,
            )
            return used, state.direction

        if static_zero(rho):
            final, kept = grads, state.direction
        elif every == 1:
            final, kept = look(None)
        else:
            final, kept = jax.lax.cond(state.steps % every == 0, look, reuse, None)
        updates, inner = base.update(final, state.base, params, grad_fn=grad_fn, **extra)
        return updates, LookSamState(optax.safe_increment(state.steps), inner, kept)

    return optax.GradientTransformationExtraArgs(init, update)
