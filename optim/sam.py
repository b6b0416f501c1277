"""Sharpness-aware minimisation as optax transforms that ask for the gradient elsewhere.

  SAM      g = dL(w);  e = rho g / |g|;  g_s = dL(w + e);  the base optimiser gets g_s at w
  GSAM     g_s - alpha * (g - <g, g_s> g_s / |g_s|^2)
  LookSAM  every k-th step SAM, and g_v = g_s - <g_s, g> g / |g|^2 is kept;
           in between g + alpha * |g| / |g_v| * g_v, which costs no second gradient

e is a constant: nothing is differentiated through it. Both gradients see the same batch and
the same dropout, because ``grad_fn`` is closed over them (see ``steppe.train.step``); with
micro-batches and on a mesh both are those of the whole batch.

Foret et al., ICLR 2021 (arXiv 2010.01412); Kwon et al., ICML 2021 (2102.11600); Zhuang et
al., ICLR 2022 (GSAM, 2203.08065); Liu et al., CVPR 2022 (LookSAM, 2203.02714).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from steppe.optim.perturbation import Perturbation, adaptive, displace, global_norm, l2

GradFn: TypeAlias = Callable[[Any], Any]
# A number, a schedule (step -> number), or an array that ``inject_hyperparams`` fills in.
Radius: TypeAlias = Any


class SamState(NamedTuple):
    """State of the transforms of this file.

    Attributes:
      steps: int32 scalar, updates done; schedules of rho are read at it.
      base: the base optimiser's state.
    """

    steps: jax.Array
    base: optax.OptState


class LookSamState(NamedTuple):
    """State of :func:`looksam`.

    Attributes:
      steps, base: as in :class:`SamState`.
      direction: g_v of the last SAM step, float32; zeros before the first.
    """

    steps: jax.Array
    base: optax.OptState
    direction: Any


def sam(
    base: optax.GradientTransformation,
    rho: Radius = 0.05,
    *,
    perturbation: Perturbation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM around any optax optimiser.

    Args:
      base: what turns the second gradient into an update.
      rho: radius of the ball, >= 0; 0 is the base optimiser, without a second gradient.
      perturbation: ``(g, w, rho) -> e``; default :func:`steppe.optim.perturbation.l2`.

    Raises:
      ValueError: a negative or NaN rho; from ``update``, no ``grad_fn``.
      TypeError: base is not an optax transform.
    """
    return two_gradients(base, rho, perturbation or l2(), lambda g, sharp: sharp)


def asam(
    base: optax.GradientTransformation,
    rho: Radius = 0.5,
    *,
    eta: float = 0.01,
    scaled: Literal["matrices", "all"] = "matrices",
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM: the ball scales with the parameters, so rho is about ten times SAM's.

    Args:
      base, rho: see :func:`sam`.
      eta, scaled: see :func:`steppe.optim.perturbation.adaptive`; ``eta=0, scaled="all"`` is
        the form of the usual PyTorch port.

    Raises:
      ValueError: rho or eta is negative or NaN.
      TypeError: base is not an optax transform.
    """
    return sam(base, rho, perturbation=adaptive(eta=eta, scaled=scaled))


def gsam(
    base: optax.GradientTransformation, rho: Radius = 0.05, *, alpha: float = 0.4
) -> optax.GradientTransformationExtraArgs:
    """Gap-guided SAM: the sharp gradient less alpha times the part of g orthogonal to it.

    Args:
      base, rho: see :func:`sam`; the paper lets rho follow the learning rate, see
        :func:`rho_like`.
      alpha: weight of the gap; 0 is SAM.

    Raises:
      ValueError: rho is negative or NaN, alpha is not finite.
      TypeError: base is not an optax transform.
    """
    _check_finite(alpha, "alpha")

    def combine(g: Any, sharp: Any) -> Any:
        share = _safe_divide(_dot(g, sharp), _dot(sharp, sharp))
        return jax.tree.map(lambda g, s: (s - alpha * (g - share * s)).astype(s.dtype), g, sharp)

    return two_gradients(base, rho, l2(), combine)


def rho_like(
    learning_rate: optax.Schedule,
    lowest: float,
    highest: float,
    *,
    rho_min: float = 0.001,
    rho_max: float = 0.01,
) -> optax.Schedule:
    """A schedule of rho that is linear in the learning rate, as GSAM has it.

    Args:
      learning_rate: schedule of the rate.
      lowest, highest: rates at which rho is ``rho_min`` and ``rho_max``.

    Raises:
      ValueError: highest <= lowest, or a negative rho.
    """
    if not highest > lowest:
        raise ValueError(f"highest must be > lowest, got {highest} and {lowest}")
    for name, value in (("rho_min", rho_min), ("rho_max", rho_max)):
        _check_radius(value, name)
    slope = (rho_max - rho_min) / (highest - lowest)
    return lambda step: rho_min + slope * (learning_rate(step) - lowest)


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
    _check_finite(alpha, "alpha")
    base = check_base(base)
    check_radius(rho)
    perturb = l2()

    def init(params: Any) -> LookSamState:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
        return LookSamState(jnp.zeros((), jnp.int32), base.init(params), zeros)

    def update(
        grads: Any, state: LookSamState, params: Any = None, *, grad_fn: Any = None, **extra: Any
    ) -> tuple[Any, LookSamState]:
        grad_fn = require(grad_fn, params)
        radius = radius_at(rho, state.steps)

        def look(_: None) -> tuple[Any, Any]:
            sharp = grad_fn(displace(params, perturb(grads, params, radius)))
            share = _safe_divide(_dot(sharp, grads), _dot(grads, grads))
            kept = jax.tree.map(
                lambda s, g: s.astype(jnp.float32) - share * g.astype(jnp.float32), sharp, grads
            )
            # A step that went wrong must not live on in the steps that follow.
            good = jnp.isfinite(global_norm(kept))
            kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), kept, state.direction)
            return sharp, kept

        def reuse(_: None) -> tuple[Any, Any]:
            scale = alpha * _safe_divide(global_norm(grads), global_norm(state.direction))
            used = jax.tree.map(
                lambda g, v: (g.astype(jnp.float32) + scale * v).astype(g.dtype),
                grads,
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


def two_gradients(
    base: optax.GradientTransformation,
    rho: Radius,
    perturbation: Perturbation,
    combine: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """The frame of SAM and its kin: ``base`` gets ``combine(g, dL(w + e))``.

    Args:
      base, rho, perturbation: see :func:`sam`.
      combine: ``(g, sharp) -> gradient`` for the base optimiser.

    Raises:
      ValueError, TypeError: as :func:`sam`.
    """
    base = check_base(base)
    check_radius(rho)

    def init(params: Any) -> SamState:
        return SamState(jnp.zeros((), jnp.int32), base.init(params))

    def update(
        grads: Any, state: SamState, params: Any = None, *, grad_fn: Any = None, **extra: Any
    ) -> tuple[Any, SamState]:
        grad_fn = require(grad_fn, params)

        def climb(radius: Any) -> Any:
            return combine(grads, grad_fn(displace(params, perturbation(grads, params, radius))))

        final = at_radius(climb, lambda: grads, rho, state.steps)
        updates, inner = base.update(final, state.base, params, grad_fn=grad_fn, **extra)
        return updates, SamState(optax.safe_increment(state.steps), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def at_radius(
    climb: Callable[[Any], Any], stay: Callable[[], Any], rho: Radius, steps: jax.Array
) -> Any:
    """``climb(rho)``, or ``stay()`` at no cost where rho is 0.

    A number decides while tracing; a schedule or an injected rho decides in the program, so
    that a warm-up of rho from 0 costs one gradient as long as it is 0.
    """
    if static_zero(rho):
        return stay()
    if isinstance(rho, (int, float)):
        return climb(rho)
    radius = radius_at(rho, steps)
    return jax.lax.cond(radius == 0, lambda _: stay(), climb, radius)


def radius_at(rho: Radius, steps: jax.Array) -> jax.Array:
    """rho at this update, float32 scalar."""
    return jnp.asarray(rho(steps) if callable(rho) else rho, jnp.float32)


def static_zero(rho: Radius) -> bool:
    """Whether rho is the number 0."""
    return isinstance(rho, (int, float)) and rho == 0


def check_base(base: Any) -> optax.GradientTransformationExtraArgs:
    """``base`` as a transform that takes extra arguments.

    Raises:
      TypeError: it has no ``init`` and ``update``.
    """
    if not (callable(getattr(base, "init", None)) and callable(getattr(base, "update", None))):
        raise TypeError(
            f"base must be an optax transform such as optax.adamw(1e-4), got {type(base).__name__}"
        )
    return optax.with_extra_args_support(base)


def check_radius(rho: Radius) -> None:
    """Checks a rho that is a number; schedules and arrays are only known later.

    Raises:
      ValueError: it is negative, NaN or infinite.
    """
    if callable(rho) or isinstance(rho, jax.core.Tracer):
        return
    try:
        value = float(rho)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(rho, bool) or math.isnan(value):
        raise ValueError(f"rho must be a number >= 0 or a schedule, got {rho!r}")
    _check_radius(value, "rho")


def _check_radius(value: float, name: str) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")


def require(grad_fn: Any, params: Any) -> GradFn:
    """``grad_fn``, which every update of a two-gradient transform needs.

    Raises:
      ValueError: it, or params, was not passed to ``update``.
    """
    if params is None:
        raise ValueError("update needs params: pass tx.update(grads, state, params, grad_fn=...)")
    if grad_fn is None:
        raise ValueError(
            "update needs grad_fn, a function params -> gradient on the same batch: pass "
            "tx.update(grads, state, params, grad_fn=...); train.step.make does so"
        )
    found: GradFn = grad_fn
    return found


def _dot(left: Any, right: Any) -> jax.Array:
    products = jax.tree.map(
        lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), left, right
    )
    return sum(jax.tree.leaves(products), jnp.float32(0))


def _safe_divide(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """top / bottom, and 0 where bottom is 0."""
    return jnp.where(bottom == 0, 0.0, top / jnp.where(bottom == 0, 1.0, bottom))
