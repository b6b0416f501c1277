"""``steppe bench distill-step``: what a step of distillation costs, against labels and PyTorch.

One student, one teacher, one batch size; the rows of the table differ in what a step does:

  labels             cross entropy, the teacher does not run
  kd                 forward KL, all logits at once
  kd, by tokens      the same loss, some tokens at a time (``distill.rowwise_loss``)
  kid                reverse KL on the student's one-pass imperfections (KID)
  on-policy          the student writes its own answers first, then reverse KL on them (GKD)

All start from the same state and run in turns with PyTorch's eager step of the first two. The
losses of those must be PyTorch's, or the comparison is void.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import distill_sides, environment, finetune, harness
from steppe.launch.bench.decoders import DecoderShapes, export
from steppe.launch.bench.distill_sides import KD, LABELS, OURS, WRITES
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.worker import Worker

if TYPE_CHECKING:
    from rich.console import RenderableType

# Of a step by labels, Zhong et al. 2024 (KID), on their models and GPUs.
PUBLISHED = {"kid": 2.0, WRITES: 10.9}
PEER = "torch, "


@dataclass(frozen=True)
class DistillStepBench:
    """Measure steps of distillation of a language model.

    Attributes:
      peer: what to compare with.
      teacher: folder or ``.gguf`` file of a language model; None = random tensors of ``shapes``.
      shapes: size of the teacher without ``teacher``; SmolLM2-135M's by default.
      student_layers: layers of the student, of which all else is as the teacher's.
      methods: rows to measure; () = all of them.
      batch: rows of a batch.
      length: tokens of a row.
      prompt: tokens of a row that are not learnt, and that a written answer begins with.
      token_chunk: tokens at a time of "kd, by tokens".
      threads: processor cores of each side; 0 = all that there are.
      learning_rate, b1, b2, eps, weight_decay: of AdamW, on both sides.
      loss_steps: steps over which the losses must be PyTorch's.
      tolerance: largest relative difference of two losses.
      protocol: warm-up, rounds and steps.
      seed: of tensors and batches.
      out: file for the result as JSON.
    """

    peer: Literal["torch", "none"] = "torch"
    teacher: Path | None = None
    shapes: DecoderShapes = field(default_factory=DecoderShapes)
    student_layers: int = 10
    methods: tuple[str, ...] = ()
    batch: int = 4
    length: int = 128
    prompt: int = 32
    token_chunk: int = 64
    threads: int = 0
    learning_rate: float = 2e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    loss_steps: int = 3
    tolerance: float = 1e-3
    protocol: Protocol = field(default_factory=lambda: Protocol(1, 5, 1))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        names = ("student_layers", "batch", "length", "prompt", "token_chunk", "loss_steps")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.prompt >= self.length:
            raise ValueError(f"prompt must be below length = {self.length}, got {self.prompt}")
        for name in self.methods:
            if name not in OURS:
                raise ValueError(f"unknown method {name!r}; known: {', '.join(OURS)}")
        if self.teacher is None and self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )
        environment.check_threads(self.threads)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The rows, labels first: they are what the others are compared with."""
        return tuple(name for name in OURS if name == LABELS or name in (self.methods or OURS))


def run(config: DistillStepBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: labels or kd do not have PyTorch's losses.
      worker.WorkerError: a side failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    result: dict[str, Any] = {
        "bench": "distill-step",
        "config": environment.plain(config),
        "threads": threads,
        "load_average": load,
        "published": PUBLISHED,
        **environment.environment(),
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folders = _export(config, Path(scratch))
        result |= {f"{name}_parameters": finetune.parameters(f) for name, f in folders.items()}
        arguments = {
            **{name: str(folder) for name, folder in folders.items()},
            "optimizer": finetune.arguments(config, Path(scratch))["optimizer"],
            **{n: getattr(config, n) for n in ("batch", "length", "prompt", "token_chunk", "seed")},
        }
        _measure(config, arguments, threads, result, say)
    result |= {
        "unsteady": harness.unsteady({n: row["seconds"] for n, row in result["rows"].items()}),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _export(config: DistillStepBench, scratch: Path) -> dict[str, Path]:
    """Teacher and student as folders that both libraries open."""
    folders = {name: scratch / name for name in ("teacher", "student")}
    export(folders["teacher"], config.teacher or config.shapes, config.seed)
    if config.teacher is None:
        cut = dataclasses.replace(config.shapes, layers=config.student_layers)
        export(folders["student"], cut, config.seed + 1)
    else:
        distill_sides.cut(folders["teacher"], folders["student"], config.student_layers)
    return folders


def _measure(
    config: DistillStepBench,
    arguments: Mapping[str, Any],
    threads: int,
    result: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    workers: dict[str, tuple[Worker, str]] = {}
    opened = [Worker(f"{distill_sides.__name__}:Steppe", arguments, threads=threads)]
    try:
        workers |= {name: (opened[0], name) for name in config.chosen}
        if config.peer == "torch":
            opened.append(Worker(f"{distill_sides.__name__}:Torch", arguments, threads=threads))
            peers = [name for name in (LABELS, KD) if name in config.chosen]
            workers |= {PEER + name: (opened[1], name) for name in peers}
        curves = {
            name: worker.call("losses", method, config.loss_steps)
            for name, (worker, method) in workers.items()
        }
        result["loss_difference"] = {
            name: harness.same_losses(curve, curves[PEER + name], config.tolerance)
            for name, curve in curves.items()
            if PEER + name in curves
        }
        for name, found in result["loss_difference"].items():
            say(f"{name}: losses agree to {found:.1e}")

        def turn(worker: Worker, method: str) -> harness.Turn:
            return lambda steps: float(worker.call("turn", method, steps))

        times = harness.interleave({n: turn(*pair) for n, pair in workers.items()}, config.protocol)
        result["rows"] = {
            name: {
                "seconds": seconds,
                **harness.spread(seconds)._asdict(),
                "to_labels": harness.ratio(seconds, times[LABELS])._asdict(),
                "last_loss": curves[name][-1],
            }
            for name, seconds in times.items()
        }
        for name in (LABELS, KD):
            if PEER + name in times:
                ours = harness.ratio(times[name], times[PEER + name])
                result["rows"][name]["to_torch"] = ours._asdict()
        if WRITES in times:
            written = config.batch * (config.length - config.prompt)
            drawing = opened[0].call("drawing")
            result["rows"][WRITES] |= {"drawn_per_s": written / drawing, "drawing_s": drawing}
    finally:
        for worker in opened:
            worker.close()


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = (
        f"Steps of distillation, batch {config['batch']} x {config['length']}, teacher "
        f"{result['teacher_parameters'] / 1e6:.1f} M, student "
        f"{result['student_parameters'] / 1e6:.1f} M parameters, {result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for number, column in enumerate(("", "s a step", "to labels", "published", "to PyTorch")):
        grid.add_column(column, justify="left" if number == 0 else "right")

    def shown(ratio: Mapping[str, float] | None) -> str:
        if ratio is None:
            return ""
        return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"

    for name, row in result["rows"].items():
        published = result["published"].get(name)
        grid.add_row(
            name,
            f"{row['median']:.3f}",
            shown(row["to_labels"]),
            "" if published is None else f"{published:g}",
            shown(row.get("to_torch")),
        )
    lines = [
        f"losses of {name} agree with PyTorch's to {found:.1e}"
        for name, found in result["loss_difference"].items()
    ]
    if WRITES in result["rows"]:
        lines.append(f"the student writes {result['rows'][WRITES]['drawn_per_s']:,.0f} tokens/s")
    lines += [f"warning: {reason}" for reason in result["unsteady"]]
    return Group(grid, *(Text(line) for line in lines))
