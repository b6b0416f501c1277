"""``steppe compare --dry-run``: how many runs, and about how long they take on this machine."""

from __future__ import annotations

import math
import time
from typing import Any

import jax

from steppe.launch import pieces as pieces_
from steppe.launch import scoring
from steppe.launch.compare import schedule
from steppe.launch.compare.settings import CompareConfig
from steppe.launch.compare.trial import Trials, gradients

TIMED = 6  # batches, after the program of each of their shapes has been compiled


def show(config: CompareConfig) -> dict[str, Any]:
    """Prints the plan. Compiles and times a few steps of the first arm; writes nothing.

    Returns:
      runs, steps, gradients (of all runs together), seconds (estimated), seconds_a_gradient.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    trials = Trials(config)
    trials.open()
    arms = {arm.name: arm for arm in config.arms()}
    table = Table(box=None)
    for head in ("source", "examples", "wrong labels", "runs", "steps", "gradients"):
        table.add_column(head, justify="left" if head == "source" else "right")
    total = {"runs": 0, "steps": 0, "gradients": 0.0}
    examples = 0
    first = next(iter(arms.values()))
    for cell in config.cells():
        built = trials.build(cell, first, config.seeds[0])
        counts = built.data.counts()
        choose = schedule.selecting(config, cell)
        runs = [(arms[t.arm], t.rho) for t in choose]
        runs += [(arm, max(arm.grid, default=0.0)) for arm in arms.values() for _ in config.seeds]
        steps = [_steps(built, arm) for arm, _ in runs]
        work = sum(n * gradients(arm, rho) for n, (arm, rho) in zip(steps, runs, strict=True))
        table.add_row(
            cell.source,
            f"{counts['train']:,}",
            f"{cell.noise:.0%}",
            f"{len(runs):,}",
            f"{sum(steps):,}",
            f"{work:,.0f}",
        )
        total["runs"] += len(runs)
        total["steps"] += sum(steps)
        total["gradients"] += work
        elsewhere = [trials.material.whole(s) for s in config.transfer if s != cell.source]
        names = built.data.task.label_names
        scored = sum(len(there) for task, there in elsewhere if task.label_names == names)
        reported = len(runs) - len(choose)
        examples += len(choose) * counts["valid"] + reported * (counts["test"] + scored)
    console.print(table)
    console.print(
        "compiling and timing some steps: a minute, or several where others work", style="dim"
    )
    gradient, example = _measure(trials, config)
    seconds = total["gradients"] * gradient + examples * example
    console.print(
        f"{total['runs']:,} runs, {total['gradients']:,.0f} gradients of {1e3 * gradient:.0f} ms, "
        f"{examples:,} scored examples of {1e3 * example:.1f} ms: about {seconds / 3600:.1f} h "
        "on this machine as busy as it is now"
        + (", and the curvature of every reported run" if config.curvature else ""),
        highlight=False,
    )
    return {**total, "seconds": seconds, "seconds_a_gradient": gradient}


def _steps(built: pieces_.Pieces, arm: Any) -> int:
    """Steps of an arm, by its own epochs."""
    config = arm.config
    return config.steps or max(1, math.ceil(config.epochs * built.epoch))


def _measure(trials: Trials, config: CompareConfig) -> tuple[float, float]:
    """Seconds of a gradient and of scoring an example, in the first cell."""
    arm = config.arms()[0]
    built = trials.build(config.cells()[0], arm, config.seeds[0])
    state = pieces_.start(built)
    batches = [next(built.batches) for _ in range(TIMED)]
    for batch in {b["labels"].shape + b[next(iter(b))].shape: b for b in batches}.values():
        state, _ = built.train(state, batch)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for batch in batches:
        state, _ = built.train(state, batch)
    jax.block_until_ready(state)
    gradient = (time.perf_counter() - begin) / TIMED / gradients(arm, max(arm.grid, default=0.0))
    scoring.score(built, state.full(), "valid")
    begin = time.perf_counter()
    found = scoring.score(built, state.full(), "valid")
    return gradient, (time.perf_counter() - begin) / len(found.labels)
