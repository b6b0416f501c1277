"""Time that ``import steppe.models`` takes on top of ``import jax``, in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness
from steppe.launch.bench.environment import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_PROGRAM = """
import importlib, sys, time
t0 = time.perf_counter(); importlib.import_module(sys.argv[2])
t1 = time.perf_counter(); importlib.import_module(sys.argv[1])
print(t1 - t0, time.perf_counter() - t1)
"""


@dataclass(frozen=True)
class ImportBench:
    """Measure an import.

    Attributes:
      module: what is imported.
      base: what is imported before it, timed apart.
      repeats: fresh interpreters; one more, unmeasured, warms the file cache.
      out: file for the result as JSON.
    """

    module: str = "steppe.models"
    base: str = "jax"
    repeats: int = 5
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be >= 1, got {self.repeats}")


def run(config: ImportBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result, seconds.

    Raises:
      ValueError: an import failed; the message ends with the error.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    pairs = [_once(config) for _ in range(config.repeats + 1)][1:]
    base, extra = ([pair[i] for pair in pairs] for i in (0, 1))
    result = {
        "bench": "imports",
        "config": plain(config),
        "load_average": load,
        **environment.environment(),
        "base": {**harness.spread(base)._asdict(), "seconds": base},
        "module": {**harness.spread(extra)._asdict(), "seconds": extra},
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _once(config: ImportBench) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, config.module, config.base],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"cannot import {config.base} and then {config.module}: {last}")
    base, extra = done.stdout.split()[-2:]
    return float(base), float(extra)


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.table import Table

    grid = Table(title="Import time", title_justify="left", box=None, show_header=False)
    for name, key in ((result["config"]["base"], "base"), (result["config"]["module"], "module")):
        found = result[key]
        text = f"{found['median']:.3f} s ({found['low']:.3f} to {found['high']:.3f})"
        grid.add_row(name, text)
    return grid
