"""Selective training of RoAST: parameters that matter more for the task are updated more often.

  I = mean over mini-batches of (dL)^2                 importance, squared mini-batch gradients
  s = rank(I) / (n - 1)                                over all n covered entries together
  p = sigmoid(2 beta (s - alpha))                      beta -> inf keeps the top 1 - alpha
  m ~ Bernoulli(p);   g <- (m / p) g                   so that E[g] is the gradient

The masked gradient is what follows in the chain, so that Adam's moments see zeros while
decoupled weight decay still acts on everything: ``chain(selective_gradient(...), adamw(...))``.
With SAM that chain is the base, ``sam(chain(selective_gradient(...), adamw(...)))``: it masks the
second gradient. Before SAM it would only turn the direction that is climbed in.

Kim et al., RoAST, Findings of EMNLP 2023, arXiv 2312.04032.

Deviations: the published code does not count the first mini-batch of an epoch; here all count.
Entries that tie (unused rows, whose gradient is 0) share their mean rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from steppe.models.tree import path_of
from steppe.optim import check
from steppe.optim.keys import key_words, leaf_key
from steppe.optim.perturbation import global_norm
from steppe.optim.rank import Method, relative_rank

# "epoch": a mask is drawn by refresh_mask; "step": also in every update; n: every n updates.
Resample: TypeAlias = Literal["epoch", "step"] | int


class SelectiveState(NamedTuple):
    """State of :func:`selective_gradient`; trees have ``optax.MaskedNode`` where not covered.

    Attributes:
      importance_sum: sum of squared gradients since the last refresh, float32.
      count: int32 scalar, gradients in that sum.
      keep_prob: p of every entry, float32; 1 before the first refresh.
      mask: bool, the entries that are updated.
      rng: uint32 words of the key; draws are functions of it and of ``draws``.
      draws: int32 scalar, masks drawn so far.
      alpha, beta: float32 scalars, see :func:`keep_probability`.
    """

    importance_sum: Any
    count: jax.Array  # type: ignore[assignment]
    keep_prob: Any
    mask: Any
    rng: jax.Array
    draws: jax.Array
    alpha: jax.Array
    beta: jax.Array


def selective_gradient(
    alpha: float,
    beta: float,
    covered: Callable[[str], bool],
    *,
    unbiased: bool = True,
    max_scale: float | None = None,
    resample: Resample = "epoch",
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Masks gradients by importance; put it right before the optimiser, inside of SAM.

    Every update adds its gradient, before masking, to the importance. With ``resample="epoch"``
    call :func:`refresh_mask` on the state between epochs; with a number n the update does so
    itself every n updates, without leaving the compiled step. Until the first refresh all
    entries are updated.

    Args:
      alpha: place of the step in [0, 1]; the least important share alpha is mostly kept as it is.
      beta: sharpness of the step, >= 0; 0 = every entry with probability 1/2, inf = a hard mask.
      covered: path of a leaf, such as ``layers/attn/q/kernel``, -> whether it is masked;
        embeddings and heads usually are not.
      unbiased: divide by p, so that the mean of the masked gradient is the gradient.
      max_scale: largest 1 / p. Rare hits of entries with tiny p otherwise poison Adam's second
        moment for thousands of steps; None as published.
      resample: "epoch", "step" (a new mask of the same p in every update), or a number n.
      seed: integer, or a key, of the draws; the mask is the same on all devices.

    Raises:
      ValueError: an argument out of range; from ``init``, no leaf is covered.
      TypeError: covered is not callable or answers with a string, seed is not an integer or key.
    """
    _check(alpha, beta, max_scale, resample)
    if not callable(covered):
        raise TypeError(f"covered must be a function path -> bool, got {type(covered).__name__}")
    words = key_words(seed)
    every = resample if isinstance(resample, int) else None

    def mine_is(path: str) -> bool:
        found = covered(path)
        if isinstance(found, str):  # "no" would be true
            raise TypeError(f"covered({path!r}) must be True or False, got {found!r}")
        return bool(found)

    def own(tree: Any) -> Any:
        """The covered leaves."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if mine_is(path_of(path)) else optax.MaskedNode(), tree
        )

    def init(params: Any) -> SelectiveState:
        mine = own(params)
        if not jax.tree.leaves(mine):
            some = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
            raise ValueError(
                f"covered is False for every parameter; paths look like {', '.join(some[:4])}"
            )
        return SelectiveState(
            jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), mine),
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda w: jnp.ones(w.shape, jnp.float32), mine),
            jax.tree.map(lambda w: jnp.ones(w.shape, bool), mine),
            words,
            jnp.zeros((), jnp.int32),
            jnp.float32(alpha),
            jnp.float32(beta),
        )

    def update(
        grads: Any, state: SelectiveState, params: Any = None, **extra: Any
    ) -> tuple[Any, SelectiveState]:
        if every is not None:
            due = state.count >= every
            state = jax.lax.cond(
                due, lambda s: refresh_mask(s, method="histogram"), lambda s: s, state
            )
        elif resample == "step":
            state = _draw(state)
        mine = own(grads)

        def one(g: Any, p: Any, m: Any) -> Any:
            if isinstance(p, optax.MaskedNode):
                return g
            scale = 1 / p if unbiased else jnp.ones_like(p)
            if max_scale is not None:
                scale = jnp.minimum(scale, max_scale)
            return jnp.where(m, g * scale.astype(g.dtype), 0).astype(g.dtype)

        masked = jax.tree.map(one, grads, state.keep_prob, state.mask, is_leaf=_node)
        return masked, importance_from_grads(state, mine)

    return optax.GradientTransformationExtraArgs(init, update)


def importance_from_grads(state: SelectiveState, grads: Any) -> SelectiveState:
    """The state with one more mini-batch's squared gradient in its importance.

    For the first estimate, before training, call it on the gradients of one pass over the data
    and then :func:`refresh_mask`. A gradient that is not finite is left out.

    Args:
      grads: gradients of all parameters, or of the covered ones; of the final, averaged
        gradient of an optimiser step, not of its micro-batches.
    """
    mine = jax.tree.map(
        lambda total, g: total if isinstance(total, optax.MaskedNode) else g,
        state.importance_sum,
        grads,
        is_leaf=_node,
    )
    good = jnp.isfinite(global_norm(mine))
    total = jax.tree.map(
        lambda t, g: jnp.where(good, t + jnp.square(g.astype(jnp.float32)), t),
        state.importance_sum,
        mine,
    )
    return state._replace(importance_sum=total, count=state.count + good.astype(jnp.int32))


def refresh_mask(
    state: SelectiveState, rng: Any = None, *, method: Method = "exact"
) -> SelectiveState:
    """The state with p from the importance so far and a new mask; the importance starts anew.

    Without any importance p stays what it was, and only the mask is drawn. Outside of a
    compiled function the arrays come back in the shardings that they had.

    Args:
      rng: a key that replaces the state's; None goes on with it.
      method: how entries are ranked, see :func:`steppe.optim.rank.relative_rank`; "histogram"
        on a mesh.
    """
    if rng is not None:
        state = state._replace(rng=key_words(rng))
    return jax.tree.map(_placed, _refreshed(state, method), state)


@functools.partial(jax.jit, static_argnames="method")
def _refreshed(state: SelectiveState, method: Method) -> SelectiveState:
    ranks = relative_rank(state.importance_sum, method)
    known = state.count > 0
    keep = jax.tree.map(
        lambda s, old: jnp.where(known, keep_probability(s, state.alpha, state.beta), old),
        ranks,
        state.keep_prob,
    )
    zeros = jax.tree.map(jnp.zeros_like, state.importance_sum)
    return _draw(state._replace(keep_prob=keep, importance_sum=zeros, count=0 * state.count))


def keep_probability(rank: jax.Array, alpha: Any, beta: Any) -> jax.Array:
    """p = sigmoid(2 beta (s - alpha)); at beta = inf 1 above alpha, 0 below, 1/2 at it."""
    away = jnp.asarray(rank, jnp.float32) - alpha
    return jax.nn.sigmoid(jnp.where(away == 0, 0.0, 2 * beta * jnp.where(away == 0, 1.0, away)))


def _draw(state: SelectiveState) -> SelectiveState:
    """A new mask from the state's p; uniform numbers depend on key, draw and path alone."""

    def one(path: Any, p: jax.Array) -> jax.Array:
        return jax.random.uniform(leaf_key(state.rng, state.draws, path), p.shape) < p

    mask = jax.tree_util.tree_map_with_path(one, state.keep_prob)
    return state._replace(mask=mask, draws=state.draws + 1)


def _placed(new: jax.Array, old: jax.Array) -> jax.Array:
    if isinstance(new, jax.core.Tracer) or isinstance(old, jax.core.Tracer):
        return new
    return jax.device_put(new, old.sharding)


def _node(value: Any) -> bool:
    return isinstance(value, optax.MaskedNode)


def _check(alpha: float, beta: float, max_scale: float | None, resample: Resample) -> None:
    check.number(alpha, "alpha", "in [0, 1]", check.within(0, 1), array=True)
    check.number(beta, "beta", ">= 0", lambda value: value >= 0, array=True)
    if max_scale is not None:
        check.number(max_scale, "max_scale", ">= 1, or None", lambda value: value >= 1, array=True)
    number = isinstance(resample, int) and not isinstance(resample, bool) and resample >= 1
    if resample not in ("epoch", "step") and not number:
        raise ValueError(
            f"resample must be 'epoch', 'step' or a number of updates >= 1, got {resample!r}"
        )
