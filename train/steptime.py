"""Steps that took far longer than the others: the log of a slow disk, host, or neighbour."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Hashable

WINDOW = 50
ENOUGH = 8  # steps of a shape before any of them can be called slow
FACTOR = 3.0
LEAST = 0.5  # seconds above the median: shorter ones are noise on any machine


class Outliers:
    """Compares each step with the median of the last 50 of the same shape of batch."""

    def __init__(self) -> None:
        self._times: dict[Hashable, collections.deque[float]] = {}

    def add(self, shape: Hashable, seconds: float) -> dict[str, float] | None:
        """Takes in one step.

        Returns:
          ``step_time``, ``median`` [s] and their ``ratio`` of a step that took more than 3 times
          the median and 0.5 s above it; None of any other. Slow steps count in the median too,
          so that a run that has become slow says so a few times and not for ever.
        """
        times = self._times.setdefault(shape, collections.deque(maxlen=WINDOW))
        found = None
        if len(times) >= ENOUGH:
            median = statistics.median(times)
            if seconds > FACTOR * median and seconds > median + LEAST:
                ratio = seconds / median if median > 0 else 0.0
                found = {"step_time": seconds, "median": median, "ratio": ratio}
        times.append(seconds)
        return found
