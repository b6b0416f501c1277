"""Predicted against measured time of training steps, on this machine's CPU.

The CPU is calibrated as an accelerator (``launch.plan.calibrate``) before and after the steps are
measured, and the step's program is counted as for any other (``launch.plan.program``). What is
predicted is the least time that a step can take, so that measured / predicted is above 1 unless
small arrays that stay in the caches outrun the model of the memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness

if TYPE_CHECKING:
    from rich.console import RenderableType

STEPS = ("adamw", "sam", "kd")


@dataclass(frozen=True)
class PlanBench:
    """Compare what ``steppe plan`` predicts on this CPU with what is measured.

    Attributes:
      model: a shape of ``steppe plan``; random tensors.
      teacher: of the kd step.
      batch, length: shape of a batch; every row is full.
      steps: which of adamw, sam, kd.
      rounds, turns: measurements of each, in turns, and steps of one.
      out: file for the result as JSON.
    """

    model: str = "minilm-l6"
    teacher: str = "minilm-l6"
    batch: int = 32
    length: int = 64
    steps: tuple[str, ...] = STEPS
    rounds: int = 5
    turns: int = 5
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "rounds", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        unknown = [name for name in self.steps if name not in STEPS]
        if unknown or not self.steps:
            raise ValueError(f"steps must be some of {', '.join(STEPS)}, got {self.steps}")


def run(config: PlanBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Predicts, measures and returns the result."""
    from steppe.launch.plan import program, roofline

    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    plans = {name: _config(config, name) for name in config.steps}
    counts = {name: program.counted(plan, {"data": 1}) for name, plan in plans.items()}
    rates = [_rates()]
    sides = {name: _turn(plan) for name, plan in plans.items()}
    protocol = harness.Protocol(warmup=2, rounds=config.rounds, steps=config.turns)
    times = harness.interleave(sides, protocol)
    rates.append(_rates())
    found = {}
    for name, measured in times.items():
        predicted = [roofline.times(counts[name], rate, {"data": 1}).step for rate in rates]
        middle = statistics.fmean(predicted)
        spread = harness.spread(measured)
        found[name] = {
            "predicted": predicted,
            "measured": measured,
            "ratio": harness.spread([t / middle for t in measured])._asdict(),
            "error": middle / spread.median - 1,
            "flops": counts[name].flops,
            "traffic": counts[name].nbytes,
        }
        say(f"{name}: predicted {1e3 * middle:.1f} ms, measured {1e3 * spread.median:.1f} ms")
    result = {
        "bench": "plan",
        "config": environment.plain(config),
        "load_average": [load, environment.load_average()],
        **environment.environment(),
        "rates": [
            {"matmul": r.peak32, "memory": r.bandwidth, "exponentials": r.exp} for r in rates
        ],
        "steps": found,
        "unsteady": harness.unsteady(times),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _config(config: PlanBench, name: str) -> Any:
    from steppe.launch.plan.settings import PlanConfig

    return PlanConfig(
        model=config.model,
        teacher=config.teacher if name == "kd" else "",
        teacher_dtype="float32",
        sharpness="sam" if name == "sam" else "none",
        batch_size=config.batch,
        length=config.length,
        compute_dtype="float32",
    )


def _rates() -> Any:
    from steppe.launch.plan import calibrate

    calibrate.cpu.cache_clear()
    return calibrate.cpu()


def _turn(config: Any) -> harness.Turn:
    """Steps of the planned kind on random tensors."""
    import jax

    from steppe.launch.bench.shapes import batches
    from steppe.launch.plan import work as work_
    from steppe.train import step

    work = work_.build(config)
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def filled(leaf: Any) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)

    params = jax.tree.map(filled, work.params)
    state = step.init(
        jax.random.key(1), work.model, work.tx, params=params, trainable=work.trainable
    )
    train = step.make(work.objective, work.tx, clip_norm=config.optim.clip_norm)
    (batch,) = batches(1, config.batch_size, config.length, work.bare.config.vocab_size)
    batch["attention_mask"][:] = 1
    held = [state]

    def one() -> Any:
        held[0], metrics = train(held[0], batch)
        return metrics

    return harness.timed(one, jax.block_until_ready)


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = f"{config['model']} on this CPU, batch {config['batch']} x {config['length']}, float32"
    grid = Table(title=title, title_justify="left", box=None)
    for number, column in enumerate(("step", "predicted", "measured", "measured / predicted")):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for name, found in result["steps"].items():
        ratio = found["ratio"]
        grid.add_row(
            name,
            f"{1e3 * statistics.fmean(found['predicted']):.1f} ms",
            f"{1e3 * statistics.median(found['measured']):.1f} ms",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        )
    return Group(grid, *(Text(f"warning: {reason}") for reason in result["unsteady"]))
