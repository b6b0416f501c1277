"""The exact global top-k against one pass that reads the same entries, in turns in one process.

Three programs on the same arrays: a sum, which reads every entry once; one comparison that
writes a mask, which any top-k has to end with; and ``optim.topk.top_k``. The result is checked:
at least k entries are chosen, and fewer than k are larger than the smallest chosen one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness
from steppe.launch.bench.environment import plain
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.worker import Worker, interleave

if TYPE_CHECKING:
    from rich.console import RenderableType

PROGRAMS = ("sum", "mask", "top_k")
GOAL = 3.0
# Shares of the entries in leaves of one, two and three dimensions, as a model has them.
SHARES = ((0.5, 2), (0.3, 3), (0.15, 2), (0.05, 1))


@dataclass(frozen=True)
class TopKBench:
    """Measure the exact global top-k.

    Attributes:
      entries: scores over all leaves together, at least 1,000.
      keep_ratio: share that is chosen, in (0, 1).
      threads: processor cores; 0 = all that there are.
      protocol: warm-up, rounds and steps.
      seed: of the scores, squares of normal numbers.
      out: file for the result as JSON.
    """

    entries: int = 100_000_000
    keep_ratio: float = 0.1
    threads: int = 0
    protocol: Protocol = field(default_factory=lambda: Protocol(1, 7, 2))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.entries < 1000:
            raise ValueError(f"entries must be >= 1000, got {self.entries}")
        if not 0 < self.keep_ratio < 1:
            raise ValueError(f"keep_ratio must be in (0, 1), got {self.keep_ratio}")
        environment.check_threads(self.threads)


class Side:
    """Holds the scores and the three programs, in a process of its own (see ``worker``)."""

    def __init__(self, entries: int, keep_ratio: float, seed: int) -> None:
        import jax
        import jax.numpy as jnp

        from steppe.optim import fisher, topk

        keys = jax.random.split(jax.random.key(seed), len(SHARES))
        self._scores = {
            str(number): jax.random.normal(key, _shape(int(share * entries), dims)) ** 2
            for number, (key, (share, dims)) in enumerate(zip(keys, SHARES, strict=True))
        }
        self._entries = sum(leaf.size for leaf in self._scores.values())
        self._k = fisher.keep_count(keep_ratio, self._entries)
        programs: dict[str, Callable[[Any], Any]] = {
            "sum": lambda scores: [leaf.sum() for leaf in jax.tree.leaves(scores)],
            "mask": lambda scores: jax.tree.map(lambda leaf: leaf >= jnp.float32(2.7), scores),
            "top_k": lambda scores: topk.top_k(scores, self._k),
        }
        self._programs = {name: jax.jit(fn) for name, fn in programs.items()}

    def turn(self, name: str, steps: int) -> float:
        """Runs a program so many times and returns the seconds."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(self._programs[name](self._scores))
        return time.perf_counter() - start

    def check(self) -> dict[str, int]:
        """Entries, k, how many were chosen, and how many are larger than the smallest of them."""
        import numpy as np

        found = self._programs["top_k"](self._scores)
        bound = np.float32(found.threshold)
        larger = sum(int((np.asarray(leaf) > bound).sum()) for leaf in self._scores.values())
        chosen = sum(int(np.asarray(mask).sum()) for mask in found.mask.values())
        return {"entries": self._entries, "k": self._k, "chosen": chosen, "larger": larger}

    def peak_memory(self) -> int:
        """Largest resident memory of this process, bytes."""
        return environment.peak_memory()


def _shape(entries: int, dims: int) -> tuple[int, ...]:
    width = max(int(entries ** (1 / dims)), 1)
    return (entries // width ** (dims - 1), *(width,) * (dims - 1))


def run(config: TopKBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: the entries chosen are not the k largest.
      worker.WorkerError: the process failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    arguments = {
        "entries": config.entries,
        "keep_ratio": config.keep_ratio,
        "seed": config.seed,
    }
    # The first turn of a program compiles it.
    protocol = replace(config.protocol, warmup=max(config.protocol.warmup, 1))
    with Worker(f"{__name__}:Side", arguments, threads=threads) as worker:
        checked = worker.call("check")
        if not checked["larger"] < checked["k"] <= checked["chosen"]:
            raise harness.Void(f"the entries chosen are not the k largest: {checked}")
        times = interleave(worker, PROGRAMS, protocol)
        peak = worker.call("peak_memory")
    result = {
        "bench": "topk",
        "config": plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
        **checked,
        "programs": {
            name: {
                "seconds": found,
                **harness.spread(found)._asdict(),
                "ratio": harness.ratio(found, times["sum"])._asdict(),
            }
            for name, found in times.items()
        },
        "goal": GOAL,
        "peak_memory": peak,
        "unsteady": harness.unsteady(times),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = (
        f"The {result['k']:,} largest of {result['entries'] / 1e6:.1f} M entries, "
        f"{result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for number, column in enumerate(("", "ms", "range", "to one reading pass")):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for name, found in result["programs"].items():
        ratio = found["ratio"]
        grid.add_row(
            name,
            f"{1e3 * found['median']:.1f}",
            f"{1e3 * found['low']:.1f} to {1e3 * found['high']:.1f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        )
    lines = [f"goal: top_k within {result['goal']:g} passes; chosen {result['chosen']:,}"]
    lines += [f"warning: {reason}" for reason in result["unsteady"]]
    return Group(grid, *(Text(line) for line in lines))
