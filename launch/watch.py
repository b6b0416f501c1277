"""What follows a run beside its training: spikes, a profile, the log of every process, goodput.

RUN/metrics.jsonl          the log, by the first process
RUN/metrics.<rank>.jsonl   times and waits of each other process
RUN/starts.jsonl, reached  see ``train.goodput``
RUN/profile/               the trace of ``--profile``, of several processes in a folder each
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steppe.launch.pods import rank

METRICS = "metrics.jsonl"
# What a process that is not the first writes down of a row: the rest is the same everywhere.
OWN = (
    "step_time",
    "input_wait",
    "device_wait",
    "memory",
    "memory_peak",
    "compile_time",
    "eval_time",
    "save_time",
    "median",
    "ratio",
)


def check(config: Any) -> None:
    """
    Raises:
      ValueError: a factor, a window or steps to profile that are out of range; the name of the
        setting comes first.
    """
    for name in ("spike_factor", "spike_norm_factor"):
        value = getattr(config, name)
        if value and not 1 < value < math.inf:
            raise ValueError(f"{name} must be above 1 and finite, or 0 for off, got {value}")
    for name, least in (("spike_window", 8), ("spike_rollbacks", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be >= {least}, got {getattr(config, name)}")
    if config.profile:
        profiled(config.profile)


def profiled(text: str) -> tuple[int, int]:
    """``"10:13"`` -> (10, 13), for steps 10, 11 and 12.

    Raises:
      ValueError: not of that form, or empty.
    """
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise ValueError(
            "profile must be FIRST:END such as 10:13 for steps 10 to 12, counted from 1, got "
            f"{text!r}"
        )
    return int(first), int(end)


def guarded(batches: Any, config: Any) -> Any:
    """The batches, with the loop going back where the loss spikes if that is asked for."""
    if not (config.spike_factor or config.spike_norm_factor):
        return batches
    from steppe.train.spikes import Spikes

    return Spikes(
        batches,
        factor=config.spike_factor,
        norm_factor=config.spike_norm_factor,
        window=config.spike_window,
        most=config.spike_rollbacks,
    )


class OwnTimes:
    """The log of a process that is not the first.

    Args:
      lines: where it is written.
    """

    def __init__(self, lines: Any) -> None:
        self._lines = lines

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records what is this process's own in a row of kind train or slow."""
        if kind in ("train", "slow"):
            self._lines.write(step, kind, {k: v for k, v in values.items() if k in OWN})

    def truncate(self, step: int) -> None:
        """Forgets what came after ``step``."""
        self._lines.truncate(step)

    def close(self) -> None:
        """Nothing to do: every row is in the file."""


def log(folder: Path) -> Any:
    """This process's log of the run."""
    import jax

    from steppe.train import metrics

    index = jax.process_index()
    if index == 0:
        return Log(folder, jax.process_count())
    return OwnTimes(metrics.JsonLines(folder / f"metrics.{index}.jsonl"))


class Log:
    """The first process's log; it also cuts those of processes that a resumed run lacks."""

    def __init__(self, folder: Path, count: int) -> None:
        from steppe.train import metrics

        self._lines = metrics.JsonLines(folder / METRICS)
        self._folder, self._count = folder, count
        self.write, self.close = self._lines.write, self._lines.close

    def truncate(self, step: int) -> None:
        """Forgets what came after ``step``."""
        from steppe.train import metrics

        self._lines.truncate(step)
        for index, file in others(self._folder).items():
            if index >= self._count:
                metrics.JsonLines(file).truncate(step)


def others(folder: Path) -> dict[int, Path]:
    """Rank -> its log, of the processes but the first."""
    found = {}
    for file in folder.glob("metrics.*.jsonl"):
        index = file.name.split(".")[1]
        if index.isdecimal():
            found[int(index)] = file
    return dict(sorted(found.items()))


@contextlib.contextmanager
def watching(config: Any, folder: Path, step: int, since: float) -> Iterator[list[Any]]:
    """The watchers of the loop; ends what they began.

    Args:
      step: that the run goes on from.
      since: when this process began, seconds since 1970.
    """
    import jax

    from steppe.train import goodput, profiling

    with contextlib.ExitStack() as stack:
        found: list[Any] = []
        if rank.lead():
            record = goodput.Record(folder)
            sizes = {"devices": jax.device_count(), "processes": jax.process_count()}
            record.begin(step, since=since, **sizes)
            stack.callback(record.end)
            found.append(record)
        if config.profile:
            own = folder / "profile"
            if jax.process_count() > 1:
                own = own / f"rank{jax.process_index()}"
            found.append(stack.enter_context(profiling.Trace(*profiled(config.profile), own)))
        yield found


def flops(pieces: Any) -> Callable[[Mapping[str, Any]], float]:
    """Model FLOPs of a step on a batch, over all devices; see ``estimate.model_flops``.

    Frozen bases need no gradient of their own: 2/3 of a gradient. A teacher runs forward; texts
    that are written to be learnt from are not counted.
    """
    from steppe.launch import estimate, optimiser

    config = pieces.config
    share = optimiser.gradients(config) * (2 / 3 if pieces.overlay is not None else 1.0)
    known: dict[tuple[int, ...], float] = {}

    def count(batch: Mapping[str, Any]) -> float:
        if "pixel_values" in batch:
            shape = batch["pixel_values"].shape
        elif pieces.data.task.kind == "seq2seq":
            shape = (*batch["input_ids"].shape, batch["labels"].shape[1])
        else:
            shape = batch["input_ids"].shape
        shape = (config.batch_size, *shape[1:])
        if shape not in known:
            total = share * estimate.model_flops(pieces.loaded.model, shape)
            if pieces.teacher is not None:
                forward = estimate.model_flops(pieces.teacher, shape) / 3
                total += optimiser.gradients(config) * forward
            known[shape] = total
        return known[shape]

    return count


def peak_flops() -> float:
    """Dense bf16 peak of all devices by their makers' datasheets, FLOP/s; 0 = not known."""
    import jax

    from steppe.launch.bench import mfu

    return sum(mfu.peak_of(device.device_kind) or 0.0 for device in jax.devices())
