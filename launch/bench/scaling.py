"""Weak scaling: a process alone against several that train together, with as many rows for each.

Every process has one core of its own. Beside one process alone and several that share the gradient
stand as many that know nothing of each other: what these lose to the one alone is the machine's
(memory, clock), and only the rest is the price of training together. On one host the gradient goes
through gloo and the loopback interface.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness, shapes, sides
from steppe.launch.bench.finetune import parameters
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import Shapes
from steppe.launch.bench.worker import Worker

if TYPE_CHECKING:
    from rich.console import RenderableType

SIDES = ("one", "apart", "together")


@dataclass(frozen=True)
class ScalingBench:
    """Measure a fine-tuning step on one process and on several, the same rows for each.

    Attributes:
      shapes: size of the encoder; MiniLM-L6's by default. Random tensors.
      batch: rows of one process.
      length: tokens of a row.
      processes: how many train together, each on a core of its own.
      tolerance: largest relative difference of the first loss, together and from the rows apart.
      protocol: warm-up, rounds and steps.
      out: file for the result as JSON.
    """

    shapes: Shapes = field(default_factory=Shapes)
    batch: int = 32
    length: int = 64
    processes: int = 2
    tolerance: float = 1e-5
    protocol: Protocol = field(default_factory=lambda: Protocol(3, 5, 5))
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("length", 1), ("processes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )


class Rank(sides.Steppe):
    """The steppe side of ``finetune`` as one of several processes, on one core.

    Args:
      core: that the process may use; None = all.
      together: whether it shares its gradients with the others.
    """

    def __init__(
        self, *, index: int, count: int, core: int | None, together: bool, **given: Any
    ) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        self._count = count if together else 1
        if together:
            from steppe.launch.pods import rank

            rank.join()
        super().__init__(**given, seed=index)

    def _build(self, directory: str) -> None:
        import jax
        import optax

        from steppe.models import pretrained
        from steppe.train import mesh, step
        from steppe.train.objectives import basic

        loaded = pretrained.load(directory)
        model = loaded.model
        plan = mesh.plan({"data": self._count}, model.axes)
        tx = optax.adamw(**self.optimizer)
        self._train = step.make(basic.for_task(model, self.kind), tx, plan)
        self._state = step.init(jax.random.key(0), model, tx, plan, params=loaded.params)


def run(config: ScalingBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: the processes together do not see the loss of all rows.
      worker.WorkerError: a process failed.
      ValueError: there are fewer cores than processes.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores and len(cores) < config.processes:
        raise ValueError(
            f"processes must be at most the {len(cores)} cores, got {config.processes}: "
            "several on one core would only wait for each other"
        )
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = shapes.export(Path(scratch) / "model", config.shapes)
        size = parameters(folder)
        say("starting the processes")
        with (
            _group(config, folder, cores, together=False) as apart,
            _group(config, folder, cores, together=True) as together,
        ):
            first = _first_loss(apart, together, config.tolerance)
            groups = {"one": apart[:1], "apart": apart, "together": together}
            times = harness.interleave(
                {name: _turn(workers) for name, workers in groups.items()}, config.protocol
            )
    result: dict[str, Any] = {
        "bench": "scaling",
        "config": environment.plain(config),
        "parameters": size,
        "load_average": load,
        **environment.environment(),
        "first_loss_difference": first,
        "sides": {
            name: {"seconds": seconds, **harness.spread(seconds)._asdict()}
            for name, seconds in times.items()
        },
        "efficiency": {
            "together": harness.ratio(times["one"], times["together"])._asdict(),
            "apart": harness.ratio(times["one"], times["apart"])._asdict(),
            "of training together": harness.ratio(times["apart"], times["together"])._asdict(),
        },
        "unsteady": harness.unsteady(times),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _first_loss(apart: Sequence[Worker], together: Sequence[Worker], tolerance: float) -> float:
    """The relative difference of the first loss: of all rows together, and of their parts' mean.

    Every row counts once and every process has as many, so that the two are the same number.
    """
    parts = [values[0] for values in _all(apart, "losses", 1)]
    wholes = [values[0] for values in _all(together, "losses", 1)]
    return max(harness.same_losses([statistics.fmean(parts)], [w], tolerance) for w in wholes)


def _turn(workers: Sequence[Worker]) -> harness.Turn:
    # Each measures its own steps; the slowest is what a run waits for.
    return lambda steps: float(max(_all(workers, "turn", steps)))


def _all(workers: Sequence[Worker], method: str, *args: Any) -> list[Any]:
    """Calls a method of all at the same time: those that train together need each other."""
    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(lambda worker: worker.call(method, *args), workers))


@contextlib.contextmanager
def _group(
    config: ScalingBench, folder: Path, cores: Sequence[int], *, together: bool
) -> Iterator[list[Worker]]:
    """The processes; they start and end at the same time, since those together wait for all."""
    from steppe.launch.pods import local

    options = local.Options(config.processes, 1)
    port = local.free_port()

    def start(index: int) -> Worker:
        given = local.environment(options, index, port)
        arguments = {
            "directory": str(folder),
            "batch": config.batch,
            "length": config.length,
            "index": index,
            "count": config.processes,
            "core": cores[index] if cores else None,
            "together": together,
        }
        own = given if together else {"JAX_PLATFORMS": "cpu"}
        return Worker("steppe.launch.bench.scaling:Rank", arguments, environment=own)

    workers: list[Worker] = []
    with ThreadPoolExecutor(config.processes) as pool:
        begun = [pool.submit(start, index) for index in range(config.processes)]
        failed = [task.exception() for task in begun if task.exception() is not None]
        workers = [task.result() for task in begun if task.exception() is None]
        try:
            if failed:
                raise failed[0]  # type: ignore[misc]
            yield workers
        finally:
            list(pool.map(lambda worker: worker.close(), workers))


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    count = config["processes"]
    named = {"one": "one", "apart": f"{count}, each by itself", "together": f"{count} together"}
    grid = Table(
        title=f"AdamW step, {config['batch']} x {config['length']} a process, "
        f"{result['parameters'] / 1e6:.1f} M parameters, one core each",
        title_justify="left",
        box=None,
        padding=(0, 3, 0, 0),
    )
    for place, column in enumerate(("processes", "ms a step", "range", "efficiency", "range")):
        grid.add_column(column, justify="right" if place else "left")
    for name, side in result["sides"].items():
        found = result["efficiency"].get(name)
        grid.add_row(
            named[name],
            f"{1e3 * side['median']:.1f}",
            f"{1e3 * side['low']:.1f} to {1e3 * side['high']:.1f}",
            "" if found is None else f"{found['median']:.2f}",
            "" if found is None else f"{found['low']:.2f} to {found['high']:.2f}",
        )
    own = result["efficiency"]["of training together"]
    lines = [
        f"of training together alone: {own['median']:.2f} ({own['low']:.2f} to {own['high']:.2f}); "
        f"first losses agree to {result['first_loss_difference']:.1e}",
        *(f"warning: {reason}" for reason in result["unsteady"]),
    ]
    return Group(grid, *(Text(line) for line in lines))
