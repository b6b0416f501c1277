"""A profiler trace of a few steps, for TensorBoard, Perfetto or xprof."""

from __future__ import annotations

import os
from typing import Any

import jax

from steppe.train.types import TrainState


class Trace:
    """Traces the steps first, ..., end - 1, once; a watcher of ``loop.run`` and a context manager.

    A run that goes on from a step in between traces the rest of them, one that goes on from behind
    them traces nothing. Before and after, the devices are waited for, so that the trace holds these
    steps and no others.

    Args:
      first, end: steps are counted from 1.
      folder: the trace is written to ``FOLDER/plugins/profile/<time>/``.

    Raises:
      ValueError: not 1 <= first < end.
    """

    def __init__(self, first: int, end: int, folder: str | os.PathLike[str]) -> None:
        if not 1 <= first < end:
            raise ValueError(
                f"steps to profile must be FIRST:END with 1 <= FIRST < END, got {first}:{end}"
            )
        self.first, self.end = first, end
        self._folder = os.fspath(folder)
        self._running = self._done = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop()

    def before(self, step: int, state: TrainState) -> None:
        """Begins or ends the trace."""
        inside = self.first <= step < self.end
        if inside and not self._running and not self._done:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and not inside:
            jax.block_until_ready(state)
            self._stop()

    def after(self, step: int) -> None:
        """Nothing: the end is seen before the next step."""

    def _stop(self) -> None:
        if self._running:
            self._running, self._done = False, True
            jax.profiler.stop_trace()
