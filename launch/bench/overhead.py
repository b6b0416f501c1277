"""What a run costs beside its steps: saving checkpoints, and waiting for input.

A classifier learns from padded rows of random tokens through the loop. Saving blocks it while the
state is copied, and writes in the background, which may slow the steps that follow: the first is
read from the log (``save_time``), the whole from the time of the same steps without checkpoints, in
turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steppe.launch.bench import environment, harness
from steppe.launch.bench.shapes import Shapes

if TYPE_CHECKING:
    from rich.console import RenderableType

# What is owed: shares of the steps' time.
SAVING, INPUT = 0.05, 0.02


@dataclass(frozen=True)
class OverheadBench:
    """Measure what saving and input cost.

    Attributes:
      shapes: size of the encoder; MiniLM-L6's by default.
      batch, length: shape of a batch; rows have between a quarter of the length and all of it.
      examples: rows of the data set.
      backend: that makes the batches.
      every: steps from one save to the next.
      rounds: saves that are measured, and as many stretches without.
      out: file for the result as JSON.
    """

    shapes: Shapes = field(default_factory=Shapes)
    batch: int = 32
    length: int = 64
    examples: int = 10_000
    backend: Literal["numpy", "grain"] = "numpy"
    every: int = 100
    rounds: int = 5
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "examples", "every", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )


class Rows:
    """A writer that keeps the training rows."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Keeps a row of kind train."""
        if kind == "train":
            self.kept.append({"step": step, **values})

    def truncate(self, step: int) -> None:
        """Nothing resumes here."""


def run(config: OverheadBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result."""
    import jax
    import optax

    from steppe.data import batches as batches_
    from steppe.train import loop, step
    from steppe.train.checkpoint import Checkpoints
    from steppe.train.objectives import basic

    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    model = config.shapes.config().build()
    tx = optax.adamw(2e-5)
    state = step.init(jax.random.key(0), model, tx)
    train = step.make(basic.for_task(model, "classification"), tx)
    lengths = (config.length,)
    batches: Any = batches_.train(
        data(config), config.batch, seed=0, buckets=lengths, backend=config.backend
    )
    logs = {True: Rows(), False: Rows()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="steppe-overhead-") as scratch:
        kept = Checkpoints(Path(scratch) / "checkpoints")
        # Compiles, and imports what saving needs; saves come at multiples of ``every``.
        state = loop.run(train, state, batches, steps=config.every, checkpoints=kept)
        for number in range(1, config.rounds + 1):
            for saving in (True, False):
                begin, at = time.perf_counter(), int(state.step)
                once: Any = _At(kept, at + config.every) if saving else None
                # A save at the end of a stretch would be waited for: the write of one goes on
                # behind the first steps of the next, so that a stretch is two intervals long.
                state = loop.run(
                    train,
                    state,
                    batches,
                    steps=at + 2 * config.every,
                    checkpoints=once,
                    save_every=config.every,
                    log_every=config.every,
                    writers=[logs[saving]],
                )
                jax.block_until_ready(state.params)
                seconds[saving].append(time.perf_counter() - begin)
            say(f"round {number}: {seconds[True][-1]:.2f} s with a save, {seconds[False][-1]:.2f}")
        size = sum(f.stat().st_size for f in kept.directory.rglob("*") if f.is_file())
        size //= len(kept.steps)
    result = {
        "bench": "overhead",
        "config": environment.plain(config),
        "load_average": load,
        **environment.environment(),
        "checkpoint_bytes": size,
        **summary(config.every, logs[True].kept, logs[False].kept, seconds),
        "unsteady": harness.unsteady({"saving": seconds[True], "not saving": seconds[False]}),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


class _At:
    """Checkpoints that write one step's state and no other, the last one of a stretch."""

    def __init__(self, kept: Any, step: int) -> None:
        self._kept, self._step = kept, step
        self.directory, self.latest = kept.directory, None

    def save(self, state: Any, data: Any, *, wait: bool = False) -> int:
        """Writes the state of the step."""
        step = int(state.step)
        return step if step != self._step else int(self._kept.save(state, data, wait=wait))

    def wait(self) -> None:
        """Waits for the write in the background."""
        self._kept.wait()


def summary(
    every: int,
    saving: list[dict[str, Any]],
    plain: list[dict[str, Any]],
    seconds: Mapping[bool, list[float]],
) -> dict[str, Any]:
    """Shares of the steps' time.

    Args:
      every: steps of an interval.
      saving, plain: rows of the log with and without saves.
      seconds: of the stretches with a save and without.

    Returns:
      ``step_time``: median, seconds; ``blocked``: seconds that each save blocked the loop, and
      ``blocked_share`` of an interval's steps, their median; ``slowdown``: of an interval with a
      save against one without, median and range less 1; ``input_wait_share``.
    """
    step_time = statistics.median(row["step_time"] for row in plain)
    blocked = [row["save_time"] for row in saving if "save_time" in row]
    # A stretch of two intervals has one save.
    ratios = harness.ratio(seconds[True], seconds[False])
    waits = sum(row["input_wait"] for row in plain) / sum(row["step_time"] for row in plain)
    return {
        "step_time": step_time,
        "blocked": blocked,
        "blocked_share": statistics.median(blocked) / (every * step_time),
        "slowdown": {k: 2 * (v - 1) for k, v in ratios._asdict().items()},
        "input_wait_share": waits,
        "seconds": {"saving": seconds[True], "not saving": seconds[False]},
    }


def data(config: OverheadBench) -> Any:
    """Examples of random tokens and labels."""
    from steppe.data.dataset import Dataset, Ragged

    rng = np.random.default_rng(0)
    count = config.examples
    lengths = rng.integers(max(config.length // 4, 1), config.length + 1, count)
    flat = rng.integers(5, config.shapes.vocab_size, int(lengths.sum()))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Ragged(flat.astype(np.int32), starts)
    return Dataset(
        kind="classification",
        input_ids=tokens,
        token_type_ids=Ragged(np.zeros_like(tokens.flat), starts),
        labels=rng.integers(0, 2, count).astype(np.int32),
        ids=[str(number) for number in range(count)],
        records=[{}] * count,
        record_index=np.arange(count),
        pad_id=0,
    )


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config, slow = result["config"], result["slowdown"]
    title = f"a save every {config['every']} steps, batch {config['batch']} x {config['length']}"
    grid = Table(title=title, title_justify="left", box=None, show_header=False)
    grid.add_row("time a step", f"{1e3 * result['step_time']:.1f} ms")
    blocked = 1e3 * statistics.median(result["blocked"])
    share = f"{result['blocked_share']:.2%} of the steps ({SAVING:.0%} are allowed)"
    grid.add_row("a save blocks", f"{blocked:.0f} ms, {share}")
    span = f"({slow['low']:+.1%} to {slow['high']:+.1%})"
    grid.add_row("steps and save against steps", f"{slow['median']:+.1%} {span}")
    wait = f"{result['input_wait_share']:.2%} of the steps ({INPUT:.0%} are allowed)"
    grid.add_row("waiting for input", wait)
    grid.add_row("a checkpoint", f"{result['checkpoint_bytes'] / 2**20:,.1f} MiB")
    return Group(grid, *(Text(f"warning: {reason}") for reason in result["unsteady"]))
