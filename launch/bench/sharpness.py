"""What sharpness-aware steps cost: every method against the AdamW step, and PyTorch's SAM beside.

Every method runs in a process of its own and in turns with an AdamW process of its library, so
that each ratio is of one round; peak memory is that of the whole process. AdamW and SAM must
have the losses of PyTorch, or the comparison is void.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import environment, finetune, harness
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import Shapes, export
from steppe.launch.bench.sharpness_sides import METHODS, TORCH, target
from steppe.launch.bench.worker import Worker, against

if TYPE_CHECKING:
    from rich.console import RenderableType

# A transformer of a million parameters.
MILLION = Shapes(vocab_size=1500, width=128, layers=4, heads=4, ffn_width=512, positions=128)


@dataclass(frozen=True)
class SharpnessBench:
    """Measure sharpness-aware steps on a classifier.

    Attributes:
      peer: what to compare with.
      model: folder with a pretrained encoder; None = random tensors of ``shapes``.
      shapes: size of the encoder without ``model``; a million parameters by default.
      methods: names of ``sharpness_sides.METHODS``; () = all of them.
      batch: rows of a batch.
      length: tokens of a row.
      rho: radius of SAM; ASAM's is ten times that.
      threads: processor cores of each side; 0 = all that there are.
      learning_rate, b1, b2, eps, weight_decay: of AdamW, on both sides.
      loss_steps: steps over which the losses of AdamW and SAM must be PyTorch's.
      tolerance: largest relative difference of two losses.
      protocol: warm-up, rounds and steps; a turn of LookSAM takes a multiple of 5 steps.
      seed: of tensors and batches.
      out: file for the result as JSON.
    """

    peer: Literal["torch", "none"] = "torch"
    model: Path | None = None
    shapes: Shapes = field(default_factory=lambda: MILLION)
    methods: tuple[str, ...] = ()
    batch: int = 32
    length: int = 64
    rho: float = 0.05
    threads: int = 0
    learning_rate: float = 2e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    loss_steps: int = 20
    tolerance: float = 1e-4
    protocol: Protocol = field(default_factory=lambda: Protocol(5, 5, 10))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "loss_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.rho > 0:
            raise ValueError(f"rho must be > 0, got {self.rho}")
        for name in self.chosen:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
            if self.protocol.steps % METHODS[name].every:
                raise ValueError(
                    f"protocol.steps must be a multiple of {METHODS[name].every} for {name}, "
                    f"got {self.protocol.steps}"
                )
        if self.model is None and self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )
        environment.check_threads(self.threads)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods to measure beside AdamW."""
        return tuple(name for name in self.methods or METHODS if name != "adamw")


def run(config: SharpnessBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: AdamW or SAM does not compute PyTorch's losses.
      worker.WorkerError: a side failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    result: dict[str, Any] = {
        "bench": "sharpness",
        "config": environment.plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = Path(scratch) / "model"
        export(folder, config.shapes if config.model is None else config.model, config.seed)
        result["parameters"] = finetune.parameters(folder)
        rows: dict[str, Any] = {}
        differences: dict[str, float] = {}
        result |= {"rows": rows, "loss_difference": differences}  # filled below
        torch = config.peer == "torch"
        base, curve = _open(config, folder, "adamw", threads)
        with base:
            if torch:
                peer, theirs = _open(config, folder, TORCH[0], threads)
                with peer:
                    differences["adamw"] = harness.same_losses(curve, theirs, config.tolerance)
                    rows[TORCH[0]] = against(base, peer, "adamw", config.protocol)
                    second, sharp = _open(config, folder, TORCH[1], threads)
                    with second:
                        rows[TORCH[1]] = against(peer, second, TORCH[0], config.protocol)
            result["adamw_peak_memory"] = base.call("peak_memory")
            for name in config.chosen:
                method, curve = _open(config, folder, name, threads)
                with method:
                    if torch and METHODS[name].equals == TORCH[1]:
                        differences[name] = harness.same_losses(curve, sharp, config.tolerance)
                    rows[name] = against(base, method, "adamw", config.protocol)
                    rows[name] |= {"goal": METHODS[name].goal, "last_loss": curve[-1]}
                ratio = rows[name]["ratio"]
                say(f"{name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
                _save(config, result)
    _save(config, result)
    return result


def _save(config: SharpnessBench, result: dict[str, Any]) -> None:
    """After every method: what was measured survives a run that is stopped."""
    times = {name: row["seconds"] for name, row in result["rows"].items()}
    result |= {
        "unsteady": harness.unsteady(times),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)


def _open(
    config: SharpnessBench, folder: Path, method: str, threads: int
) -> tuple[Worker, list[float]]:
    """A process that has compiled its step, and the losses of its first steps."""
    arguments = {**finetune.arguments(config, folder), "method": method, "rho": config.rho}
    worker = Worker(target(method), arguments, threads=threads)
    try:
        return worker, worker.call("losses", config.loss_steps)
    except BaseException:
        worker.close()
        raise


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = (
        f"Sharpness-aware steps, batch {config['batch']} x {config['length']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    columns = ("", "ms a step", "ratio", "range", "to", "goal", "peak memory")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number in (0, 4) else "right")
    for name, row in result["rows"].items():
        ratio, goal = row["ratio"], row.get("goal")
        grid.add_row(
            name,
            f"{1e3 * row['median']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            row["against"],
            "" if goal is None else f"{goal:g}",
            f"{row['peak_memory'] / 2**20:,.0f} MiB",
        )
    lines = [f"peak memory of adamw: {result['adamw_peak_memory'] / 2**20:,.0f} MiB"]
    if {"sam", "fsam"} <= set(result["rows"]):
        sam, fsam = (result["rows"][name]["ratio"]["median"] for name in ("sam", "fsam"))
        lines.append(f"fsam between refreshes / sam: {fsam / sam:.3f} (goal 1.03)")
    lines += [
        f"losses of {name} agree with PyTorch's to {found:.1e}"
        for name, found in result["loss_difference"].items()
    ]
    lines += [f"warning: {reason}" for reason in result["unsteady"]]
    return Group(grid, *(Text(line) for line in lines))
