"""The loop: it calls the step, and everything around it happens one step late or off the path.

Metrics are fetched from the device after the next step has been dispatched, so the device
never waits for the log. Input wait and compile time are measured apart from step time.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from steppe.train import metrics as metrics_
from steppe.train.checkpoint import Checkpoints
from steppe.train.step import TrainStep
from steppe.train.types import Metrics, TrainState


class Batches(Protocol):
    """An endless source of batches that can say where it is (see ``steppe.data.batches``)."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> dict[str, int]: ...
    def set_state(self, state: Mapping[str, int]) -> None: ...


class Writer(Protocol):
    """Where rows go (see ``steppe.train.metrics``)."""

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None: ...
    def truncate(self, step: int) -> None: ...


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient became NaN or infinite; no checkpoint of that state exists."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the message says what was saved and how to go on."""


def resume(
    state: TrainState, batches: Batches, checkpoints: Checkpoints, writers: Sequence[Writer] = ()
) -> TrainState:
    """Continues from the newest checkpoint: state, position in the data, and log files.

    Raises:
      CheckpointError: there is none, or it does not fit ``state``.
    """
    state, data = checkpoints.restore(state)
    batches.set_state(data)
    for writer in writers:
        writer.truncate(int(state.step))
    return state


def run(
    train: TrainStep,
    state: TrainState,
    batches: Batches,
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    log_every: int = 10,
    writers: Sequence[Writer] = (),
    schedule: Callable[[int], Any] | None = None,
) -> TrainState:
    """Trains until ``state.step == steps``.

    Args:
      train: the step.
      state: where to start; its memory is reused.
      batches: endless; its state is saved with every checkpoint.
      steps: total number of updates, those before a resume included.
      checkpoints, save_every: saved every so many steps and at the end; 0 = at the end only.
      evaluate, eval_every: called every so many steps and at the end; its values are written
        as a row of kind "eval".
      log_every: a row of kind "train" every so many steps: means over the window of the
        step's metrics, and ``step_time`` [s], ``input_wait`` [s a step], ``tokens_per_s``
        (attended tokens), ``compile_time`` [s] where a program was compiled.
      writers: receive the rows.
      schedule: step -> learning rate, for the log.

    Returns:
      The final state.

    Raises:
      NonFiniteLoss: before a state that follows the bad step is saved.
      Interrupted: Ctrl-C or SIGTERM; the state after the last complete step is saved first.
      ValueError: steps lies before the state's step, or log_every < 1.
    """
    if log_every < 1:
        raise ValueError(f"log_every must be >= 1, got {log_every}")
    start = int(state.step)
    if start > steps:
        raise ValueError(f"the state is at step {start} already, beyond steps={steps}")
    window = _Window(train)
    pending: tuple[int, Metrics] | None = None

    def settle() -> None:
        """Takes in the metrics of the step before, now that the next one is under way."""
        nonlocal pending
        if pending is None:
            return
        step, values = pending
        pending = None
        found = metrics_.fetch(values)
        for name in ("loss", "grad_norm"):
            total, weight = found[name]
            if not math.isfinite(total):
                kept = None if checkpoints is None else checkpoints.latest
                hint = "no checkpoint exists" if kept is None else f"step {kept} is kept"
                raise NonFiniteLoss(
                    f"{name} is {total / weight} at step {step}; {hint}. Lower the learning rate, "
                    "clip the gradient (clip_norm), or look at the batch of that step"
                )
        window.add(found)
        if step % log_every == 0 or step == steps:
            row = window.row()
            if schedule is not None:
                row["learning_rate"] = float(schedule(step - 1))
            _write(writers, step, "train", row)

    def save(current: TrainState, *, wait: bool = False) -> None:
        if checkpoints is not None:
            checkpoints.save(current, batches.get_state(), wait=wait)

    with _stop_requests() as stopping:
        try:
            for step in range(start + 1, steps + 1):
                with window.waiting():
                    batch = next(batches)
                with window.stepping(batch):
                    state, values = train(state, batch)
                settle()
                pending = (step, values)
                last = step == steps
                if stopping() and not last:
                    settle()
                    save(state, wait=True)
                    raise Interrupted(_stopped(step, steps, checkpoints))
                if evaluate is not None and (last or (eval_every and step % eval_every == 0)):
                    settle()
                    with window.paused():
                        _write(writers, step, "eval", dict(evaluate(state)))
                if last or (save_every and step % save_every == 0):
                    settle()
                    with window.paused():
                        save(state)
            settle()
        finally:
            if checkpoints is not None:
                checkpoints.wait()
    return state


def _stopped(step: int, steps: int, checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return f"interrupted at step {step} of {steps}; nothing is saved (no checkpoints)"
    return (
        f"interrupted at step {step} of {steps}; it is saved in {checkpoints.directory}. "
        "Give the same command with --resume to go on"
    )


def _write(writers: Sequence[Writer], step: int, kind: str, values: Mapping[str, Any]) -> None:
    for writer in writers:
        writer.write(step, kind, values)


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Notes Ctrl-C and SIGTERM instead of dying in the middle of a step.

    A second one has its usual effect. Outside the main thread signals are left alone.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        restore()


class _Window:
    """Metrics and times since the last row."""

    def __init__(self, train: TrainStep) -> None:
        self._train = train
        self._reset()

    def _reset(self) -> None:
        self._mean = metrics_.Mean()
        self._steps = 0
        self._tokens = 0
        self._wait = self._compile = self._apart = 0.0
        self._since = time.perf_counter()

    def add(self, found: Mapping[str, tuple[float, float]]) -> None:
        self._mean.add(found)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and saving do not count as step time."""
        begin = time.perf_counter()
        yield
        self._apart += time.perf_counter() - begin

    @contextlib.contextmanager
    def stepping(self, batch: Mapping[str, Any]) -> Iterator[None]:
        compiled = self._train.compiles
        begin = time.perf_counter()
        yield
        if self._train.compiles > compiled:  # a dispatch takes no time, a compile does
            self._compile += time.perf_counter() - begin
        self._steps += 1
        mask = batch.get("attention_mask")
        if isinstance(mask, np.ndarray):
            self._tokens += int(mask.sum()) * jax.process_count()

    def row(self) -> dict[str, Any]:
        took = time.perf_counter() - self._since - self._compile - self._apart
        row: dict[str, Any] = dict(self._mean.result())
        row["step_time"] = took / max(self._steps, 1)
        row["input_wait"] = self._wait / max(self._steps, 1)
        if self._tokens and took > 0:
            row["tokens_per_s"] = self._tokens / took
        if self._compile:
            row["compile_time"] = self._compile
        self._reset()
        return row
