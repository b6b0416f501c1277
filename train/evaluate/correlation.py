"""Agreement of real-valued predictions with labels: Pearson, Spearman, squared error.

  pearson(x, y) = sum (x - mean x)(y - mean y) / (|x - mean x| |y - mean y|)
  spearman(x, y) = pearson(rank x, rank y), ties sharing the mean of their ranks

Both are 0 where one side is constant (the quotient is 0/0, and nothing can be seen); scipy
returns NaN there. Fewer than two examples is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steppe.train.evaluate import checks


def pearson(predictions: Any, labels: Any) -> float:
    """Pearson's product-moment correlation in [-1, 1].

    Raises:
      ValueError: fewer than 2 examples, different lengths, a value that is not finite.
    """
    return _correlation(*_pair(predictions, labels))


def spearman(predictions: Any, labels: Any) -> float:
    """Spearman's rank correlation in [-1, 1], average ranks for ties.

    Raises:
      ValueError: fewer than 2 examples, different lengths, a value that is not finite.
    """
    x, y = _pair(predictions, labels)
    return _correlation(average_ranks(x), average_ranks(y))


def average_ranks(values: Any) -> np.ndarray:
    """Ranks from 1 [N] (float64); equal values share the mean of their ranks.

    Raises:
      ValueError: no values, or a value that is not finite.
    """
    x = checks.floats(values, "values")
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def mean_squared_error(predictions: Any, labels: Any) -> float:
    """Mean of (prediction - label)^2, in squared units of the label.

    Raises:
      ValueError: no examples, different lengths, a value that is not finite.
    """
    x, y = checks.floats(predictions, "predictions"), checks.floats(labels, "labels")
    checks.same_length(predictions=x, labels=y)
    return float(((x - y) ** 2).mean())


def mean_absolute_error(predictions: Any, labels: Any) -> float:
    """Mean of abs(prediction - label), in units of the label.

    Raises:
      ValueError: no examples, different lengths, a value that is not finite.
    """
    x, y = checks.floats(predictions, "predictions"), checks.floats(labels, "labels")
    checks.same_length(predictions=x, labels=y)
    return float(abs(x - y).mean())


def _pair(predictions: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = checks.floats(predictions, "predictions"), checks.floats(labels, "labels")
    checks.same_length(predictions=x, labels=y)
    if len(x) < 2:
        raise ValueError(f"a correlation needs at least 2 examples, got {len(x)}")
    return x, y


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    # Scaling first keeps the squares of tiny and of huge values inside float64.
    x, y = (_unit(v / abs(v).max()) for v in (x, y))
    return float(np.clip(x @ y, -1.0, 1.0))


def _unit(v: np.ndarray) -> np.ndarray:
    v = v - v.mean()
    v = v / abs(v).max()
    return v / np.linalg.norm(v)
