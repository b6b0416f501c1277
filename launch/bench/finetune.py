"""The fine-tuning step against PyTorch: the same tensors, batches, optimiser and threads.

The comparison is void, and raises, unless the losses of both sides agree to 1e-4 over 20
steps. Compile time and peak memory are reported apart from the speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import compile, environment, harness
from steppe.launch.bench.compile import CompileBench
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import Shapes, export
from steppe.launch.bench.sides import ADAMW, SIDES
from steppe.launch.bench.worker import Worker

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class FinetuneBench:
    """Measure a fine-tuning step, alone or against a peer.

    Attributes:
      peer: what to compare with.
      model: folder with a pretrained encoder; None = random tensors of ``shapes``.
      shapes: size of the encoder without ``model``; MiniLM-L6's by default.
      batch: rows of a batch.
      length: tokens of a row.
      layers: also compile the step of ``shapes`` with each of these depths (say 6 24).
      threads: processor cores of each side; 0 = all that there are.
      learning_rate, b1, b2, eps, weight_decay: of AdamW, on both sides.
      loss_steps: steps over which the losses must agree.
      tolerance: largest relative difference of two losses.
      protocol: warm-up, rounds and steps.
      seed: of tensors and batches.
      out: file for the result as JSON.
    """

    peer: Literal["torch", "none"] = "torch"
    model: Path | None = None
    shapes: Shapes = field(default_factory=Shapes)
    batch: int = 32
    length: int = 64
    layers: tuple[int, ...] = ()
    threads: int = 0
    learning_rate: float = 2e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    loss_steps: int = 20
    tolerance: float = 1e-4
    protocol: Protocol = field(default_factory=Protocol)
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "loss_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.model is None and self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )
        environment.check_threads(self.threads)


def run(config: FinetuneBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Args:
      say: gets what is worth knowing on the way, the load average first.

    Raises:
      harness.Void: the two sides do not compute the same losses.
      worker.WorkerError: a side failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    names = ["steppe"] + ([config.peer] if config.peer != "none" else [])
    result: dict[str, Any] = {
        "bench": "finetune",
        "config": environment.plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = Path(scratch) / "model"
        source = config.shapes if config.model is None else config.model
        export(folder, source, config.seed)
        result["parameters"] = parameters(folder)
        # In a process that is gone before the sides start, so that it costs them nothing.
        with Worker(SIDES["steppe"], arguments(config, folder), threads=threads) as worker:
            compiling = float(worker.call("compile"))
        workers: dict[str, Worker] = {}
        try:
            for name in names:
                workers[name] = Worker(SIDES[name], arguments(config, folder), threads=threads)
            result["sides"] = measure(config, workers, say)
            result["sides"]["steppe"]["compile"] = compiling
        finally:
            for worker in workers.values():
                worker.close()
    if config.layers:
        depths = CompileBench(config.shapes, config.layers, config.batch, config.length, threads, 1)
        result["compile"] = compile.measure(depths, say)
    conclude(result, names)
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def conclude(result: dict[str, Any], names: Sequence[str]) -> None:
    """Adds the ratio of the sides, whether the times are steady, and the load at the end."""
    pairs = [result["sides"][name]["seconds"] for name in names]
    if len(pairs) == 2:
        found = harness.ratio(*pairs)
        result["loss_difference"] = result["sides"].pop("loss_difference")
        result["ratio"] = {
            **found._asdict(),
            "pairs": [a / b for a, b in zip(*pairs)],
            "of": f"{names[0]} / {names[1]}",
        }
    result["unsteady"] = harness.unsteady(
        {name: result["sides"][name]["seconds"] for name in names}
    )
    result["load_average_after"] = environment.load_average()


def measure(
    config: Any, workers: Mapping[str, Worker], say: Callable[[str], None]
) -> dict[str, Any]:
    """Loss curves and times of the sides, of a config such as ``FinetuneBench``.

    Raises:
      harness.Void: the losses differ.
    """
    sides: dict[str, Any] = {name: {} for name in workers}
    curves = {}
    for name, worker in workers.items():
        first = worker.call("turn", 1)
        # The first step compiles on one side; the loss curve of both starts at the second.
        curves[name] = worker.call("losses", config.loss_steps)
        sides[name] |= {"first_step": first, "losses": curves[name]}
    turns = [_turn(worker) for worker in workers.values()]
    difference = None
    if len(turns) == 2:
        ours, theirs = curves.values()
        difference = harness.same_losses(ours, theirs, config.tolerance)
        say(f"losses agree to {difference:.1e} over {config.loss_steps} steps")
        times: Sequence[list[float]] = harness.compare(turns[0], turns[1], config.protocol)
    else:
        times = [harness.measure(turns[0], config.protocol)]
    for (name, worker), seconds in zip(workers.items(), times, strict=True):
        found = harness.spread(seconds)
        sides[name] |= {
            "seconds": seconds,
            **found._asdict(),
            "tokens_per_s": config.batch * config.length / found.median,
            "peak_memory": worker.call("peak_memory"),
        }
    sides["steppe"]["programs"] = workers["steppe"].call("compiles")
    if difference is not None:
        sides["loss_difference"] = difference
    return sides


def _turn(worker: Worker) -> harness.Turn:
    return lambda steps: float(worker.call("turn", steps))


def arguments(config: Any, folder: Path) -> dict[str, Any]:
    """What a side is made with."""
    return {
        "directory": str(folder),
        "batch": config.batch,
        "length": config.length,
        "optimizer": {name: getattr(config, name) for name in ADAMW},
        "seed": config.seed,
    }


def parameters(folder: Path) -> int:
    """Number of parameters in the files of a model folder."""
    from steppe.models import weights

    shapes = weights.open_directory(folder).shapes().values()
    total = 0
    for shape in shapes:
        size = 1
        for n in shape:
            size *= n
        total += size
    return total


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=_title(result), title_justify="left", box=None, padding=(0, 3, 0, 0))
    columns = ("", "ms a step", "range", "tokens/s", "first step", "peak memory")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for name, side in result["sides"].items():
        grid.add_row(
            name,
            f"{1e3 * side['median']:.1f}",
            f"{1e3 * side['low']:.1f} to {1e3 * side['high']:.1f}",
            f"{side['tokens_per_s']:,.0f}",
            f"{side['first_step']:.2f} s",
            f"{side['peak_memory'] / 2**20:,.0f} MiB",
        )
    lines = []
    if "ratio" in result:
        found = result["ratio"]
        lines.append(
            f"{found['of']}: {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f}), "
            f"losses agree to {result['loss_difference']:.1e}"
        )
    lines.append(f"compile: {result['sides']['steppe']['compile']:.2f} s")
    if "compile" in result:
        depths = [f"{k} layers {min(v):.2f} s" for k, v in result["compile"].items()]
        lines.append("compile by depth: " + ", ".join(depths))
    lines += [f"warning: {reason}" for reason in result["unsteady"]]
    return Group(grid, *(Text(line) for line in lines))


def _title(result: Mapping[str, Any]) -> str:
    config = result["config"]
    return (
        f"AdamW step, batch {config['batch']} x {config['length']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads"
    )
