"""Two callables measured in turns, so that a drift of the machine meets both alike.

After a warm-up of each: A B A B ..., one turn being a number of steps. Every turn gives one
time a step for each side, and every pair of turns one ratio; the result is their median and
range. A ratio below 1 says that A is faster.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

# Slowest round / fastest round of one side, above which a run is no measurement.
STEADY = 1.25
# Takes that many steps, waits until their results are there, and returns the seconds.
Turn: TypeAlias = Callable[[int], float]


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
      warmup: steps of each side before the first turn.
      rounds: pairs of turns.
      steps: steps of a turn.
    """

    warmup: int = 5
    rounds: int = 5
    steps: int = 20

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("rounds", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


class Spread(NamedTuple):
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float


class Void(ValueError):
    """The two sides do not compute the same thing, so comparing their speed means nothing."""


def timed(
    step: Callable[[], Any],
    sync: Callable[[Any], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Turn:
    """A turn of a callable that makes one step.

    Args:
      step: one step; may return before its result is computed.
      sync: waits for the last step's result (``jax.block_until_ready``).
    """

    def turn(steps: int) -> float:
        start = clock()
        result = None
        for _ in range(steps):
            result = step()
        if sync is not None:
            sync(result)
        return clock() - start

    return turn


def measure(turn: Turn, protocol: Protocol = Protocol()) -> list[float]:
    """Seconds a step of one side alone, one value a round."""
    if protocol.warmup:
        turn(protocol.warmup)
    return [turn(protocol.steps) / protocol.steps for _ in range(protocol.rounds)]


def compare(a: Turn, b: Turn, protocol: Protocol = Protocol()) -> tuple[list[float], list[float]]:
    """Seconds a step of both sides, interleaved A B A B; one value a round."""
    times = interleave({"a": a, "b": b}, protocol)
    return times["a"], times["b"]


def interleave(
    turns: Mapping[str, Turn], protocol: Protocol = Protocol()
) -> dict[str, list[float]]:
    """Seconds a step of any number of sides, A B C A B C; one value a round."""
    if protocol.warmup:
        for turn in turns.values():
            turn(protocol.warmup)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(protocol.rounds):
        for name, turn in turns.items():
            times[name].append(turn(protocol.steps) / protocol.steps)
    return times


def spread(values: Sequence[float]) -> Spread:
    """Median and range.

    Raises:
      ValueError: there are no values.
    """
    if not values:
        raise ValueError("values must not be empty")
    return Spread(statistics.median(values), min(values), max(values))


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Median and range of a / b, pair by pair."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def unsteady(sides: Mapping[str, Sequence[float]], limit: float = STEADY) -> list[str]:
    """Why the times are no measurement: sentences, none when they are one.

    The load before a run says nothing about who came during it. Work that came from elsewhere
    shows as rounds of one side that differ, and a median over disturbed rounds may favour
    either side.
    """
    reasons = []
    for name, times in sides.items():
        slow = max(times) / min(times)
        if slow > limit:
            reasons.append(
                f"the slowest round of {name} took {slow:.2f} times the fastest (limit {limit}): "
                "something else was running; do not quote these numbers"
            )
    return reasons


def same_losses(a: Sequence[float], b: Sequence[float], tolerance: float = 1e-4) -> float:
    """The largest relative difference of two loss curves.

    Raises:
      Void: it is above ``tolerance``, a loss is not finite, or the curves differ in length.
    """
    if len(a) != len(b) or not a:
        raise Void(f"the loss curves have {len(a)} and {len(b)} steps; the comparison is void")
    worst, at = 0.0, 0
    for step, (x, y) in enumerate(zip(a, b)):
        if not (math.isfinite(x) and math.isfinite(y)):
            raise Void(f"the losses at step {step} are {x} and {y}; the comparison is void")
        difference = abs(x - y) / max(abs(x), abs(y), 1e-12)
        if difference > worst:
            worst, at = difference, step
    if not worst <= tolerance:  # nor where the tolerance is NaN
        raise Void(
            f"the losses differ by {worst:.2e} at step {at} ({a[at]:.7g} and {b[at]:.7g}), "
            f"more than {tolerance:g}; the comparison is void"
        )
    return worst
