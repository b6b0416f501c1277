"""ESAM: SAM whose perturbation is stochastic and whose second gradient sees the sharp rows only.

  m_j ~ Bernoulli(beta), one a tensor;   e = m * rho * g / (beta * (|g| + delta))
  S = the int(gamma * B) rows with the largest L_i(w + e) - L_i(w)
  the base optimiser gets  1/|S| sum_{i in S} dL_i(w + e)  at w

Over the draws of m the mean of e is SAM's perturbation. gamma = beta = 1 is SAM.

Du, Yan, Feng, Zhou, Zhen, Goh, Tan, ICLR 2022, arXiv 2110.03141.

Deviations: the paper draws m for each parameter, its code for each tensor, which is followed
(a stacked leaf counts as one tensor a layer). The code freezes the tensors that it drops during
the next step's first gradient, so that their part is missing in |g|; here |g| is the norm of the
whole gradient, without which the mean of e is not SAM's. Its first step perturbs everything, and
it takes the rows strictly above the int(gamma * B)-th largest increase, one fewer than the paper.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.optim import check
from steppe.optim.check import Radius
from steppe.optim.keys import key_words, leaf_key
from steppe.optim.perturbation import Perturbation, dimensions, displace, l2
from steppe.optim.sam import First, at_radius, static_zero


class EsamState(NamedTuple):
    """State of :func:`esam`.

    Attributes:
      steps: int32 scalar, updates done; schedules of rho are read at it.
      base: the base optimiser's state.
      key: uint32 words of the key that the tensors are drawn with; it never changes.
    """

    steps: jax.Array
    base: optax.OptState
    key: jax.Array


def esam(
    base: optax.GradientTransformation,
    rho: Radius = 0.05,
    *,
    beta: float = 0.5,
    gamma: float = 0.5,
    seed: Any = 0,
    perturbation: Perturbation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ESAM around any optax optimiser.

    Args:
      base: what turns the second gradient into an update.
      rho: radius of the ball, >= 0: a number, a schedule, or an injected array; 0 is the base
        optimiser. With ``optax.inject_hyperparams`` beta, gamma and seed are ``static_args``.
      beta: share of the tensors that is perturbed, each by 1 / beta times as much; 1 = all.
      gamma: share of the batch's rows that the second gradient is taken on; 1 = all, without
        the forward pass that selecting takes. At least one row is kept.
      seed: integer, or a key, of the draws.
      perturbation: of all tensors before some are dropped; default SAM's.

    ``update`` needs ``grad_fn``, and for gamma < 1 also ``losses_fn(params) -> [B]``, the loss of
    every row in nats, and ``subset_grad_fn(params, rows) -> gradient`` of the mean loss of the
    rows with these int32 numbers [k]; ``train.step.make`` passes all of them. ``row_losses`` [B],
    those at ``params`` where the first gradient has them already, save a forward pass. A row whose
    increase is not a number is chosen last: so ``losses_fn`` marks rows that weigh nothing, such
    as those that fill a batch up, by NaN. gamma B counts them.

    Raises:
      ValueError: rho is negative or NaN, beta or gamma is outside (0, 1]; from ``update``, a
        function is missing, or the losses are not one a row.
      TypeError: base is not an optax transform, seed is not an integer or key.
    """
    for name, share in (("beta", beta), ("gamma", gamma)):
        check.number(share, name, "in (0, 1]", check.share)
    check.function(perturbation, "perturbation", "(g, w, rho) -> e")
    check.radius(rho)
    base = check.base(base)
    perturb = perturbation or l2()
    words = key_words(seed)

    def init(params: Any) -> EsamState:
        return EsamState(jnp.zeros((), jnp.int32), base.init(params), words)

    def update(
        grads: Any,
        state: EsamState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        losses_fn: Any = None,
        row_losses: Any = None,
        subset_grad_fn: Any = None,
        ascent: Any = None,
        **extra: Any,
    ) -> tuple[Any, EsamState]:
        check.state(state, EsamState, "esam")
        first = First.of(grads, check.grad_fn(grad_fn, params), params, ascent)
        if gamma < 1 and not static_zero(rho) and (losses_fn is None or subset_grad_fn is None):
            missing = "losses_fn" if losses_fn is None else "subset_grad_fn"
            raise ValueError(
                f"gamma={gamma} needs {missing}: pass tx.update(..., losses_fn=, subset_grad_fn=), "
                "as train.step.make does, or set gamma=1"
            )

        def climb(radius: Any) -> Any:
            e = perturb(first.direction, params, radius)
            if beta < 1:
                e = _drop(e, beta, state.key, state.steps)
            there = displace(params, e)
            if gamma == 1:
                return first.grad_fn(there)
            before = losses_fn(params) if row_losses is None else row_losses
            rows = sharpest_rows(before, losses_fn(there), gamma)
            return subset_grad_fn(there, rows)

        final = grads if static_zero(rho) else at_radius(climb, first.plain, rho, state.steps)
        # A base that asks for gradients itself gets the functions too.
        given = {"losses_fn": losses_fn, "row_losses": row_losses, "subset_grad_fn": subset_grad_fn}
        extra |= {name: one for name, one in given.items() if one is not None}
        updates, inner = base.update(final, state.base, params, grad_fn=grad_fn, **extra)
        return updates, EsamState(optax.safe_increment(state.steps), inner, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def sharpest_rows(before: jax.Array, after: jax.Array, gamma: float) -> jax.Array:
    """The int(gamma * B) rows, one at least, whose loss rose most, in ascending order.

    Args:
      before, after: losses [B] at w and at w + e.
      gamma: share of the rows, in (0, 1].

    Returns:
      int32 [k]; of rows that rose equally the first are taken.

    Raises:
      ValueError: the losses are not [B], or the two differ in length.
    """
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise ValueError(
            "losses_fn must return one loss a row, [B], "
            f"got shapes {before.shape} and {after.shape}"
        )
    rise = after.astype(jnp.float32) - before.astype(jnp.float32)
    rise = jnp.where(jnp.isnan(rise), -math.inf, rise)
    count = max(1, int(gamma * rise.size))
    return jnp.sort(jax.lax.top_k(rise, count)[1]).astype(jnp.int32)


def _drop(e: Any, beta: float, words: jax.Array, steps: jax.Array) -> Any:
    """e / beta on the tensors that are kept, 0 on the others."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        stacked = dimensions(path, leaf) < leaf.ndim
        shape = (leaf.shape[0], *(1,) * (leaf.ndim - 1)) if stacked else ()
        kept = jax.random.bernoulli(leaf_key(words, steps, path), beta, shape)
        return jnp.where(kept, leaf / beta, 0.0)

    return jax.tree_util.tree_map_with_path(one, e)
