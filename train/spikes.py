"""Loss spikes: back to the last checkpoint, and on without the batches that led to the spike.

A step is bad when its loss is above ``factor`` times the median of the last ``window`` ones (and
0.1 above it), when its gradient norm is above ``norm_factor`` times theirs, or when either is not
finite. The state then returns to the anchor, the last regular checkpoint (without checkpoints: a
copy in memory), and the batches from there to the bad step are left out, as Chowdhery et al. did
(PaLM, 2022, arXiv 2204.02311, section 5.1). The number of updates stays the same; the data are
ahead of it by what was skipped.

Everything that decides is part of the position in the data, and saved with it: a run that is
killed and resumed goes back at the same steps to the same states.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Protocol

STATE = "spikes"
ENOUGH = 8  # steps before any can be called bad by comparison
LEAST = 0.1  # of the loss above the median: one that has come down to nothing jumps by any factor


class Source(Protocol):
    """Batches that can say where they are (see ``steppe.data.batches``)."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> Mapping[str, Any]: ...
    def set_state(self, state: Any) -> None: ...


class Spike(ArithmeticError):
    """A step that is not to be built upon.

    Attributes:
      step: its number.
      values: for the log: ``bad_step`` and what was bad about it, with the median.
    """

    def __init__(self, text: str, step: int, values: Mapping[str, float]) -> None:
        super().__init__(text)
        self.step = step
        self.values = dict(values)


class Diverged(ArithmeticError):
    """Going back has not helped; the message says what to change."""


class Spikes:
    """Batches that know what they have led to; ``loop.run`` goes back where they say so.

    Args:
      batches: what is learnt from.
      factor: of the loss; 0 = only a loss that is not finite is bad.
      norm_factor: of the gradient norm, which varies far more; 0 = the same.
      window: steps that the median is of.
      most: rollbacks in a run.

    Raises:
      ValueError: a factor that is neither 0 nor above 1, window < 8, most < 1.
    """

    def __init__(
        self,
        batches: Source,
        *,
        factor: float = 3.0,
        norm_factor: float = 0.0,
        window: int = 50,
        most: int = 3,
    ) -> None:
        for name, value in (("factor", factor), ("norm_factor", norm_factor)):
            if value and not 1 < value < math.inf:
                raise ValueError(f"{name} must be above 1 and finite, or 0 for off, got {value}")
        if window < ENOUGH:
            raise ValueError(f"window must be >= {ENOUGH} steps, got {window}")
        if most < 1:
            raise ValueError(f"most must be >= 1 rollbacks, got {most}")
        self.most = most
        self._batches = batches
        self._factors = {"loss": factor, "grad_norm": norm_factor}
        self._window = window
        self._history: list[tuple[int, float, float]] = []
        self._skip = 0
        self.anchor: int | None = None
        self.events: list[dict[str, float]] = []

    def __iter__(self) -> Spikes:
        return self

    def __next__(self) -> Mapping[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """That of the batches, and what is known of the steps so far."""
        own = {
            "history": [list(row) for row in self._history],
            "anchor": self.anchor,
            "skip": self._skip,
            "events": [dict(event) for event in self.events],
        }
        return {**self._batches.get_state(), STATE: own}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of :meth:`get_state`."""
        own = state.get(STATE) or {}
        self._history = [(int(s), float(a), float(b)) for s, a, b in own.get("history", ())]
        self.anchor = own.get("anchor")
        self._skip = int(own.get("skip", 0))
        self.events = [dict(event) for event in own.get("events", ())]
        self._inner(state)

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Takes in a step.

        Raises:
          Spike: it is bad, and was not taken in.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        for place, (name, value) in enumerate(values.items(), 1):
            if not math.isfinite(value):
                raise Spike(f"{name} is {value}", step, {"bad_step": step})
            factor = self._factors[name]
            if not factor or len(self._history) < ENOUGH:
                continue
            median = statistics.median(row[place] for row in self._history)
            least = LEAST if name == "loss" else 0.0
            if value > factor * median and value > median + least and median > 0:
                raise Spike(
                    f"{name} is {value:.4g}, more than {factor:g} times {median:.4g}, the median "
                    f"of the last {len(self._history)} steps",
                    step,
                    {"bad_step": step, name: value, f"{name}_median": median},
                )
        self._history = [*self._history, (step, loss, grad_norm)][-self._window :]

    def anchored(self, step: int) -> None:
        """The state after ``step`` can be gone back to."""
        self.anchor, self._skip = step, 0

    def back(self, spike: Spike) -> int:
        """Notes a rollback to the anchor; returns the batches that are skipped from there on.

        Raises:
          Diverged: there were as many as are allowed.
        """
        assert self.anchor is not None
        if len(self.events) >= self.most:
            raise Diverged(
                f"{spike} at step {spike.step}, after {len(self.events)} rollbacks (the most that "
                "are allowed) have not helped: lower the learning rate, clip the gradient "
                "(clip_norm), look at the data, or allow larger spikes or more rollbacks "
                "(spike_factor, spike_rollbacks)"
            ) from spike
        led = spike.step - self.anchor
        self._skip += led
        self._history = [row for row in self._history if row[0] <= self.anchor]
        number = len(self.events) + 1
        self.events.append(
            {"rollback": number, "anchor": self.anchor, "skipped": led, **spike.values}
        )
        return self._skip

    def rewind(self, state: Mapping[str, Any], skip: int) -> None:
        """Puts the batches to their state at the anchor and leaves out the next ``skip``.

        What was known of the steps then is known again: those since may be more than the window
        holds, and without a median nothing would be a spike.
        """
        own = state.get(STATE) or {}
        if "history" in own:
            self._history = [(int(s), float(a), float(b)) for s, a, b in own["history"]]
        self._inner(state)
        skip_over(self._batches, skip)

    def rows(self) -> list[dict[str, float]]:
        """What the log has behind the anchor: the rollbacks to it."""
        return [event for event in self.events if event["anchor"] == self.anchor]

    def _inner(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state({k: v for k, v in state.items() if k != STATE})


def skip_over(batches: Any, count: int) -> None:
    """Leaves out the next batches; those that carry something of their step do not count them."""
    own = getattr(batches, "skip", None)
    if own is not None:
        own(count)
        return
    for _ in range(count):
        next(batches)
