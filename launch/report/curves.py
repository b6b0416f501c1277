"""Series for the figures: from the rows of a log to at most a few hundred points.

A run of any length costs the report the same: values are gathered in buckets of steps, the
smoothed line is their mean, and the band behind it their range, so that no spike is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from steppe.launch.report.folder import number

MAX_POINTS = 240


class Series(NamedTuple):
    """Values over steps; both [N] float64, NaN where a value is missing or not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def empty(self) -> bool:
        """Whether there is not one finite value."""
        return not bool(np.isfinite(self.values).any())


class Band(NamedTuple):
    """Range of the raw values around a smoothed line, all [N]."""

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray


def series(rows: Iterable[Mapping[str, Any]], key: str) -> Series:
    """The values under ``key`` of the rows that have it."""
    points = [(row["step"], number(row[key])) for row in rows if key in row]
    steps = np.asarray([p[0] for p in points], np.float64)
    values = np.asarray([p[1] for p in points], np.float64)
    # The bound keeps sums and ranges of absurd values finite.
    return Series(steps, np.where(np.abs(values) < 1e200, values, np.nan))


def smooth(raw: Series, span: float | None = None) -> Series:
    """Exponential moving average, corrected for its start; NaN stays NaN and is passed over.

    Args:
      span: number of rows that it averages over; a thirtieth of the series, but at least
        five rows of a longer one, when None.
    """
    count = len(raw.values)
    span = max(1.0, min(5.0, count / 4), count / 30) if span is None else span
    decay = 1.0 - 2.0 / (span + 1.0)
    total = weight = 0.0
    out = np.full(count, np.nan)
    for i, value in enumerate(raw.values):
        if np.isnan(value):
            continue
        total = decay * total + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        out[i] = total / weight
    return Series(raw.steps, out)


def thin(raw: Series, points: int = MAX_POINTS) -> Series:
    """At most ``points`` points: the mean of each bucket of steps, NaN where it is all NaN."""
    if len(raw.steps) <= points:
        return raw
    return Series(*(_reduce(raw, points, f) for f in ("steps", "mean")))


def band(raw: Series, points: int = MAX_POINTS) -> Band:
    """Smallest and largest raw value of each bucket; the values themselves of a short series."""
    if len(raw.steps) <= 2 * points:  # buckets of one or two rows have no range to show
        return Band(raw.steps, raw.values, raw.values)
    return Band(*(_reduce(raw, points, f) for f in ("steps", "low", "high")))


def _reduce(raw: Series, points: int, what: str) -> np.ndarray:
    edges = np.linspace(0, len(raw.steps), points + 1).astype(int)
    out = np.full(points, np.nan)
    for i in range(points):
        values = raw.values[edges[i] : edges[i + 1]]
        finite = values[~np.isnan(values)]
        if what == "steps":
            out[i] = raw.steps[edges[i] : edges[i + 1]].mean()
        elif finite.size:
            reduced = {"mean": finite.mean, "low": finite.min, "high": finite.max}[what]()
            out[i] = reduced
    return out
