"""``steppe bench overlay-step``: training steps of overlays against full fine-tuning and ``peft``.

Every overlay runs in a process of its own, in turns with the full step, and with the adapter of
``peft`` of the same method where there is one. Overlays that begin as the base, and those adapters,
must have the base's loss at the first step, or the comparison is void; what is random at the start
differs after it. LPT, whose backward pass ends at its layer, is also measured against prompts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import environment, finetune, harness, overlay_sides
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.overlay_sides import FULL, NEUTRAL, OVERLAYS, PEERS
from steppe.launch.bench.shapes import Shapes, export
from steppe.launch.bench.worker import Worker, against

if TYPE_CHECKING:
    from rich.console import RenderableType

# Measured against each other, beside full fine-tuning: the late prompt and the one in front.
LATE, FRONT = "lpt", "prompt"


@dataclass(frozen=True)
class OverlayStepBench:
    """Measure training steps of overlays on a classifier.

    Attributes:
      peer: what to compare with.
      model: folder with a pretrained encoder; None = random tensors of ``shapes``.
      shapes: size of the encoder without ``model``; MiniLM-L6's by default.
      overlays: names of ``overlay_sides.OVERLAYS``; () = all of them.
      batch: rows of a batch.
      length: tokens of a row.
      threads: processor cores of each side; 0 = all that there are.
      learning_rate, b1, b2, eps, weight_decay: of AdamW, on both sides.
      tolerance: largest relative difference of two first losses.
      protocol: warm-up, rounds and steps.
      seed: of tensors and batches.
      out: file for the result as JSON.
    """

    peer: Literal["peft", "none"] = "peft"
    model: Path | None = None
    shapes: Shapes = field(default_factory=Shapes)
    overlays: tuple[str, ...] = ()
    batch: int = 16
    length: int = 64
    threads: int = 0
    learning_rate: float = 2e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    tolerance: float = 1e-4
    protocol: Protocol = field(default_factory=lambda: Protocol(2, 3, 3))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in self.overlays:
            if name not in OVERLAYS:
                raise ValueError(f"unknown overlay {name!r}; known: {', '.join(OVERLAYS)}")
        most = self.shapes.positions - 10  # a prompt of ten stands in front
        if self.model is None and self.length > most:
            raise ValueError(
                f"length must be at most {most}, which leaves room for a prompt of 10 within "
                f"shapes.positions = {self.shapes.positions}, got {self.length}"
            )
        environment.check_threads(self.threads)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The overlays to measure."""
        return tuple(name for name in self.overlays or OVERLAYS if name != FULL)


def run(config: OverlayStepBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: a step that should begin at the base's loss does not.
      worker.WorkerError: a side failed; peft's where it is not installed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    rows: dict[str, Any] = {}
    result: dict[str, Any] = {
        "bench": "overlay-step",
        "config": environment.plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
        "rows": rows,
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = Path(scratch) / "model"
        export(folder, config.shapes if config.model is None else config.model, config.seed)

        @contextlib.contextmanager
        def opened(side: str, name: str) -> Iterator[tuple[Worker, float]]:
            arguments = {**finetune.arguments(config, folder), "overlay": name}
            target = f"{overlay_sides.__name__}:{side}"
            with Worker(target, arguments, threads=threads) as worker:
                yield worker, float(worker.call("losses", 1)[0])

        def peer(name: str, ours: Worker) -> None:
            with opened("Torch", name) as (theirs, loss):
                if name in NEUTRAL:
                    harness.same_losses([first], [loss], config.tolerance)
                rows[f"peft {name}" if name != FULL else "torch full"] = _row(
                    config, theirs, ours, name
                )

        with opened("Steppe", FULL) as (full, first):
            rows[FULL] = {"trained": full.call("trained"), "peak_memory": full.call("peak_memory")}
            if config.peer == "peft":
                peer(FULL, full)
            for name in config.chosen:
                with opened("Steppe", name) as (worker, loss):
                    if name in NEUTRAL:
                        harness.same_losses([first], [loss], config.tolerance)
                    rows[name] = _row(config, worker, full, FULL)
                    if config.peer == "peft" and name in PEERS:
                        peer(name, worker)
                ratio = rows[name]["ratio"]
                say(f"{name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
                _save(config, result)
        if {LATE, FRONT} <= set(config.chosen):
            with opened("Steppe", LATE) as (late, _), opened("Steppe", FRONT) as (front, _):
                rows[f"{LATE}, to {FRONT}"] = _row(config, late, front, FRONT)
    _save(config, result)
    return result


def _row(config: OverlayStepBench, worker: Worker, base: Worker, name: str) -> dict[str, Any]:
    return {**against(base, worker, name, config.protocol), "trained": worker.call("trained")}


def _save(config: OverlayStepBench, result: dict[str, Any]) -> None:
    """After every overlay: what was measured survives a run that is stopped."""
    times = {name: row["seconds"] for name, row in result["rows"].items() if "seconds" in row}
    result |= {
        "unsteady": harness.unsteady(times),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = (
        f"Steps of overlays, batch {config['batch']} x {config['length']}, "
        f"{result['rows'][FULL]['trained'] / 1e6:.1f} M parameters, {result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for place, column in enumerate(("", "trained", "ms", "ratio", "range", "to", "memory")):
        grid.add_column(column, justify="left" if place in (0, 5) else "right")
    for name, row in result["rows"].items():
        ratio = row.get("ratio")
        grid.add_row(
            name,
            f"{row['trained']:,}",
            f"{1e3 * row['median']:.0f}" if ratio else "",
            f"{ratio['median']:.2f}" if ratio else "",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}" if ratio else "",
            row.get("against", ""),
            f"{row['peak_memory'] / 2**20:,.0f} MiB",
        )
    return Group(grid, *(Text(f"warning: {reason}") for reason in result["unsteady"]))
