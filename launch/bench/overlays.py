"""Many LoRAs in one batch against one call an adapter, in turns in one process.

Programs on the same arrays, each giving the logits of every row under that row's own adapter:

  bank      one call, low-rank products of every row's own A and B beside the shared base
  mapped    one call, the bound model mapped over the rows by vmap, as any overlay is
  separate  one call a row, compiled once, each with its adapter's own arrays
  base      one call without any adapter: what the base alone costs

All logits are compared before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness
from steppe.launch.bench.environment import plain
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import Shapes, batches
from steppe.launch.bench.worker import Worker, interleave

if TYPE_CHECKING:
    from rich.console import RenderableType

PROGRAMS = ("bank", "mapped", "separate", "base")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class OverlaysBench:
    """Measure many adapters in one batch.

    Attributes:
      shapes: size of the encoder; MiniLM-L6's by default.
      adapters: LoRAs, one row of the batch each.
      rank: of each, on queries and values.
      length: tokens a row.
      threads: processor cores; 0 = all that there are.
      protocol: warm-up, rounds and steps, a step being one batch.
      seed: of all arrays.
      out: file for the result as JSON.
    """

    shapes: Shapes = field(default_factory=Shapes)
    adapters: int = 64
    rank: int = 8
    length: int = 32
    threads: int = 0
    protocol: Protocol = field(default_factory=lambda: Protocol(2, 7, 3))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("adapters", "rank", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.length > self.shapes.positions:
            raise ValueError(
                f"length must be <= the {self.shapes.positions} positions, got {self.length}"
            )
        environment.check_threads(self.threads)


class Side:
    """Holds the arrays and the programs, in a process of its own (see ``worker``)."""

    def __init__(
        self, shapes: dict[str, int], adapters: int, rank: int, length: int, seed: int
    ) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from steppe.models.overlays import bank, lora

        size = Shapes(**shapes)
        model = size.config().build()
        overlay = lora.overlay(rank=rank)
        base_key, *keys = jax.random.split(jax.random.key(seed), adapters + 1)
        base = jax.jit(model.init)(base_key)

        @jax.jit
        def adapter(key: Any) -> Any:
            delta = overlay.init(key, base)  # B is 0 there: an adapter that does something
            return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), delta)

        deltas = [adapter(key) for key in keys]
        (made,) = batches(1, adapters, length, size.vocab_size, seed)
        inputs = ("input_ids", "attention_mask", "token_type_ids")
        rows = {name: jnp.asarray(made[name]) for name in inputs}
        ids = np.random.default_rng(seed).permutation(adapters).astype(np.int32)
        short = bank.bind(model, overlay, adapters)
        mapped = bank.bind(model, overlay, adapters, mapped=True)
        bound = overlay.bind(model)
        full = {"base": base, "overlay": bank.stack(deltas)}
        tagged = {**rows, bank.IDS: jnp.asarray(ids)}
        singles = [
            (deltas[number], {name: value[row : row + 1] for name, value in rows.items()})
            for row, number in enumerate(ids)
        ]
        jax.block_until_ready((full, tagged, singles))
        together = {
            "bank": jax.jit(lambda p, b: short.apply(p, b).logits),
            "mapped": jax.jit(lambda p, b: mapped.apply(p, b).logits),
        }
        one = jax.jit(lambda p, d, b: bound.apply({"base": p, "overlay": d}, b).logits)
        plain_base = jax.jit(lambda p, b: model.apply(p, b).logits)

        def at(name: str) -> Callable[[], Any]:
            return lambda: together[name](full, tagged)

        self._programs: dict[str, Callable[[], Any]] = {
            "bank": at("bank"),
            "mapped": at("mapped"),
            "separate": lambda: [one(base, delta, row) for delta, row in singles],
            "base": lambda: plain_base(base, rows),
        }

    def check(self) -> dict[str, float]:
        """The largest difference between each program's logits and those of separate calls."""
        import numpy as np

        logits = {
            name: np.concatenate([np.atleast_2d(x) for x in found])
            if isinstance(found := program(), list)
            else np.asarray(found)
            for name, program in self._programs.items()
        }
        expected = logits["separate"]
        return {name: float(np.abs(found - expected).max()) for name, found in logits.items()}

    def turn(self, name: str, steps: int) -> float:
        """Runs a program so many times and returns the seconds."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(self._programs[name]())
        return time.perf_counter() - start


def run(config: OverlaysBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: the ways do not give the same logits, or the adapters change nothing.
      worker.WorkerError: the process failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    arguments = {
        "shapes": asdict(config.shapes),
        "adapters": config.adapters,
        "rank": config.rank,
        "length": config.length,
        "seed": config.seed,
    }
    # The first turn of a program compiles it.
    protocol = replace(config.protocol, warmup=max(config.protocol.warmup, 1))
    with Worker(f"{__name__}:Side", arguments, threads=threads) as worker:
        checked = worker.call("check")
        worst = max(checked["bank"], checked["mapped"])
        if not (worst < TOLERANCE and checked["base"] > 10 * worst):
            raise harness.Void(
                f"the logits differ from those of separate calls: {checked}; those of a bank must "
                f"be within {TOLERANCE:g} of them, and those without adapters far from them"
            )
        times = interleave(worker, PROGRAMS, protocol)
    result = {
        "bench": "overlays",
        "config": plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
        "differences": checked,
        "programs": {
            name: {
                "seconds": found,
                **harness.spread(found)._asdict(),
                "rows_per_s": config.adapters / harness.spread(found).median,
                # How many times the rows a second of separate calls.
                "throughput": harness.ratio(times["separate"], found)._asdict(),
            }
            for name, found in times.items()
        },
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

    made = result["config"]
    title = (
        f"{made['adapters']} LoRAs of rank {made['rank']}, {made['shapes']['layers']} layers of "
        f"{made['shapes']['width']}, {made['length']} tokens a row, {result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for number, column in enumerate(("", "ms a batch", "range", "rows a second", "times separate")):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for name, found in result["programs"].items():
        ratio = found["throughput"]
        grid.add_row(
            name,
            f"{1e3 * found['median']:.1f}",
            f"{1e3 * found['low']:.1f} to {1e3 * found['high']:.1f}",
            f"{found['rows_per_s']:.0f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        )
    return Group(grid, *(Text(f"warning: {reason}") for reason in result["unsteady"]))
