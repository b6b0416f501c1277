"""LookSAM: a second gradient only in every k-th step, its direction is used again in between.

  every k-th step  g = dL(w);  e = rho g / |g|;  g_s = dL(w + e);  the base optimiser gets g_s
                   g_v = g_s - <g_s, g> g / |g|^2 is kept
  in between       the base optimiser gets g + alpha * |g| / |g_v| * g_v: no second gradient

Where rho is 0 a step is one of the base optimiser and costs one gradient; a k-th one keeps nothing.
A k-th step whose gradients are not finite, or so long that their squared norms are not, is NaN and
keeps nothing new. The base gets g_s as the sum of its two parts, so with one more rounding.
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


class Mix(NamedTuple):
    """What a step keeps, and the gradient for the base: own * g + other * kept.

    Of a k-th step g_s = <g_s, g> / |g|^2 g + g_v, so that own is that share and other is 1.
    """

    kept: Any
    own: jax.Array
    other: jax.Array

    def of(self, g: Any) -> Any:
        """The gradient for the base, in the types of g; formed in float32."""
        return jax.tree.map(
            lambda g, v: (self.own * g.astype(jnp.float32) + self.other * v).astype(g.dtype),
            g,
            self.kept,
        )


def looksam(
    base: optax.GradientTransformation, rho: Radius = 0.05, *, every: int = 5, alpha: float = 0.7
) -> optax.GradientTransformationExtraArgs:
    """LookSAM: a second gradient only in every k-th step, its direction is used again between.

    Args:
      base, rho: see :func:`sam`.
      every: k; 1 is SAM, bit for bit where rho and every are numbers.
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

        # A branch gives what is kept and the shares of g and of it: their sum is formed outside,
        # where it melts into the base's update instead of going through memory.
        def stay(_: None) -> Mix:
            kept = jax.tree.map(lambda v: jnp.where(due, 0.0, v), state.direction)
            return Mix(kept, jnp.float32(1), jnp.float32(0))

        def look(sharp: Any) -> Mix:
            share = safe_divide(dot(sharp, g), dot(g, g))
            kept = jax.tree.map(
                lambda s, g: s.astype(jnp.float32) - share * g.astype(jnp.float32), sharp, g
            )
            length = global_norm(kept)
            some = ~(length <= ROUNDING * global_norm(sharp))
            # A step that went wrong must not live on in the steps that follow.
            good = jnp.isfinite(length)
            kept = jax.tree.map(
                lambda new, old: jnp.where(good, jnp.where(some, new, 0.0), old),
                kept,
                state.direction,
            )
            wrong = jnp.where(good, 0.0, jnp.nan)
            return Mix(kept, share + wrong, 1 + wrong)

        def reuse(_: None) -> Mix:
            scale = alpha * safe_divide(global_norm(g), global_norm(state.direction))
            scale = jnp.where(jnp.isnan(radius), radius, scale)  # a bad rho is seen here too
            return Mix(state.direction, jnp.float32(1), scale)

        def there() -> Any:
            return gradient(displace(params, perturb(g, params, radius)))

        def step(_: None) -> Mix:
            return jax.lax.cond(due, lambda _: look(there()), reuse, None)

        final: Any
        fixed = isinstance(rho, numbers.Real)
        if static_zero(rho):
            final, kept = grads, state.direction
        elif fixed and isinstance(every, int) and every == 1:  # SAM, bit for bit
            sharp = there()
            final, kept = typed_as(sharp, g), look(sharp).kept
        else:
            mix = step(None) if fixed else jax.lax.cond(radius == 0, stay, step, None)
            final, kept = mix.of(g), mix.kept
        updates, inner = base.update(final, state.base, params, grad_fn=grad_fn, **extra)
        return updates, LookSamState(optax.safe_increment(state.steps), inner, kept)

    return optax.GradientTransformationExtraArgs(init, update)
