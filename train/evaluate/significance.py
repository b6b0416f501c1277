"""How sure a number is: bootstrap intervals, and tests for two systems on the same examples.

  McNemar (exact): of the n = b + c examples on which exactly one system is right, b ~ Bin(n, 1/2)
  paired bootstrap: d*_k = difference on resample k of the examples, d the observed one;
                    p = (1 + #{k: |d*_k - d| >= |d|}) / (1 + K)

Efron 1979 (Ann. Statist. 7), percentile interval; McNemar 1947 (Psychometrika 12); Berg-Kirkpatrick
et al. 2012 (EMNLP) for the shift by d, which puts the resamples under the null hypothesis.
Every result is a function of its arguments and ``seed`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from steppe.train.evaluate import checks


class Interval(NamedTuple):
    """A value with its percentile interval at the given level."""

    value: float
    low: float
    high: float
    level: float


class McNemar(NamedTuple):
    """Discordant examples and the two-sided exact p-value.

    Attributes:
      only_first, only_second: examples that only the first, only the second system got right.
      p_value: 1.0 where the systems never disagree.
    """

    only_first: int
    only_second: int
    p_value: float


class Comparison(NamedTuple):
    """Difference second - first of a metric, its interval, and the two-sided p-value."""

    difference: float
    low: float
    high: float
    level: float
    p_value: float


def bootstrap(
    metric: Callable[..., float],
    *columns: Sequence[Any] | np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of ``metric(*columns)`` over resamples of the examples.

    Args:
      metric: such as ``evaluate.accuracy``, or ``np.mean``.
      *columns: arrays or lists of equal length, row i of each belonging to example i.
      samples: K, number of resamples.
      level: share of resamples inside the interval, in (0, 1).
      seed: of the resampling.

    Raises:
      ValueError: no examples, different lengths, samples below 1, level outside (0, 1).
    """
    size = _size(columns, samples, level)
    value = float(metric(*columns))
    draws = [float(metric(*_take(columns, i))) for i in _resamples(size, samples, seed)]
    low, high = _percentiles(draws, level)
    return Interval(value, low, high, level)


def mcnemar(first: Any, second: Any) -> McNemar:
    """Exact test of whether two systems are right equally often.

    Args:
      first, second: whether each system is right on each example, bool or 0/1 [N].

    Raises:
      ValueError: no examples, different lengths, values other than 0 and 1.
    """
    a, b = checks.classes(first, "first", 2), checks.classes(second, "second", 2)
    checks.same_length(first=a, second=b)
    only_first, only_second = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    # In logarithms: 2^-n underflows from about a thousand disagreements on.
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return McNemar(only_first, only_second, min(1.0, 2 * math.fsum(map(math.exp, logs))))


def paired_bootstrap(
    metric: Callable[[Any, Any], float],
    labels: Sequence[Any] | np.ndarray,
    first: Sequence[Any] | np.ndarray,
    second: Sequence[Any] | np.ndarray,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares two systems' predictions on the same examples, resampled together.

    Args:
      metric: ``metric(predictions, labels) -> float``.
      labels, first, second: arrays or lists of equal length.
      samples, level, seed: as :func:`bootstrap`.

    Raises:
      ValueError: no examples, different lengths, samples below 1, level outside (0, 1).
    """
    columns = (labels, first, second)
    size = _size(columns, samples, level)

    def difference(y: Any, a: Any, b: Any) -> float:
        return float(metric(b, y)) - float(metric(a, y))

    d = difference(*columns)
    draws = np.array([difference(*_take(columns, i)) for i in _resamples(size, samples, seed)])
    low, high = _percentiles(draws, level)
    # Resamples with d* = 0 must count when d = 0 (p = 1), whatever the rounding.
    extreme = int((abs(draws - d) >= abs(d) - 1e-12).sum())
    return Comparison(d, low, high, level, (1 + extreme) / (1 + samples))


def _size(columns: Sequence[Any], samples: int, level: float) -> int:
    if not columns or not len(columns[0]):
        raise ValueError("columns must not be empty: there is nothing to resample")
    checks.same_length(**{f"column {i}": column for i, column in enumerate(columns)})
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    return len(columns[0])


def _resamples(size: int, samples: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, size, size) for _ in range(samples))


def _take(columns: Sequence[Any], index: np.ndarray) -> list[Any]:
    return [
        np.asarray(c)[index] if hasattr(c, "__array__") else [c[i] for i in index] for c in columns
    ]


def _percentiles(draws: Any, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
