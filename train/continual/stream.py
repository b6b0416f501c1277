"""The loop over a stream of tasks: train on one, score all, make ready for the next.

What differs between methods is what happens between two tasks, a pure function of the state:

  sequential   nothing but a new optimiser state: one LoRA learns everything
  o-lora       ``committed``: the trained pair goes into the bank, a new one begins at B = 0
  replay       as sequential; the batches of later tasks hold a memory (see ``replay``)

Every task runs the same compiled step. At the end of a task the parameters are all there is to keep
(the optimiser's state is thrown away), so a stream is gone on with from the parameters that a task
has ended with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from steppe.models.overlays import files, o_lora
from steppe.models.overlays.overlay import OVERLAY
from steppe.train import loop, step
from steppe.train.mesh import MeshPlan
from steppe.train.step import TrainStep
from steppe.train.types import ModelLike, Params, TrainState

# (parameters that the last task has ended with, number of the next one) -> those it begins with
Between: TypeAlias = Callable[[Params, int], Params]


class Stage(NamedTuple):
    """One task of a stream.

    Attributes:
      name: for people.
      batches: endless; see ``steppe.data.batches``.
      steps: updates on this task.
    """

    name: str
    batches: loop.Batches
    steps: int


class Learnt(NamedTuple):
    """What there is after a task.

    Attributes:
      number: of the task, from 0.
      state: at its end.
      scores: accuracy on every task of the stream, also on those that are still to come.
    """

    number: int
    state: TrainState
    scores: list[float]


def sequential(params: Params, number: int) -> Params:
    """The next task goes on with the parameters of the last one."""
    return params


def committed(key: jax.Array) -> Between:
    """The next task begins with a new pair of O-LoRA; that of the last one is frozen.

    Args:
      key: of the new A of all tasks; a task's own depends on it and on the task's number.

    Raises:
      ValueError: from the function, a bank without a free slot.
    """

    def between(params: Params, number: int) -> Params:
        new = o_lora.commit_task(params[OVERLAY], jax.random.fold_in(key, number))
        return {**params, OVERLAY: new}

    return between


def begin(
    key: jax.Array,
    model: ModelLike,
    tx: optax.GradientTransformation,
    params: Params,
    plan: MeshPlan | None = None,
    *,
    step_number: int = 0,
) -> TrainState:
    """The state with which a task begins: given parameters, a fresh optimiser.

    Args:
      key: of the run, the same for all tasks.
      params: the full tree.
      step_number: updates before this task, so that its dropout is another one.
    """
    state = step.init(key, model, tx, plan, params=params)
    number = jax.device_put(state.step + step_number, state.step.sharding)
    return state.replace(step=number)


def run(
    train: TrainStep,
    model: ModelLike,
    tx: optax.GradientTransformation,
    params: Params,
    stages: Sequence[Stage],
    *,
    key: jax.Array,
    score: Callable[[Params], Sequence[float]],
    between: Between = sequential,
    plan: MeshPlan | None = None,
    start: int = 0,
    **options: Any,
) -> Iterator[Learnt]:
    """Learns the tasks one by one; yields after each.

    Args:
      train: the step; made of ``model``, ``tx`` and ``plan``.
      params: the full tree that the first task begins with; with ``start`` that with which task
        ``start - 1`` has ended.
      score: full tree -> accuracy on every task of the stream.
      between: what happens between two tasks.
      start: number of the first task that is still to be learnt.
      options: of ``loop.run``, such as ``writers`` and ``log_every``.

    Raises:
      ValueError: no stage, a stage without steps, start beyond the stages, and what ``between``
        and ``loop.run`` refuse.
    """
    if not stages:
        raise ValueError("stages must hold at least one task, got none")
    for stage in stages:
        if stage.steps < 1:
            raise ValueError(f"stage {stage.name!r} must have steps >= 1, got {stage.steps}")
    if not 0 <= start <= len(stages):
        raise ValueError(f"start must be between 0 and the {len(stages)} tasks, got {start}")
    done = sum(stage.steps for stage in stages[:start])
    for number in range(start, len(stages)):
        if number:
            params = between(params, number)
        state = begin(key, model, tx, params, plan, step_number=done)
        done += stages[number].steps
        state = loop.run(train, state, stages[number].batches, steps=done, **options)
        params = state.full()
        yield Learnt(number, state, [float(value) for value in score(params)])


def kept(params: Params, model: ModelLike, fresh: Sequence[str] = ()) -> Params:
    """The leaves that a stream must keep of a task's end to go on: what trains, and the bank.

    The frozen base is the same for all tasks and left out. Copies on the host.

    Args:
      fresh: paths in the base that its files do not hold, which are kept too.
    """
    found: Params = jax.device_get(files.belongs(params, model.trainable, fresh))
    return found
