"""Metrics and times of the steps since the last row of the log.

A step's time goes from the moment when the metrics of the step before were there to the moment when
its own are; what is known not to belong to it (compiling, evaluating, saving) is counted apart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from steppe.train import metrics as metrics_
from steppe.train import steptime
from steppe.train.types import Metrics


class Pending(NamedTuple):
    """A step that was dispatched and whose metrics have not been read.

    Attributes:
      tokens: attended tokens of the batch.
      shape: of the batch.
      flops: model FLOPs; 0 where they are not known.
    """

    step: int
    metrics: Metrics
    tokens: int
    shape: tuple[Any, ...]
    flops: float = 0.0

    def ready(self) -> bool:
        """Whether the device is done with it."""
        leaves = jax.tree.leaves(self.metrics)
        return all(leaf.is_ready() for leaf in leaves if hasattr(leaf, "is_ready"))


class Window:
    """Metrics and times since the last row.

    Args:
      peak: of all devices together, FLOP/s; 0 where it is not known.
    """

    def __init__(self, peak: float = 0.0) -> None:
        self._peak = peak
        self._outliers = steptime.Outliers()
        self.restart()

    def restart(self) -> None:
        """Forgets the steps since the last row: they are taken again."""
        self._reset()
        self._mark()

    def _mark(self) -> None:
        """A step begins to be timed here; what is known not to be its own is taken off."""
        self._since_step, self._not_step = time.perf_counter(), 0.0

    def _reset(self) -> None:
        self._mean = metrics_.Mean()
        self._steps = self._tokens = 0
        self._flops = self._wait = self._blocked = 0.0
        self._apart: dict[str, float] = {}
        self._since = time.perf_counter()

    def add(
        self, done: Pending, found: Mapping[str, tuple[float, float]]
    ) -> dict[str, float] | None:
        """Takes in a step whose metrics have come; says how slow it was if it was."""
        self._mean.add(found)
        self._steps += 1
        self._tokens += done.tokens
        self._flops += done.flops
        took = time.perf_counter() - self._since_step - self._not_step
        self._mark()
        return self._outliers.add(done.shape, took)

    def compiled(self, seconds: float) -> None:
        """A program was compiled meanwhile."""
        self._take_off("compile_time", seconds)

    def dispatched(self, pending: Pending, seconds: float) -> None:
        """The step was called. A call whose results are there at once has waited for them: fake
        devices take one program at a time, see ``mesh.settle``."""
        if pending.ready():
            self._blocked += seconds

    @contextlib.contextmanager
    def waiting(self, pending: Pending | None) -> Iterator[None]:
        """Preparing input costs something only if the device ran dry meanwhile."""
        begin = time.perf_counter()
        yield
        if pending is None or pending.ready():
            self._wait += time.perf_counter() - begin

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """The host has nothing to do until the device is done: the better, the longer."""
        begin = time.perf_counter()
        yield
        self._blocked += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Evaluation and saving do not count as step time; a row has them under ``name``."""
        begin = time.perf_counter()
        yield
        self._take_off(name, time.perf_counter() - begin)

    def _take_off(self, name: str, seconds: float) -> None:
        self._apart[name] = self._apart.get(name, 0.0) + seconds
        self._not_step += seconds

    def row(self) -> dict[str, Any]:
        """The numbers of a row; a new window begins."""
        took = time.perf_counter() - self._since - sum(self._apart.values())
        row: dict[str, Any] = dict(self._mean.result())
        row["step_time"] = took / self._steps
        row["input_wait"] = self._wait / self._steps
        row["device_wait"] = self._blocked / self._steps
        if self._tokens and took > 0:
            row["tokens_per_s"] = self._tokens / took
        if self._flops and took > 0:
            row["flops_per_s"] = self._flops / took
            if self._peak:
                row["mfu"] = row["flops_per_s"] / self._peak
        row |= memory() | self._apart
        self._reset()
        return row


def memory() -> dict[str, float]:
    """Bytes in use on the fullest device of this process now, and at most so far; empty where the
    backend does not tell (CPUs)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = {
        "memory": [s["bytes_in_use"] for s in stats if "bytes_in_use" in s],
        "memory_peak": [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s],
    }
    return {name: float(max(values)) for name, values in found.items() if values}


def pending(
    step: int,
    metrics: Metrics,
    batch: Mapping[str, Any],
    flops: Callable[[Mapping[str, Any]], float] | None = None,
) -> Pending:
    """The step that was dispatched on ``batch``."""
    shape = tuple(np.shape(value) for value in batch.values())
    return Pending(step, metrics, tokens(batch), shape, 0.0 if flops is None else flops(batch))


def tokens(batch: Mapping[str, Any]) -> int:
    """Attended tokens of the batch; processes are taken to have as many each."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) * jax.process_count() if isinstance(mask, np.ndarray) else 0
