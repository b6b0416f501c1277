"""Peak memory of loading a model, relative to the size of its parameters in float32."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment
from steppe.launch.bench.environment import plain
from steppe.launch.bench.shapes import BERT_BASE, Shapes, export
from steppe.launch.bench.worker import Worker

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LoadBench:
    """Measure the memory that loading takes.

    Attributes:
      model: folder with a pretrained encoder; None = random tensors of ``shapes``.
      shapes: size of the encoder without ``model``; BERT base by default.
      out: file for the result as JSON.
    """

    model: Path | None = None
    shapes: Shapes = field(default_factory=lambda: BERT_BASE)
    out: Path | None = None


class Loader:
    """Loads in a process of its own (see ``worker``)."""

    def load(self, directory: str) -> dict[str, float]:
        """Bytes before, the peak during, and the size of the parameters; seconds."""
        import jax

        from steppe.models import pretrained, tree

        # What the interpreter, the libraries and a started backend take is not the model's.
        jax.block_until_ready(jax.numpy.zeros(1) + 1)
        before = environment.peak_memory()
        start = time.perf_counter()
        loaded = pretrained.load(directory)
        jax.block_until_ready(loaded.params)
        return {
            "before": before,
            "peak": environment.peak_memory(),
            "seconds": time.perf_counter() - start,
            "size": 4 * tree.count(loaded.params),
        }


def run(config: LoadBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures in a fresh process and returns the result, ``ratio`` = extra peak / size.

    Raises:
      FileNotFoundError: ``config.model`` is not a model folder.
      WorkerError: it could not be loaded.
    """
    if config.model is not None and not (config.model / "config.json").is_file():
        raise FileNotFoundError(f"{config.model} is not a model folder: it has no config.json")
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        if config.model is None:
            folder = export(Path(scratch) / "model", config.shapes)
        else:
            folder = config.model
        with Worker(f"{__name__}:Loader", {}) as worker:
            found = worker.call("load", str(folder))
    result = {
        "bench": "load",
        "config": plain(config),
        "load_average": load,
        **environment.environment(),
        **found,
        "ratio": (found["peak"] - found["before"]) / found["size"],
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.table import Table

    grid = Table(title="Loading a model", title_justify="left", box=None, show_header=False)
    mib = 2**20
    grid.add_row("parameters in float32", f"{result['size'] / mib:,.0f} MiB")
    grid.add_row("process before", f"{result['before'] / mib:,.0f} MiB")
    grid.add_row("peak", f"{result['peak'] / mib:,.0f} MiB")
    grid.add_row("peak above before / size", f"{result['ratio']:.3f}")
    grid.add_row("time", f"{result['seconds']:.2f} s")
    return grid
