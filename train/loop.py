"""The loop: it calls the step, and everything around it happens one step late or off the path.

While the device works on a step, the host reads the metrics of the one before and prepares the
next batch; the device never waits for the log. What cannot be hidden (waiting for input,
compiling, evaluating, saving) is measured apart from the step time.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from steppe.train import metrics as metrics_
from steppe.train import steptime
from steppe.train import watchdog as watchdog_
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
    """Loss, gradient or parameters became NaN or infinite; no checkpoint of that state exists."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the message says what was saved and how to go on.

    Attributes:
      status: the exit status of a process that ends by it.
    """

    status = 130


class Preempted(Interrupted):
    """SIGTERM: whoever runs the machine wants it back; the run should be started again."""

    status = 75


def resume(
    state: TrainState, batches: Batches, checkpoints: Checkpoints, writers: Sequence[Writer] = ()
) -> TrainState:
    """Continues from the newest checkpoint: state, position in the data, and log files.

    Args:
      state: a fresh state of the same run, or its shapes (``step.abstract``, which saves the
        memory); it may lie on another mesh than the run that was saved.

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
    watchdog: float = 0.0,
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
      log_every: a row of kind "train" every so many steps, and before every save, so that the
        rows of a resumed run cover the same steps: means over the window of the step's
        metrics, and ``step_time`` [s], ``input_wait`` [s a step in which the device had run
        out of work], ``tokens_per_s`` (attended tokens), ``compile_time`` [s] where a program
        was compiled. A step that took far longer than those before it of the same shape gets
        a row of kind "slow", see ``steptime``.
      writers: receive the rows.
      schedule: step -> learning rate, for the log.
      watchdog: seconds that a step (its compilation included), an evaluation or a save may
        take; beyond, the process ends with status 76, see ``watchdog``. 0 = no limit.

    Returns:
      The final state.

    Raises:
      NonFiniteLoss: before a state that follows the bad step is saved.
      Interrupted: Ctrl-C, and Preempted: SIGTERM; the state after the last complete step is
        saved first. A second Ctrl-C stops at once.
      SaveFailed: a checkpoint could not be written; the earlier ones stand.
      ValueError: steps lies before the state's step, an interval is out of range, or the
        batches come to an end.
    """
    if log_every < 1:
        raise ValueError(f"log_every must be >= 1, got {log_every}")
    if save_every < 0 or eval_every < 0:
        raise ValueError(
            f"save_every and eval_every must be >= 0, got {save_every} and {eval_every}"
        )
    start = int(state.step)
    if start > steps:
        raise ValueError(f"the state is at step {start} already, beyond steps={steps}")
    window = _Window()
    pending: _Pending | None = None

    def settle(*, flush: bool = False) -> None:
        """Takes in the metrics of the step before, now that the next one is under way."""
        nonlocal pending
        done, pending = pending, None
        if done is None:
            return
        found = metrics_.fetch(done.metrics)
        for name in ("loss", "grad_norm"):
            if name in found and not math.isfinite(sum(found[name])):
                raise NonFiniteLoss(_bad(f"{name} is {found[name][0]}", done.step, checkpoints))
        slow = window.add(done, found)
        if slow is not None:
            _write(writers, done.step, "slow", slow)
        if flush or done.step % log_every == 0 or done.step == steps:
            row = window.row()
            if schedule is not None:
                row["learning_rate"] = float(schedule(done.step - 1))
            _write(writers, done.step, "train", row)

    def save(step: int, *, wait: bool = False) -> None:
        if checkpoints is None:
            return
        # Loss and gradient were finite, but the update may have overflowed.
        if not bool(_finite(state.params)):
            raise NonFiniteLoss(_bad("a parameter is not finite", step, checkpoints))
        checkpoints.save(state, batches.get_state(), wait=wait)

    with (
        _stop_requests() as stopping,
        _complete(checkpoints),
        watchdog_.watching(watchdog) as beat,
    ):
        for step in range(start + 1, steps + 1):
            with window.waiting(pending):
                batch = _next(batches, step, steps)
            beat(f"step {step}")
            compiled, began = train.compiles, time.perf_counter()
            state, metrics = train(state, batch)
            if train.compiles > compiled:  # a dispatch takes no time, a compile does
                window.compiled(time.perf_counter() - began)
            settle()
            pending = _Pending(step, metrics, _tokens(batch), _shape(batch))
            last = step == steps
            scoring = evaluate is not None and (last or (eval_every and step % eval_every == 0))
            saving = last or (save_every and step % save_every == 0)
            stop = 0 if last else stopping(step)
            if scoring or saving or stop:
                settle(flush=bool(saving or stop) and checkpoints is not None)
            if scoring and evaluate is not None:
                beat(f"the evaluation at step {step}")
                with window.paused():
                    _write(writers, step, "eval", dict(evaluate(state)))
            if saving or stop:
                beat(f"the save at step {step}")
                with window.paused():
                    save(step, wait=bool(stop))
            if stop:
                kind = Preempted if stop == signal.SIGTERM else Interrupted
                raise kind(_stopped(step, steps, checkpoints))
            beat("the next batch")
    return state


class _Pending(NamedTuple):
    """A step that was dispatched and whose metrics have not been read."""

    step: int
    metrics: Metrics
    tokens: int
    shape: tuple[Any, ...]

    def ready(self) -> bool:
        """Whether the device is done with it."""
        leaves = jax.tree.leaves(self.metrics)
        return all(leaf.is_ready() for leaf in leaves if hasattr(leaf, "is_ready"))


class _Window:
    """Metrics and times since the last row."""

    def __init__(self) -> None:
        self._outliers = steptime.Outliers()
        self._reset()
        self._mark()

    def _mark(self) -> None:
        """A step begins to be timed here; what is known not to be its own is taken off."""
        self._since_step, self._not_step = time.perf_counter(), 0.0

    def _reset(self) -> None:
        self._mean = metrics_.Mean()
        self._steps = self._tokens = 0
        self._wait = self._compile = self._apart = 0.0
        self._since = time.perf_counter()

    def add(
        self, done: _Pending, found: Mapping[str, tuple[float, float]]
    ) -> dict[str, float] | None:
        """Takes in a step whose metrics have come; says how slow it was if it was."""
        self._mean.add(found)
        self._steps += 1
        self._tokens += done.tokens
        took = time.perf_counter() - self._since_step - self._not_step
        self._mark()
        return self._outliers.add(done.shape, took)

    def compiled(self, seconds: float) -> None:
        self._compile += seconds
        self._not_step += seconds

    @contextlib.contextmanager
    def waiting(self, pending: _Pending | None) -> Iterator[None]:
        """Preparing input costs something only if the device ran dry meanwhile."""
        begin = time.perf_counter()
        yield
        if pending is None or pending.ready():
            self._wait += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and saving do not count as step time."""
        begin = time.perf_counter()
        yield
        apart = time.perf_counter() - begin
        self._apart += apart
        self._not_step += apart

    def row(self) -> dict[str, Any]:
        took = time.perf_counter() - self._since - self._compile - self._apart
        row: dict[str, Any] = dict(self._mean.result())
        row["step_time"] = took / self._steps
        row["input_wait"] = self._wait / self._steps
        if self._tokens and took > 0:
            row["tokens_per_s"] = self._tokens / took
        if self._compile:
            row["compile_time"] = self._compile
        self._reset()
        return row


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _next(batches: Batches, step: int, steps: int) -> Mapping[str, Any]:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the batches ended before step {step} of {steps}: give an endless source "
            "(steppe.data.batches.train), or fewer steps"
        ) from None


def _tokens(batch: Mapping[str, Any]) -> int:
    """Attended tokens of the batch; processes are taken to have as many each."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) * jax.process_count() if isinstance(mask, np.ndarray) else 0


def _shape(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(np.shape(value) for value in batch.values())


def _bad(what: str, step: int, checkpoints: Checkpoints | None) -> str:
    kept, failed = None, ""
    if checkpoints is not None:
        try:
            checkpoints.wait()
        except OSError as error:
            failed = f" ({error})"
        kept = checkpoints.latest
    hint = "no checkpoint exists" if kept is None else f"the checkpoint of step {kept} is kept"
    return (
        f"{what} at step {step}; {hint}{failed}. Lower the learning rate, clip the gradient "
        "(clip_norm), or look at the batch of that step"
    )


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
def _complete(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Leaves no write half done; its failure does not hide the error that ended the loop."""
    try:
        yield
    except BaseException as error:
        if checkpoints is not None:
            try:
                checkpoints.wait()
            except OSError as failed:
                error.add_note(str(failed))
        raise
    if checkpoints is not None:
        checkpoints.wait()


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], int]]:
    """Notes Ctrl-C and SIGTERM instead of dying in the middle of a step; yields step -> signal, 0
    for none.

    A second one has its usual effect. Outside the main thread signals are left alone. With
    several processes, which must stop at the same step, jax's preemption service is asked;
    it has its own handler of SIGTERM.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        def reached(step: int) -> int:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0

        yield reached
        return
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0
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
        yield lambda step: seen[0] if seen else 0
    finally:
        restore()
