"""The loop: it calls the step, and everything around it happens one step late or off the path.

While the device works on a step, the host reads the metrics of the one before and prepares the
next batch; the device never waits for the log. What cannot be hidden (waiting for input,
compiling, evaluating, saving) is measured apart from the step time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from steppe.train import metrics as metrics_
from steppe.train import spikes as spikes_
from steppe.train import watchdog as watchdog_
from steppe.train import window as window_
from steppe.train.anchor import Anchor
from steppe.train.checkpoint import Checkpoints
from steppe.train.step import TrainStep
from steppe.train.types import TrainState
from steppe.train.window import Pending, Window


class Batches(Protocol):
    """An endless source of batches that can say where it is (see ``steppe.data.batches``)."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> Mapping[str, Any]: ...
    def set_state(self, state: Any) -> None: ...


class Writer(Protocol):
    """Where rows go (see ``steppe.train.metrics``)."""

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None: ...
    def truncate(self, step: int) -> None: ...


class Watcher(Protocol):
    """Follows the steps (see ``steppe.train.goodput`` and ``steppe.train.profiling``)."""

    def before(self, step: int, state: TrainState) -> None:
        """The step is about to be called on this state."""

    def after(self, step: int) -> None:
        """The step is complete: its metrics have come."""


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
    flops: Callable[[Mapping[str, Any]], float] | None = None,
    peak_flops: float = 0.0,
    watchers: Sequence[Watcher] = (),
) -> TrainState:
    """Trains until ``state.step == steps``.

    Args:
      train: the step.
      state: where to start; its memory is reused.
      batches: endless; its state is saved with every checkpoint. ``Spikes`` of ``train.spikes``
        around them make the loop go back where the loss spikes: to the last regular checkpoint
        (the first state is saved too then), or to a copy in memory where there are none. A row
        of kind "rollback" stands at the first step after it.
      steps: total number of updates, those before a resume included.
      checkpoints, save_every: saved every so many steps and at the end; 0 = at the end only.
      evaluate, eval_every: called every so many steps and at the end; its values are written
        as a row of kind "eval".
      log_every: a row of kind "train" every so many steps, and before every save, so that the
        rows of a resumed run cover the same steps: means over the window of the step's
        metrics, and ``step_time`` [s], ``input_wait`` [s a step in which the device had run
        out of work], ``device_wait`` [s a step in which this process had nothing to do],
        ``tokens_per_s`` (attended tokens), ``flops_per_s`` and ``mfu`` where flops and
        peak_flops are known, ``memory`` and ``memory_peak`` [bytes] of the fullest device where
        the backend tells; ``compile_time``, ``eval_time``, ``save_time`` [s] where something was
        compiled, evaluated or saved since the last row. A step that took far longer than those
        before it of the same shape gets a row of kind "slow", see ``steptime``.
      writers: receive the rows.
      schedule: step -> learning rate, for the log.
      watchdog: seconds that a step (its compilation included), an evaluation or a save may
        take; beyond, the process ends with status 76, see ``watchdog``. 0 = no limit.
      flops: model FLOPs of a step over all devices, of its batch.
      peak_flops: of all devices together, FLOP/s; 0 = not known.
      watchers: told of every step.

    Returns:
      The final state.

    Raises:
      NonFiniteLoss: before a state that follows the bad step is saved.
      Diverged: with ``Spikes``: as many rollbacks as are allowed have not helped.
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
    step = int(state.step)
    if step > steps:
        raise ValueError(f"the state is at step {step} already, beyond steps={steps}")
    window = Window(peak_flops)
    pending: Pending | None = None
    guard = batches if isinstance(batches, spikes_.Spikes) else None
    anchor = None if guard is None else Anchor(guard, checkpoints)
    kept = checkpoints is not None or anchor is not None

    def settle(*, flush: bool = False) -> None:
        """Takes in the metrics of the step before, now that the next one is under way."""
        nonlocal pending
        done, pending = pending, None
        if done is None:
            return
        with window.blocked():
            found = metrics_.fetch(done.metrics)
        if guard is not None:
            guard.add(done.step, *(_mean(found.get(name)) for name in ("loss", "grad_norm")))
        for name in ("loss", "grad_norm"):
            if name in found and not math.isfinite(sum(found[name])):
                raise NonFiniteLoss(_bad(f"{name} is {found[name][0]}", done.step, checkpoints))
        slow = window.add(done, found)
        for watcher in watchers:
            watcher.after(done.step)
        if slow is not None:
            _write(writers, done.step, "slow", slow)
        if flush or done.step % log_every == 0 or done.step == steps:
            row = window.row()
            if schedule is not None:
                row["learning_rate"] = float(schedule(done.step - 1))
            _write(writers, done.step, "train", row)

    def save(step: int, *, regular: bool, wait: bool = False) -> None:
        # Loss and gradient were finite, but the update may have overflowed.
        if not bool(_finite(state.params)):
            if guard is not None:
                raise spikes_.Spike("a parameter is not finite", step, {"bad_step": step})
            raise NonFiniteLoss(_bad("a parameter is not finite", step, checkpoints))
        if anchor is not None and regular:
            anchor.drop(state, step)
        if checkpoints is not None:
            checkpoints.save(state, batches.get_state(), wait=wait)

    with (
        _stop_requests() as stopping,
        _complete(checkpoints),
        watchdog_.watching(watchdog) as beat,
    ):
        if anchor is not None:
            anchor.begin(state, step)
        stop = 0
        while step < steps:
            step += 1
            with window.waiting(pending):
                batch = _next(batches, step, steps)
            for watcher in watchers:
                watcher.before(step, state)
            beat(f"step {step}")
            compiled, began = train.compiles, time.perf_counter()
            with jax.profiler.StepTraceAnnotation("step", step_num=step):
                state, metrics = train(state, batch)
            following = window_.pending(step, metrics, batch, flops)
            took = time.perf_counter() - began
            if train.compiles > compiled:  # a dispatch takes no time, a compile does
                window.compiled(took)
            else:
                window.dispatched(following, took)
            try:
                settle()
                pending = following
                last = step == steps
                scoring = evaluate is not None and (last or (eval_every and step % eval_every == 0))
                saving = last or (save_every and step % save_every == 0)
                stop = 0 if last else stop or stopping()
                if scoring or saving or stop:
                    settle(flush=bool(saving or stop) and kept)
                if scoring and evaluate is not None:
                    beat(f"the evaluation at step {step}")
                    with window.paused("eval_time"):
                        _write(writers, step, "eval", dict(evaluate(state)))
                if kept and (saving or stop):
                    beat(f"the save at step {step}")
                    with window.paused("save_time"):
                        save(step, regular=bool(saving), wait=bool(stop))
            except spikes_.Spike as spike:
                assert anchor is not None
                beat(f"going back from step {spike.step}")
                pending = None
                state, step = anchor.back(spike, state)
                window.restart()
                for writer in writers:
                    writer.truncate(step)
                for row in anchor.spikes.rows():
                    _write(writers, step + 1, "rollback", row)
                beat("the next batch")
                continue
            if stop:
                kind = Preempted if stop == signal.SIGTERM else Interrupted
                raise kind(_stopped(step, steps, checkpoints))
            beat("the next batch")
    return state


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


def _mean(pair: tuple[float, float] | None) -> float:
    """Of a metric that the step has; 0 without, which is never a spike."""
    return 0.0 if pair is None or not pair[1] else pair[0] / pair[1]


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


# jax lets processes stop at the largest number that any of them has asked with, plus one, and 0
# before the first: a resumed run that counted its steps would pass by a SIGTERM that came while it
# was restoring. So every turn of this process counts, from 1.
_TURNS = itertools.count(1)


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
    """Notes Ctrl-C and SIGTERM instead of dying in the middle of a step; yields a function that
    says which came, 0 for none, and is called once a turn.

    A second one has its usual effect, and so has one that nobody asked about before the end, where
    a handler waits for it. Outside the main thread signals are left alone. With
    several processes, which must stop at the same step, jax's preemption service is asked;
    it has its own handler of SIGTERM. A handler before this one that has an attribute ``asked``
    says by it that its signal has come, and that what it raised was lost.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        def reached() -> int:
            turn = next(_TURNS)
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(turn) else 0

        yield reached
        return
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    seen += [number for number, handler in before.items() if getattr(handler, "asked", False)]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        restore()
    # It came during the last step: the run is complete, what follows it is to end all the same.
    if seen and callable(before[signal.Signals(seen[0])]):
        signal.raise_signal(seen[0])
