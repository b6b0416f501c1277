"""Shared checks of the metric functions' arguments: one line, the argument, the value, the cure."""

from __future__ import annotations

from typing import Any

import numpy as np


def floats(values: Any, name: str, ndim: int | None = 1) -> np.ndarray:
    """``values`` as a non-empty float64 array.

    Raises:
      ValueError: empty, of another rank than ``ndim``, or holding NaN or infinities.
    """
    array = np.asarray(values, dtype=np.float64)
    _filled(array, name, ndim)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name} must be finite, got {array[tuple(where)]} at {where}")
    return array


def classes(values: Any, name: str, num_labels: int | None = None) -> np.ndarray:
    """``values`` as a non-empty int64 vector of class numbers.

    Raises:
      ValueError: empty, not integers, negative, or not below ``num_labels``.
    """
    array = np.asarray(values)
    _filled(array, name, 1)
    if array.dtype.kind == "b":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integer class numbers, got dtype {array.dtype}")
    top = "" if num_labels is None else f" and < num_labels={num_labels}"
    bad = (array < 0) | (array >= (num_labels if num_labels is not None else np.inf))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{name} must be >= 0{top}, got {array[row]} at row {row}")
    return array.astype(np.int64)


def same_length(**arrays: Any) -> None:
    """
    Raises:
      ValueError: the arguments differ in length; names both with their lengths.
    """
    (first, a), *others = arrays.items()
    for name, b in others:
        if len(a) != len(b):
            raise ValueError(f"{first} has {len(a)} rows but {name} has {len(b)}")


def probabilities(values: Any, name: str = "probs") -> np.ndarray:
    """``values`` as float64 [N, C] whose rows are distributions.

    Raises:
      ValueError: another shape, negative values, or rows that do not add up to 1 (to 1e-3).
    """
    array = floats(values, name, 2)
    total = array.sum(1)
    bad = (array < 0).any(1) | (abs(total - 1) > 1e-3)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name} must hold distributions, but row {row} adds up to {total[row]:.4g} "
            f"with minimum {array[row].min():.4g}; apply a softmax"
        )
    return array


def _filled(array: np.ndarray, name: str, ndim: int | None) -> None:
    if array.size == 0:
        raise ValueError(f"{name} must not be empty: a metric of no examples is undefined")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
