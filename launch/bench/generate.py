"""Greedy generation against transformers: the same tensors, prompts, new tokens and threads.

The comparison is void, and raises, unless both sides write the same tokens. Times are of whole
calls: reading the prompt and writing all new tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import environment, harness
from steppe.launch.bench.decoders import DecoderShapes, export
from steppe.launch.bench.generate_sides import SIDES
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.worker import Worker, WorkerError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class GenerateBench:
    """Measure greedy generation, alone or against a peer.

    Attributes:
      peer: what to compare with; torch-static = a compiled forward over a static cache.
      model: folder or ``.gguf`` file of a language model; None = random tensors of ``shapes``.
      shapes: size of the decoder without ``model``; SmolLM2-135M's by default.
      batches: numbers of rows, each measured by itself.
      prompt: tokens of a prompt.
      more: new tokens of each row.
      same: first new tokens of each row that must be equal on both sides; 0 = all.
      threads: processor cores of each side; 0 = all that there are.
      protocol: warm-up, rounds, and calls of a round.
      seed: of tensors and prompts.
      out: file for the result as JSON.
    """

    peer: Literal["torch", "torch-static", "none"] = "torch"
    model: Path | None = None
    shapes: DecoderShapes = field(default_factory=DecoderShapes)
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 32
    more: int = 64
    same: int = 0
    threads: int = 0
    protocol: Protocol = field(default_factory=lambda: Protocol(1, 5, 1))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be one or more numbers >= 1, got {self.batches}")
        for name, least in (("prompt", 1), ("more", 1), ("same", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.model is None and self.prompt + self.more > self.shapes.positions:
            raise ValueError(
                f"prompt + more must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.prompt + self.more}"
            )
        environment.check_threads(self.threads)


def run(config: GenerateBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: the two sides do not write the same tokens.
      worker.WorkerError: a side failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    result: dict[str, Any] = {
        "bench": "generate",
        "config": environment.plain(config),
        "threads": config.threads or environment.cores(),
        "load_average": load,
        **environment.environment(),
        "rows": {},
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = Path(scratch) / "model"
        export(folder, config.shapes if config.model is None else config.model, config.seed)
        for batch in config.batches:
            result["rows"][str(batch)] = _measure(config, folder, batch, say)
    result["load_average_after"] = environment.load_average()
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _measure(
    config: GenerateBench, folder: Path, batch: int, say: Callable[[str], None]
) -> dict[str, Any]:
    names = ["steppe"] + ([config.peer] if config.peer != "none" else [])
    arguments = {
        "directory": str(folder),
        "batch": batch,
        "prompt": config.prompt,
        "more": config.more,
        "seed": config.seed,
    }
    threads = config.threads or environment.cores()
    workers: dict[str, Worker] = {}
    found: dict[str, Any] = {"sides": {name: {} for name in names}}
    try:
        for name in names:
            workers[name] = Worker(SIDES[name], arguments, threads=threads)
        texts = {}
        for name, worker in workers.items():
            try:
                found["sides"][name]["first_call"] = float(worker.call("turn", 1))
                texts[name] = worker.call("tokens", config.more)
            except WorkerError as error:
                raise WorkerError(f"{name} does not run here: {error}") from error
        if len(names) == 2:
            found["same"] = same_tokens(texts["steppe"], texts[config.peer], config.same)
            say(f"batch {batch}: {found['same']} new tokens of every row are equal")
        turns = [_turn(worker) for worker in workers.values()]
        if len(turns) == 2:
            times: Any = harness.compare(turns[0], turns[1], config.protocol)
        else:
            times = [harness.measure(turns[0], config.protocol)]
        for (name, worker), seconds in zip(workers.items(), times, strict=True):
            spread = harness.spread(seconds)
            found["sides"][name] |= {
                "seconds": seconds,
                **spread._asdict(),
                "tokens_per_s": batch * config.more / spread.median,
                "peak_memory": worker.call("peak_memory"),
            }
        ours = workers["steppe"]
        found["sides"]["steppe"]["programs"] = ours.call("compiles")
        shorter = [n for n in range(config.prompt - 3, config.prompt) if n > 0]
        found["sides"]["steppe"]["recompiled"] = ours.call("other_lengths", shorter)
    finally:
        for worker in workers.values():
            worker.close()
    if len(names) == 2:
        pairs = [found["sides"][name]["seconds"] for name in names]
        found["ratio"] = {
            **harness.ratio(*pairs)._asdict(),
            "pairs": [a / b for a, b in zip(*pairs)],
            "of": f"{names[0]} / {names[1]}",
        }
    found["unsteady"] = harness.unsteady({name: found["sides"][name]["seconds"] for name in names})
    return found


def same_tokens(ours: list[list[int]], theirs: list[list[int]], least: int = 0) -> int:
    """New tokens that are equal in every row.

    Args:
      least: how many must be; 0 = all of them.

    Raises:
      harness.Void: fewer are.
    """
    equal = []
    for a, b in zip(ours, theirs, strict=True):
        different = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
        equal.append(different[0] if different else min(len(a), len(b)))
    wanted = least or max(len(row) for row in (*ours, *theirs))
    if min(equal) < wanted:
        row = equal.index(min(equal))
        raise harness.Void(
            f"row {row} differs at its new token {equal[row]} of {wanted}; the comparison is void"
        )
    return min(equal)


def _turn(worker: Worker) -> harness.Turn:
    return lambda steps: float(worker.call("turn", steps))


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = (
        f"greedy, prompt {config['prompt']}, {config['more']} new tokens, "
        f"{result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    columns = ("", "batch", "s a call", "range", "tokens/s", "first call", "peak memory")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right")
    lines = []
    for batch, found in result["rows"].items():
        for name, side in found["sides"].items():
            grid.add_row(
                name,
                batch,
                f"{side['median']:.3f}",
                f"{side['low']:.3f} to {side['high']:.3f}",
                f"{side['tokens_per_s']:,.1f}",
                f"{side['first_call']:.2f} s",
                f"{side['peak_memory'] / 2**20:,.0f} MiB",
            )
        if "ratio" in found:
            ratio = found["ratio"]
            lines.append(
                f"batch {batch}, {ratio['of']}: {ratio['median']:.3f} "
                f"({ratio['low']:.3f} to {ratio['high']:.3f}), {found['same']} tokens equal"
            )
        again = found["sides"]["steppe"]["recompiled"]
        lines.append(f"batch {batch}: prompts of three other lengths compile {again} programs")
        lines += [f"warning: {reason}" for reason in found["unsteady"]]
    return Group(grid, *(Text(line) for line in lines))
