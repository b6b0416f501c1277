"""Whether probabilities mean what they say: calibration error, reliability curve, Brier score.

Predictions are grouped by their confidence (largest probability) into M bins (lo, hi]:

  ECE = sum_b n_b / n * |accuracy_b - confidence_b|

  Brier = mean_i sum_c (p_ic - [y_i = c])^2, between 0 and 2       log loss = mean -log p_iy

Guo et al. 2017 (arXiv 1706.04599); Brier 1950 (Monthly Weather Review 78).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from steppe.train.evaluate import checks


@dataclass(frozen=True)
class Reliability:
    """One entry for each bin that holds an example; empty bins have no mean and are left out.

    Attributes:
      low, high: edges of the bin, (low, high]; the first bin also holds its low edge.
      confidence: mean confidence of the examples in it.
      accuracy: share of them that are right.
      count: how many there are.
    """

    low: np.ndarray
    high: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability_curve(
    confidence: Any, correct: Any, bins: int = 15, *, equal_mass: bool = False
) -> Reliability:
    """Confidence against accuracy, bin by bin.

    Args:
      confidence: probability of the predicted class [N], in [0, 1].
      correct: whether each prediction is right [N], bool or 0/1.
      bins: M.
      equal_mass: bins that hold equally many examples, not equally wide ones; ties may make
        them fewer.

    Raises:
      ValueError: no examples, different lengths, a confidence outside [0, 1], bins below 1.
    """
    p = checks.floats(confidence, "confidence")
    right = checks.floats(correct, "correct")
    checks.same_length(confidence=p, correct=right)
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    if p.min() < 0 or p.max() > 1 + 1e-9:
        bad = p.min() if p.min() < 0 else p.max()
        raise ValueError(f"confidence must be in [0, 1], got {bad}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    if equal_mass:
        inner = np.quantile(p, edges[1:-1], method="inverted_cdf")
        edges = np.unique(np.concatenate([[0.0], inner, [1.0]]))
    bin_of = np.searchsorted(edges[1:-1], p, side="left")
    size = len(edges) - 1
    count = np.bincount(bin_of, minlength=size)
    full = count > 0
    return Reliability(
        edges[:-1][full],
        edges[1:][full],
        np.bincount(bin_of, p, size)[full] / count[full],
        np.bincount(bin_of, right, size)[full] / count[full],
        count[full],
    )


def expected_calibration_error(
    probs: Any, labels: Any, bins: int = 15, *, equal_mass: bool = False
) -> float:
    """ECE in [0, 1] of distributions [N, C] against classes [N].

    Raises:
      ValueError: as :func:`reliability_curve`, or rows of probs that are no distribution.
    """
    p, y = _scored(probs, labels)
    curve = reliability_curve(
        np.minimum(p.max(1), 1.0), p.argmax(1) == y, bins, equal_mass=equal_mass
    )
    gap = abs(curve.accuracy - curve.confidence)
    return float((curve.count / curve.count.sum()) @ gap)


def brier(probs: Any, labels: Any) -> float:
    """Brier score in [0, 2] of distributions [N, C] against classes [N].

    For two classes this is twice the score that is often given for the positive class alone.

    Raises:
      ValueError: no examples, different lengths, rows of probs that are no distribution.
    """
    p, y = _scored(probs, labels)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean())


def log_loss(probs: Any, labels: Any) -> float:
    """Mean negative log probability of the label, in nats.

    Infinite where a label has probability 0: such a prediction cannot be made good.

    Raises:
      ValueError: no examples, different lengths, rows of probs that are no distribution.
    """
    p, y = _scored(probs, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(p[np.arange(len(y)), y]).mean())


def _scored(probs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    p = checks.probabilities(probs)
    y = checks.classes(labels, "labels", p.shape[1])
    checks.same_length(probs=p, labels=y)
    return p, y
