"""BBT and BBTv2: prompts that CMA-ES finds in a random subspace, one layer at a time.

  BBT     z ~ N(m, sigma^2 C),   f(p_0 + A z)
  BBTv2   for l = 1..L, again and again:  z_l ~ N(m_l, sigma_l^2 C_l),
          f(A_1 z_1*, ..., A_l z_l, ..., A_L z_L*);   z_l* <- the best z_l ever

f is a loss on the few training examples, all of them in one forward pass, and that pass is all that
is asked of the model: nothing is differentiated, so f may as well be a service. BBT is the case of
one prompt. A generation is three pure functions (ask, an evaluator, tell); asking and telling cost
next to nothing, so that a search is resumed by telling it again the losses that it was told.

The best z_l ever keeps the value that it had when the other layers were others: it may be worse
beside the present ones, as in the published code. A layer's own best value never rises.

Sun et al., ICML 2022, arXiv 2201.03514; Sun et al., EMNLP 2022, arXiv 2205.11200.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from steppe.optim.evolution import CMA, CMAState, cma_es
from steppe.train.blackbox.losses import Loss
from steppe.train.mesh import MeshPlan
from steppe.train.types import Batch, Params

# (params, prompt [S, D], batch) -> logits [N, C] of the label words
Scores: TypeAlias = Callable[[Params, jax.Array, Batch], jax.Array]
Metrics: TypeAlias = dict[str, jax.Array]


class Space(NamedTuple):
    """Where the prompts are searched; S = 1 (BBT) or the number of layers (BBTv2).

    Attributes:
      projections: A [S, D, r].
      start: p_0 [S, D].
    """

    projections: jax.Array
    start: jax.Array


class BlackBoxState(NamedTuple):
    """A search.

    Attributes:
      space: constants.
      search: one CMA-ES a prompt, leaves [S, ...].
      prompts: [S, D] of the best z ever, p_0 where there is none yet.
      last: [S, D], the candidate that was evaluated last, beside the other layers then.
      generation: int32, told so far; prompt number ``generation % S`` is next.
      calls: int32, forward passes over the examples so far.
    """

    space: Space
    search: CMAState
    prompts: jax.Array
    last: jax.Array
    generation: jax.Array
    calls: jax.Array


class Asked(NamedTuple):
    """Candidates of a generation.

    Attributes:
      points: z [l, r].
      rows: p_0 + A z [l, D].
      layer: int32, which prompt they are.
    """

    points: jax.Array
    rows: jax.Array
    layer: jax.Array


class Evaluated(NamedTuple):
    """Loss and accuracy of each candidate, [l] float32."""

    losses: jax.Array
    accuracies: jax.Array


class BlackBox(NamedTuple):
    """The functions of a search, all pure.

    Attributes:
      init: ``(space) -> BlackBoxState``.
      ask: ``(state, key) -> Asked``; the key of a search, the generation's is derived from it.
      tell: ``(state, asked, losses [l]) -> BlackBoxState``.
    """

    init: Callable[[Space], BlackBoxState]
    ask: Callable[[BlackBoxState, jax.Array], Asked]
    tell: Callable[[BlackBoxState, Asked, jax.Array], BlackBoxState]


# (prompts [S, D], asked) -> Evaluated
Evaluate: TypeAlias = Callable[[jax.Array, Asked], Evaluated]


def black_box(*, popsize: int = 20, sigma: float = 1.0, rank: int = 500) -> BlackBox:
    """A search over one prompt or over those of all layers in turn, as its space says.

    Args:
      popsize: l, candidates and forward passes a generation.
      sigma: step size that every CMA-ES begins with.
      rank: r, dimensions of the search.

    Raises:
      ValueError: popsize below 2, sigma not positive, rank below 1; from ``init`` a space of
        another rank or of shapes that do not fit.
    """
    cma: CMA = cma_es(popsize, sigma, rank)

    def init(space: Space) -> BlackBoxState:
        shape = space.projections.shape
        if len(shape) != 3 or shape[2] != rank or space.start.shape != shape[:2]:
            raise ValueError(
                f"the space must hold projections [S, D, r] with r = {rank} and a start [S, D], "
                f"got {shape} and {space.start.shape}"
            )
        if rank > shape[1]:
            raise ValueError(f"rank must be at most the {shape[1]} numbers of a prompt, got {rank}")
        one = cma.init(jnp.zeros(rank, space.projections.dtype))
        search = jax.tree.map(lambda leaf: jnp.stack([leaf] * shape[0]), one)
        zero = jnp.zeros((), jnp.int32)
        return BlackBoxState(space, search, space.start, space.start, zero, zero)

    def ask(state: BlackBoxState, key: jax.Array) -> Asked:
        layer = state.generation % len(state.prompts)
        own = jax.tree.map(lambda leaf: leaf[layer], state.search)
        points = cma.ask(own, jax.random.fold_in(key, state.generation))
        return Asked(points, _rows(state.space, layer, points), layer)

    def tell(state: BlackBoxState, asked: Asked, losses: jax.Array) -> BlackBoxState:
        layer = asked.layer
        own = jax.tree.map(lambda leaf: leaf[layer], state.search)
        own = cma.tell(own, asked.points, losses)
        best = _rows(state.space, layer, own.best[None])[0]
        best = jnp.where(own.best_value < jnp.inf, best, state.prompts[layer])
        return BlackBoxState(
            space=state.space,
            search=jax.tree.map(lambda all_, leaf: all_.at[layer].set(leaf), state.search, own),
            prompts=state.prompts.at[layer].set(best),
            last=state.prompts.at[layer].set(asked.rows[-1]),
            generation=state.generation + 1,
            calls=state.calls + len(asked.points),
        )

    return BlackBox(init, ask, tell)


def evaluator(
    scores: Scores, loss: Loss, *, plan: MeshPlan | None = None, at_once: int | None = None
) -> Callable[[Params, Batch, jax.Array, Asked], Evaluated]:
    """A pure ``(params, batch, prompts, asked) -> Evaluated``: every candidate on every example.

    Args:
      scores: the model as a function of a prompt; it is only ever called, see the module.
      loss: see ``losses``.
      plan: the candidates are divided over the data axes of its mesh (filled up with copies of
        the last one where they do not divide); parameters stay as they are on its other axes.
        None = one device.
      at_once: candidates of a device that are computed together; None = all of them. On a CPU
        few are faster, and memory grows with them.

    Raises:
      ValueError: at_once below 1.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be >= 1, got {at_once}")

    def local(
        params: Params, batch: Batch, prompts: jax.Array, layer: jax.Array, rows: jax.Array
    ) -> Evaluated:
        def one(row: jax.Array) -> Evaluated:
            logits = scores(params, prompts.at[layer].set(row), batch)
            out = loss(logits, batch["labels"], batch.get("label_mask"))
            right, weight = out.aux["accuracy"]
            return Evaluated(jnp.float32(out.total / out.weight), jnp.float32(right / weight))

        if at_once is None or at_once >= len(rows):
            return jax.vmap(one)(rows)
        found: Evaluated = jax.lax.map(one, rows, batch_size=at_once)
        return found

    def evaluate(params: Params, batch: Batch, prompts: jax.Array, asked: Asked) -> Evaluated:
        rows, count = asked.rows, len(asked.rows)
        if plan is None or plan.data_size == 1:
            return local(params, batch, prompts, asked.layer, rows)
        more = -count % plan.data_size
        if more:
            rows = jnp.concatenate([rows, jnp.broadcast_to(rows[-1:], (more, rows.shape[1]))])
        split, whole = PartitionSpec(plan.data_axes), PartitionSpec()
        # The model must not divide the examples of a candidate over the same axes.
        found = jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(whole, whole, whole, whole, split),
            out_specs=split,
            axis_names=set(plan.data_axes),
            check_vma=False,
        )(params, batch, prompts, asked.layer, rows)
        return Evaluated(*(x[:count] for x in found))

    return evaluate


def bbt_step(
    algorithm: BlackBox, evaluate: Evaluate
) -> Callable[[BlackBoxState, jax.Array], tuple[BlackBoxState, Metrics]]:
    """One generation: ``(state, key) -> (state, metrics)``, pure. The key is the search's.

    Metrics, float32: ``loss`` and ``accuracy`` of the best candidate, ``mean_loss`` over those
    that have a loss, ``best_loss`` ever of this prompt, ``sigma``, ``failed`` (candidates without
    a loss) and ``layer``.
    """

    def step(state: BlackBoxState, key: jax.Array) -> tuple[BlackBoxState, Metrics]:
        asked = algorithm.ask(state, key)
        found = evaluate(state.prompts, asked)
        state = algorithm.tell(state, asked, found.losses)
        return state, metrics(state, asked.layer, found)

    return step


def bbtv2_cycle(
    algorithm: BlackBox, evaluate: Evaluate
) -> Callable[[BlackBoxState, jax.Array], tuple[BlackBoxState, Metrics]]:
    """One generation of every layer, bottom-up, as one scan; metrics [S]."""
    step = bbt_step(algorithm, evaluate)

    def cycle(state: BlackBoxState, key: jax.Array) -> tuple[BlackBoxState, Metrics]:
        return jax.lax.scan(lambda s, _: step(s, key), state, length=len(state.prompts))

    return cycle


def metrics(state: BlackBoxState, layer: jax.Array, found: Evaluated) -> Metrics:
    """The numbers of a generation after it was told, see :func:`bbt_step`."""
    usable = found.losses < jnp.inf
    count = usable.sum()
    losses = jnp.where(usable, found.losses, jnp.inf)
    mean = jnp.where(usable, found.losses, 0.0).sum() / jnp.maximum(count, 1)
    return {
        "loss": losses.min(),
        "accuracy": found.accuracies[jnp.argmin(losses)],
        "mean_loss": jnp.where(count > 0, mean, jnp.nan),
        "best_loss": state.search.best_value[layer],
        "sigma": state.search.sigma[layer],
        "failed": (len(losses) - count).astype(jnp.float32),
        "layer": jnp.asarray(layer, jnp.float32),
    }


def generations(budget: int, popsize: int, prompts: int) -> int:
    """How many generations a budget of forward passes pays for, in whole rounds over the prompts.

    Raises:
      ValueError: it does not pay for one round.
    """
    rounds = budget // (popsize * prompts)
    if rounds < 1:
        raise ValueError(
            f"budget must be at least {popsize * prompts} forward passes ({popsize} candidates x "
            f"{prompts} prompts), got {budget}"
        )
    return rounds * prompts


def every(calls: int, popsize: int) -> int:
    """The number of generations in which ``calls`` forward passes are reached."""
    return max(1, math.ceil(calls / popsize))


def _rows(space: Space, layer: jax.Array, points: Float[Array, "l r"]) -> Float[Array, "l D"]:
    return space.start[layer] + points @ space.projections[layer].T
