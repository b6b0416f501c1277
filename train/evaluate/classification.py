"""Metrics of class predictions: accuracy, precision, recall, F1, Matthews correlation.

  precision = tp / (tp + fp)      recall = tp / (tp + fn)      F1 = 2 tp / (2 tp + fp + fn)
  MCC = cov(y, z) / sqrt(cov(y, y) cov(z, z))  over one-hot labels y and predictions z

All in float64 on the host. A quotient with denominator 0 is 0, as with scikit-learn's
``zero_division=0``; so MCC is 0 for a constant prediction or a single class. No examples is an
error. Multi-class MCC: Gorodkin 2004 (Comput. Biol. Chem. 28).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from steppe.train.evaluate import checks

AVERAGES = ("binary", "macro", "micro")


class PRF(NamedTuple):
    """Precision, recall and F1, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


def confusion_matrix(predictions: Any, labels: Any, num_labels: int | None = None) -> np.ndarray:
    """Counts [C, C] (int64): row = true class, column = predicted class.

    Args:
      predictions, labels: class numbers [N].
      num_labels: C; default the largest class seen, plus 1.

    Raises:
      ValueError: no examples, different lengths, or a class outside [0, num_labels).
    """
    z = checks.classes(predictions, "predictions", num_labels)
    y = checks.classes(labels, "labels", num_labels)
    checks.same_length(predictions=z, labels=y)
    size = num_labels if num_labels is not None else int(max(z.max(), y.max())) + 1
    return np.bincount(y * size + z, minlength=size * size).reshape(size, size)


def accuracy(predictions: Any, labels: Any) -> float:
    """Share of predictions that equal the label.

    Raises:
      ValueError: no examples, or different lengths.
    """
    z = checks.classes(predictions, "predictions")
    y = checks.classes(labels, "labels")
    checks.same_length(predictions=z, labels=y)
    # No matrix: the classes may be the tokens of a vocabulary.
    return float(np.count_nonzero(z == y) / len(z))


def precision_recall_f1(
    predictions: Any,
    labels: Any,
    average: str = "binary",
    *,
    positive: int = 1,
    num_labels: int | None = None,
) -> PRF:
    """Precision, recall and F1.

    Args:
      predictions, labels: class numbers [N].
      average: ``"binary"`` = of the class ``positive``; ``"macro"`` = plain mean over
        classes; ``"micro"`` = over the pooled decisions (equal to accuracy, all three).
      num_labels: macro averages over all of this many classes; default the classes that
        occur in the labels or the predictions, as scikit-learn does.

    Raises:
      ValueError: no examples, different lengths, an unknown average, labels other than two
        classes with ``"binary"``.
    """
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}")
    per_class = per_class_scores(predictions, labels, num_labels)
    matrix = confusion_matrix(predictions, labels, num_labels)
    if average == "micro":
        share = float(np.trace(matrix) / matrix.sum())
        return PRF(share, share, share)
    if average == "macro":
        seen = matrix.sum(0) + matrix.sum(1) > 0
        keep = seen if num_labels is None else np.ones_like(seen)
        return PRF(*(float(column[keep].mean()) for column in per_class))
    if len(matrix) > 2:
        raise ValueError(
            f"average='binary' needs classes 0 and 1, got {len(matrix)} classes; "
            "use 'macro' or 'micro'"
        )
    if positive not in (0, 1):
        raise ValueError(f"positive must be 0 or 1, got {positive}")
    if positive >= len(matrix):  # neither labelled nor predicted
        return PRF(0.0, 0.0, 0.0)
    return PRF(*(float(column[positive]) for column in per_class))


def f1(predictions: Any, labels: Any, average: str = "binary", **options: Any) -> float:
    """F1 alone; arguments and errors of :func:`precision_recall_f1`."""
    return precision_recall_f1(predictions, labels, average, **options).f1


def per_class_scores(
    predictions: Any, labels: Any, num_labels: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of every class, three arrays [C]; 0 for an absent class.

    Raises:
      ValueError: as :func:`confusion_matrix`.
    """
    matrix = confusion_matrix(predictions, labels, num_labels)
    hit = np.diag(matrix)
    return (
        ratio(hit, matrix.sum(0)),
        ratio(hit, matrix.sum(1)),
        ratio(2 * hit, matrix.sum(0) + matrix.sum(1)),
    )


def mcc(predictions: Any, labels: Any) -> float:
    """Matthews correlation in [-1, 1], for any number of classes.

    0 where either side is constant: no association can be seen.

    Raises:
      ValueError: no examples, or different lengths.
    """
    # Python integers: the products of counts overflow int64 from 2^31.5 examples on.
    matrix = confusion_matrix(predictions, labels).astype(object)
    total, right = matrix.sum(), np.trace(matrix)
    truth, guess = matrix.sum(1), matrix.sum(0)
    covariance = right * total - (truth * guess).sum()
    spread = (total**2 - (guess**2).sum()) * (total**2 - (truth**2).sum())
    return float(covariance) / float(spread) ** 0.5 if spread else 0.0


def ratio(top: Any, bottom: Any) -> np.ndarray:
    """top / bottom in float64, 0 where bottom is 0."""
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)
