"""One head whose classes belong to several tasks, so that every task runs the same program.

A model's head has the classes of all tasks; ``groups[c]`` is the task of class c. In a batch with
the column ``task`` [B] each row sees the classes of its own task alone:

  z_c <- z_c where groups[c] = task, else -1e9

The softmax, the loss and its gradient then touch that task's columns of the head only: it is a head
a task, and the task must be known at test. Without the column nothing is masked, and the classes
of all tasks compete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from steppe.models.model import Batch, Model, ModelOut
from steppe.train.types import Params

TASK = "task"
# Finite, so that a masked class has a probability of exactly 0 and no NaN in its gradient.
HIDDEN = -1e9


def grouped(model: Model, groups: Sequence[int]) -> Model:
    """``model`` with the classes of other tasks hidden, where the batch says whose the rows are.

    Args:
      model: with a classification head of ``len(groups)`` classes.
      groups: task of every class.

    Raises:
      ValueError: from ``apply``, a head of another number of classes.
    """
    owner = np.asarray(groups, np.int32)

    def apply(params: Params, batch: Batch, **options: Any) -> ModelOut:
        out = model.apply(params, batch, **options)
        if TASK not in batch or out.logits is None:
            return out
        if out.logits.shape[-1:] != owner.shape:
            raise ValueError(
                f"groups names the task of {len(owner)} classes, the model's logits have shape "
                f"{out.logits.shape}"
            )
        shown = owner[None] == jnp.asarray(batch[TASK])[:, None]
        return out._replace(logits=jnp.where(shown, out.logits, HIDDEN))

    return dataclasses.replace(model, apply=apply)


class Tagged:
    """Batches with the column ``task``: the task of each row's label.

    Rows that fill a batch up have the task of class 0.
    """

    def __init__(self, batches: Any, groups: Sequence[int]) -> None:
        """
        Args:
          batches: any of ``steppe.data.batches``, whose labels number the classes of ``groups``.
        """
        self._batches = batches
        self._groups = np.asarray(groups, np.int32)
        self.shapes = batches.shapes

    def __iter__(self) -> Iterator[Batch]:
        return map(self._tag, iter(self._batches))

    def __next__(self) -> Batch:
        return self._tag(next(self._batches))

    def _tag(self, batch: Batch) -> Batch:
        return {**batch, TASK: self._groups[np.maximum(batch["labels"], 0)]}

    def get_state(self) -> dict[str, int]:
        """As the batches underneath."""
        state: dict[str, int] = self._batches.get_state()
        return state

    def set_state(self, state: Any) -> None:
        """As the batches underneath."""
        self._batches.set_state(state)
