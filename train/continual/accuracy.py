"""How much a stream of tasks was learnt and kept, from the accuracy on every task after each.

  a[i, t]              accuracy on task i after the training on task t;  T tasks
  average accuracy     1 / T sum_i a[i, T]
  learning accuracy    1 / T sum_i a[i, i]                       just after each task's own training
  backward transfer    1 / (T - 1) sum_{i < T} a[i, T] - a[i, i]            negative = forgotten
  forgetting           1 / (T - 1) sum_{i < T} max_{t < T} a[i, t] - a[i, T]

The matrix here has a row for each time of measuring: ``matrix[t, i]`` is a[i, t].

Average accuracy and backward transfer: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840, as
O-LoRA (2310.14152) reports them; forgetting: Chaudhry et al., ECCV 2018, 1801.10112.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def continual_matrix(rows: Sequence[Sequence[float]]) -> Float[np.ndarray, "T T"]:
    """The matrix of a stream that is done: row t holds the accuracy on every task after task t.

    Raises:
      ValueError: no row, or not as many values in each as there are rows.
    """
    size = len(rows)
    if not size:
        raise ValueError("rows must hold the accuracies after at least one task, got none")
    for number, row in enumerate(rows):
        if len(row) != size:
            raise ValueError(
                f"row {number} has accuracies of {len(row)} tasks, but {size} were trained on: "
                "score every task after each of them"
            )
    return np.asarray(rows, np.float64)


def average_accuracy(matrix: Float[np.ndarray, "T T"]) -> float:
    """Mean over all tasks at the end."""
    return float(_square(matrix)[-1].mean())


def learning_accuracy(matrix: Float[np.ndarray, "T T"]) -> float:
    """Mean over all tasks, each just after it was learnt: plasticity."""
    return float(np.diagonal(_square(matrix)).mean())


def backward_transfer(matrix: Float[np.ndarray, "T T"]) -> float:
    """Mean change of the earlier tasks from their own training to the end; NaN for one task."""
    square = _square(matrix)
    if len(square) == 1:
        return float("nan")
    return float((square[-1] - np.diagonal(square))[:-1].mean())


def forgetting(matrix: Float[np.ndarray, "T T"]) -> float:
    """Mean drop of the earlier tasks from their best time before the last task; NaN for one."""
    square = _square(matrix)
    if len(square) == 1:
        return float("nan")
    return float((square[:-1].max(0) - square[-1])[:-1].mean())


def _square(matrix: np.ndarray) -> np.ndarray:
    found = np.asarray(matrix, np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not found.size:
        raise ValueError(f"the matrix must be [T, T], got shape {found.shape}")
    return found
