"""Sharpness-aware minimisation as optax transforms that ask for the gradient elsewhere.

  SAM      g = dL(w);  e = rho g / |g|;  g_s = dL(w + e);  the base optimiser gets g_s at w
  GSAM     g_s - alpha * (g - <g, g_s> g_s / |g_s|^2)
  m-SAM    g_s = sum_i W_i / W dL_i(w + e_i),  e_i = rho g_i / |g_i| of each group i of rows

e is a constant: nothing is differentiated through it. Both gradients see the same batch and
the same dropout, because ``grad_fn`` is closed over them (see ``steppe.train.step``); with
micro-batches and on a mesh both are those of the whole batch. ``ascent="device"`` or a group
size gives m-sharpness, where only the sum is exchanged (see ``steppe.train.groups``).

A step may hand over a cheaper first gradient (``update``'s ``ascent``, see
``steppe.train.ascent``): it then takes the place of g above, and where a scheduled rho is 0 the
gradient of the whole batch is computed in that branch only. GSAM refuses it: the difference of
gradients of different rows or leaves does not vanish with rho.

In a chain, what stands before SAM changes the first gradient only, so the direction of e and
not what the base gets: a mask or a clip belongs inside, ``sam(chain(selective_gradient(...),
adamw(...)))``, and a clip of both gradients into ``train.step.make(clip_norm=)``.

A step whose gradient is not a number leaves no trace in the state of these transforms; what the
base remembers is the base's own: ``sam(optax.apply_if_finite(adamw, 5))`` guards its moments.

``optax.inject_hyperparams`` may fill in rho, eta and alpha; what a program depends on (group
sizes, keep_ratio, beta, gamma, seed) it must be told of as ``static_args``, which errors name.

Accumulation: ``train.step.make(microbatches=k)`` is exact. Outside of it, where k batches come
one after another, ``sam(optax.MultiSteps(base, k))`` is right: each batch climbs by its own
gradient (m-sharpness), and the base sees the mean of the k second gradients. The reverse,
``optax.MultiSteps(sam(base), k)``, calls SAM at each of the k batches, throws k - 1 results away,
and at the k-th climbs by the mean gradient but takes the second one on that batch alone, unless
``grad_fn`` covers all k: ``step.make`` refuses it.

Foret et al., ICLR 2021 (arXiv 2010.01412); Kwon et al., ICML 2021 (2102.11600); Zhuang et
al., ICLR 2022 (GSAM, 2203.08065).

Deviations: google-research/sam climbs per device unless told to synchronise; the default here
is the whole batch on any number of devices.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from steppe.optim import check
from steppe.optim.check import GradFn, Radius
from steppe.optim.perturbation import Perturbation, adaptive, displace, dot, l2

# "global", "device", or the rows of a group.
Groups: TypeAlias = str | int


class SamState(NamedTuple):
    """State of the transforms of this file.

    Attributes:
      steps: int32 scalar, updates done; schedules of rho are read at it.
      base: the base optimiser's state.
    """

    steps: jax.Array
    base: optax.OptState


def sam(
    base: optax.GradientTransformation,
    rho: Radius = 0.05,
    *,
    perturbation: Perturbation | None = None,
    ascent: Groups = "global",
) -> optax.GradientTransformationExtraArgs:
    """SAM around any optax optimiser.

    Args:
      base: what turns the second gradient into an update.
      rho: radius of the ball, >= 0; 0 is the base optimiser, without a second gradient: bit for
        bit as a number, and to 1e-6 where a schedule or an injected array is 0, since a program
        that branches rounds differently. Where those fall below 0 the update is NaN.
      perturbation: ``(g, w, rho) -> e``; default :func:`steppe.optim.perturbation.l2`.
      ascent: whose gradient is climbed by: "global" = the whole batch's, "device" = that of the
        rows on each device (without a mesh that is the whole batch), or a number of rows: that
        of each group of so many consecutive rows. The last two need ``group_fn``, which
        ``train.step.make`` passes to ``update``.

    Raises:
      ValueError: a negative or NaN rho, another ascent; from ``update``, no ``grad_fn``, no
        ``group_fn``, or groups that do not divide the rows.
      TypeError: base is not an optax transform.

    Example:
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> tx = sam(optax.sgd(0.1), rho=0.05)
      >>> gradient = jax.grad(loss)
      >>> updates, _ = tx.update(gradient(params), tx.init(params), params, grad_fn=gradient)
      >>> [round(float(u), 3) for u in updates["w"]]  # -0.1 * 2 * 1.01 * w: w moves 1% up the slope
      [-0.606, -0.808]
    """
    return two_gradients(base, rho, perturbation or l2(), lambda g, sharp: sharp, ascent)


def asam(
    base: optax.GradientTransformation,
    rho: Radius = 0.5,
    *,
    eta: float = 0.01,
    scaled: Literal["matrices", "all"] = "matrices",
    ascent: Groups = "global",
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM: the ball scales with the parameters, so rho is about ten times SAM's.

    Args:
      base, rho, ascent: see :func:`sam`.
      eta, scaled: see :func:`steppe.optim.perturbation.adaptive`; ``eta=0, scaled="all"`` is
        the form of the usual PyTorch port.

    Raises:
      ValueError: rho or eta is negative or NaN.
      TypeError: base is not an optax transform.
    """
    return sam(base, rho, perturbation=adaptive(eta=eta, scaled=scaled), ascent=ascent)


def gsam(
    base: optax.GradientTransformation,
    rho: Radius = 0.05,
    *,
    alpha: float = 0.4,
    ascent: Groups = "global",
) -> optax.GradientTransformationExtraArgs:
    """Gap-guided SAM: the sharp gradient less alpha times the part of g orthogonal to it.

    Args:
      base, rho: see :func:`sam`; the paper lets rho follow the learning rate, see
        :func:`rho_like`.
      alpha: weight of the gap; 0 is SAM.
      ascent: see :func:`sam`; the gap is between the gradients of the whole batch.

    Raises:
      ValueError: rho is negative or NaN, alpha is not finite, another ascent; from ``update``,
        a cheaper first gradient (``train.step.make(ascent=)``).
      TypeError: base is not an optax transform.
    """
    check.number(alpha, "alpha", "a finite number", check.within(-math.inf), array=True)

    def combine(g: Any, sharp: Any) -> Any:
        share = safe_divide(dot(g, sharp), dot(sharp, sharp))
        return jax.tree.map(lambda g, s: (s - alpha * (g - share * s)).astype(s.dtype), g, sharp)

    return two_gradients(base, rho, l2(), combine, ascent, exact="gsam")


def rho_like(
    learning_rate: optax.Schedule,
    lowest: float,
    highest: float,
    *,
    rho_min: float = 0.001,
    rho_max: float = 0.01,
) -> optax.Schedule:
    """A schedule of rho that is linear in the learning rate, as GSAM has it.

    Rates outside of [lowest, highest] give ``rho_min`` and ``rho_max``.

    Args:
      learning_rate: schedule of the rate.
      lowest, highest: rates at which rho is ``rho_min`` and ``rho_max``.

    Raises:
      ValueError: highest <= lowest, a negative rho, or rho_max < rho_min.
      TypeError: learning_rate is no schedule.
    """
    if not callable(learning_rate):
        raise TypeError(
            "learning_rate must be a schedule, step -> rate, got "
            f"{type(learning_rate).__name__}; of a number take optax.constant_schedule"
        )
    check.number(rho_min, "rho_min", "a finite number >= 0", check.within(0))
    check.number(rho_max, "rho_max", "a finite number >= rho_min", check.within(rho_min))
    if not highest > lowest:
        raise ValueError(f"highest must be > lowest, got {highest} and {lowest}")

    def rho(step: Any) -> jax.Array:
        share = (learning_rate(step) - lowest) / (highest - lowest)
        return jnp.clip(rho_min + (rho_max - rho_min) * share, rho_min, rho_max)

    return rho


def two_gradients(
    base: optax.GradientTransformation,
    rho: Radius,
    perturbation: Perturbation,
    combine: Callable[[Any, Any], Any],
    groups: Groups = "global",
    *,
    exact: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The frame of SAM and its kin: ``base`` gets ``combine(g, dL(w + e))``.

    Args:
      base, rho, perturbation: see :func:`sam`.
      combine: ``(g, sharp) -> gradient`` for the base optimiser.
      groups: ``ascent`` of :func:`sam`.
      exact: name of a method that refuses a cheaper first gradient.

    Raises:
      ValueError, TypeError: as :func:`sam`.
    """
    base = check.base(base)
    check.radius(rho)
    check.groups(groups)
    check.function(perturbation, "perturbation", "(g, w, rho) -> e")

    def init(params: Any) -> SamState:
        return SamState(jnp.zeros((), jnp.int32), base.init(params))

    def update(
        grads: Any,
        state: SamState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        group_fn: Any = None,
        ascent: Any = None,
        **extra: Any,
    ) -> tuple[Any, SamState]:
        check.state(state, SamState, exact or "sam")
        if exact is not None:
            check.no_ascent(ascent, exact)
        first = First.of(grads, check.grad_fn(grad_fn, params), params, ascent)
        if groups != "global" and not static_zero(rho):
            check.group_fn(group_fn, groups, ascent)

        def climb(radius: Any) -> Any:
            def displaced(w: Any, g: Any) -> Any:
                return displace(w, perturbation(g, w, radius))

            if groups != "global":
                return combine(grads, group_fn(params, displaced, groups))
            return combine(first.direction, first.grad_fn(displaced(params, first.direction)))

        final = grads if static_zero(rho) else at_radius(climb, first.plain, rho, state.steps)
        updates, inner = base.update(
            final, state.base, params, grad_fn=grad_fn, group_fn=group_fn, **extra
        )
        return updates, SamState(optax.safe_increment(state.steps), inner)

    return optax.GradientTransformationExtraArgs(init, update)


class First(NamedTuple):
    """The first gradient and what goes with it, whether the step made it cheaper or not.

    Attributes:
      direction: what is climbed by.
      grad_fn: the gradient elsewhere.
      plain: ``() -> gradient`` at the parameters. Call it inside the branch that needs it: of a
        cheap first pass it is a pass of its own.
      live: what may be perturbed, see ``steppe.train.types.Climb``; None = everything.
    """

    direction: Any
    grad_fn: GradFn
    plain: Callable[[], Any]
    live: Any = None

    @classmethod
    def of(cls, grads: Any, grad_fn: GradFn, params: Any, ascent: Any) -> First:
        """From what ``update`` was given; ``ascent`` is None or a ``Climb``."""
        if ascent is None:
            return cls(grads, grad_fn, lambda: grads)

        def own(other: Any) -> Any:
            # Inside optax.partition a transform sees a part of the tree.
            return jax.tree.map(
                lambda g, x: g if isinstance(g, optax.MaskedNode) else x,
                grads,
                other,
                is_leaf=lambda node: isinstance(node, optax.MaskedNode),
            )

        live = None if ascent.live is None else own(ascent.live)
        return cls(own(ascent.direction), ascent.grad_fn, lambda: ascent.grad_fn(params), live)


def at_radius(
    climb: Callable[[Any], Any], stay: Callable[[], Any], rho: Radius, steps: jax.Array
) -> Any:
    """``climb(rho)``, or ``stay()`` at no cost where rho is 0.

    A number decides while tracing; a schedule or an injected rho decides in the program, so
    that a warm-up of rho from 0 costs one gradient as long as it is 0.
    """
    if static_zero(rho):
        return stay()
    if isinstance(rho, numbers.Real):
        return climb(rho)
    radius = radius_at(rho, steps)
    kinds = jax.eval_shape(stay)
    return jax.lax.cond(radius == 0, lambda _: stay(), lambda r: typed_as(climb(r), kinds), radius)


def typed_as(found: Any, like: Any) -> Any:
    """``found`` in the types of ``like``: branches must agree in them, whatever grad_fn returns."""
    return jax.tree.map(lambda leaf, kind: leaf.astype(kind.dtype), found, like)


def radius_at(rho: Radius, steps: jax.Array) -> jax.Array:
    """rho at this update, float32 scalar; NaN where it is below 0, so that it is seen."""
    radius = jnp.asarray(rho(steps) if callable(rho) else rho, jnp.float32)
    return jnp.where(radius >= 0, radius, jnp.nan)


def static_zero(rho: Radius) -> bool:
    """Whether rho is the number 0."""
    return isinstance(rho, numbers.Real) and rho == 0


def safe_divide(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """top / bottom, and 0 where bottom is 0."""
    return jnp.where(bottom == 0, 0.0, top / jnp.where(bottom == 0, 1.0, bottom))
