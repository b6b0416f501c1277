"""The training step of a language model against PyTorch: as ``finetune``, on full rows.

The comparison is void, and raises, unless the losses of both sides agree over the first steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import environment, finetune
from steppe.launch.bench.decoders import DecoderShapes, export
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.lm_sides import SIDES
from steppe.launch.bench.worker import Worker

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LmStepBench:
    """Measure a training step of a decoder, alone or against a peer.

    Attributes:
      peer: what to compare with.
      model: folder or ``.gguf`` file of a language model; None = random tensors of ``shapes``.
      shapes: size of the decoder without ``model``; SmolLM2-135M's by default.
      batch: rows of a batch.
      length: tokens of a row.
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
    shapes: DecoderShapes = field(default_factory=DecoderShapes)
    batch: int = 4
    length: int = 128
    threads: int = 0
    learning_rate: float = 2e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    loss_steps: int = 10
    tolerance: float = 1e-4
    protocol: Protocol = field(default_factory=lambda: Protocol(2, 5, 4))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "loss_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be >= 2, got {self.length}: nothing precedes one token")
        if self.model is None and self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )
        environment.check_threads(self.threads)


def run(config: LmStepBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

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
        "bench": "lm-step",
        "config": environment.plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = Path(scratch) / "model"
        export(folder, config.shapes if config.model is None else config.model, config.seed)
        result["parameters"] = finetune.parameters(folder)
        arguments = finetune.arguments(config, folder)
        with Worker(SIDES["steppe"], arguments, threads=threads) as worker:
            compiling = float(worker.call("compile"))
        workers: dict[str, Worker] = {}
        try:
            for name in names:
                workers[name] = Worker(SIDES[name], arguments, threads=threads)
            result["sides"] = finetune.measure(config, workers, say)
            result["sides"]["steppe"]["compile"] = compiling
        finally:
            for worker in workers.values():
                worker.close()
    finetune.conclude(result, names)
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    return finetune.table(result)
