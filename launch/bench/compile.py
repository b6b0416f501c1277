"""Time to compile a training step by the depth of the model.

Layers are scanned, so depth should hardly matter. Tracing and compiling are timed by themselves,
each in a fresh process without a compilation cache; no step is run.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness
from steppe.launch.bench.shapes import Shapes, export
from steppe.launch.bench.sides import SIDES
from steppe.launch.bench.worker import Worker

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class CompileBench:
    """Measure compile time at several depths.

    Attributes:
      shapes: size of the encoder but for its depth; MiniLM-L6's by default.
      layers: the depths; all are compared with the first.
      batch, length: shape of a batch.
      threads: processor cores; 0 = all that there are.
      rounds: how often each is compiled, in turns.
      out: file for the result as JSON.
    """

    shapes: Shapes = field(default_factory=Shapes)
    layers: tuple[int, ...] = (6, 24)
    batch: int = 32
    length: int = 64
    threads: int = 0
    rounds: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers must be one or more depths >= 1, got {self.layers}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")
        environment.check_threads(self.threads)


def run(config: CompileBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result: seconds, and ratios to the first depth by rounds."""
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    found = measure(config, say)
    first = found[str(config.layers[0])]
    result = {
        "bench": "compile",
        "config": environment.plain(config),
        "load_average": load,
        **environment.environment(),
        "seconds": found,
        "unsteady": harness.unsteady({f"{name} layers": times for name, times in found.items()}),
        "ratio": {name: harness.ratio(times, first)._asdict() for name, times in found.items()},
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def measure(config: CompileBench, say: Callable[[str], None] = print) -> dict[str, list[float]]:
    """Depth -> seconds of each round."""
    found: dict[str, list[float]] = {str(layers): [] for layers in config.layers}
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        for layers in dict.fromkeys(config.layers):
            size = dataclasses.replace(config.shapes, layers=layers)
            export(Path(scratch) / str(layers), size)
        for _ in range(config.rounds):
            for depth, times in found.items():
                arguments = {
                    "directory": str(Path(scratch) / depth),
                    "batch": config.batch,
                    "length": config.length,
                }
                threads = config.threads or environment.cores()
                with Worker(SIDES["steppe"], arguments, threads=threads) as worker:
                    times.append(float(worker.call("compile")))
                say(f"{depth} layers compile in {times[-1]:.2f} s")
    return found


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(title="Compile time of a training step", title_justify="left", box=None)
    for number, column in enumerate(("layers", "seconds", "range", "to the first")):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for name, times in result["seconds"].items():
        found = harness.spread(times)
        grid.add_row(
            name,
            f"{found.median:.2f}",
            f"{found.low:.2f} to {found.high:.2f}",
            f"{result['ratio'][name]['median']:.2f}",
        )
    return Group(grid, *(Text(f"warning: {reason}") for reason in result["unsteady"]))
