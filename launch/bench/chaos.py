"""A run is killed again and again at random moments, and ends with the losses of one that was not.

The run is ``chaos_run``: FSAM + distillation + LoRA. Twice it is killed during a step, a save or a
restore, by SIGTERM or SIGKILL: once always on the same devices, where the losses must be those of
the undisturbed run bit for bit, and once on another number of devices and processes at every start,
where they may differ by rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steppe.launch.bench import chaos_run, environment
from steppe.launch.bench.chaos_run import Settings
from steppe.launch.bench.harness import Void

if TYPE_CHECKING:
    from rich.console import RenderableType

# (processes, devices of each), in turn.
TOPOLOGIES = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (1, 8), (2, 4))
SAME = (1, 4)
TOLERANCE = 1e-5
# Statuses of a start that was killed: 75 after SIGTERM; of a process, and of one of several, after
# SIGKILL.
ENDS = {"SIGTERM": (75,), "SIGKILL": (-9, 137)}


@dataclass(frozen=True)
class ChaosBench:
    """Kill a run many times.

    Attributes:
      steps: of the run.
      kills: of each of the two runs.
      save_every: steps from one checkpoint to the next.
      seed: of the moments.
      timeout: seconds that a start may take.
      out: file for the result as JSON.
    """

    steps: int = 200
    kills: int = 20
    save_every: int = 5
    seed: int = 0
    timeout: float = 600.0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("kills", 0), ("save_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {self.timeout}")


class Kill(NamedTuple):
    """One start that is to be killed; the fields are those of ``chaos_run.Settings``.

    Attributes:
      ahead: steps behind the one that the run has come to.
    """

    when: str
    signal: str
    ahead: int
    delay: float
    processes: int = 1
    devices: int = 1
    rank: int = 0


def draw(
    config: ChaosBench, topologies: Sequence[tuple[int, int]], rng: random.Random
) -> list[Kill]:
    """The kills of a run: what is hit and by which signal in turn, the moments at random."""
    pairs = itertools.cycle(itertools.product(chaos_run.WHEN, ("SIGTERM", "SIGKILL")))
    ahead = max(2, 2 * config.steps // max(config.kills, 1))
    longest = {"step": 0.02, "save": 0.05, "restore": 0.3}
    out = []
    for number, (when, signal) in zip(range(config.kills), pairs):
        processes, devices = topologies[number % len(topologies)]
        delay = rng.uniform(0.0, longest[when])
        rank = rng.randrange(processes)
        steps = rng.randint(1, ahead)
        out.append(Kill(when, signal, steps, delay, processes, devices, rank))
    return out


def disturbed(
    folder: Path,
    steps: int,
    save_every: int,
    kills: Sequence[Kill],
    last: tuple[int, int],
    *,
    timeout: float = 600.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Starts the run, kills it, and so on; the last start is left alone.

    Args:
      last: processes of the last start, and devices of each.

    Returns:
      ``kills``: each with the step that it had ``reached`` and that was ``saved``;
      ``half_written``: kills that left a checkpoint so; ``lost_most``: steps that one has cost;
      and what ``goodput.summary`` says.

    Raises:
      Void: a start ended otherwise than by its kill, a step was lost that a checkpoint held, or the
        log does not have every step once.
    """
    from steppe.train import goodput, metrics
    from steppe.train.checkpoint import PARTIAL, Checkpoints

    held = Checkpoints(folder / "checkpoints")
    done: list[dict[str, Any]] = []
    for number, kill in enumerate(kills, 1):
        before = goodput.reached(folder)
        at = (0 if before is None else before[0]) + kill.ahead
        if at + save_every >= steps:
            say(f"the run would be complete before kill {number}: no more kills")
            break
        if kill.when == "restore" and held.latest is None:
            kill = kill._replace(when="step")
        settings = _settings(folder, steps, save_every, kill.processes, kill.devices)
        options = {k: v for k, v in kill._asdict().items() if k != "ahead"}
        status = _start(dataclasses.replace(settings, at=at, **options), folder, timeout)
        after = goodput.reached(folder)
        row = {
            **kill._asdict(),
            "status": status,
            "reached": 0 if after is None else after[0],
            "saved": held.latest or 0,
            "half_written": any(PARTIAL in name for name in _listed(held.directory)),
        }
        _check(row, number, save_every)
        done.append(row)
        say(
            f"{number}: {kill.signal} during a {kill.when} on {kill.processes} x {kill.devices} "
            f"devices; step {row['reached']}, saved {row['saved']}"
        )
    status = _start(_settings(folder, steps, save_every, *last), folder, timeout)
    if status:
        raise Void(f"the start that was left alone ended with {status}: {_said(folder)}")
    starts = metrics.read(folder / goodput.STARTS)
    rows = metrics.read(folder / "metrics.jsonl")
    if [row["step"] for row in rows if row["kind"] == "train"] != list(range(1, steps + 1)):
        raise Void("the log does not have every step once")
    return {
        "kills": done,
        "half_written": sum(row["half_written"] for row in done),
        "lost_most": max((row["reached"] - row["saved"] for row in done), default=0),
        **goodput.summary(starts, rows),
    }


def _check(row: Mapping[str, Any], number: int, every: int) -> None:
    """A kill has ended its start, and cost no more than it may."""
    if row["status"] not in ENDS[row["signal"]]:
        raise Void(f"start {number} ended with {row['status']}, not by its {row['signal']}: {row}")
    lost = row["reached"] - row["saved"]
    # A save that is under way is none yet: the one before it counts, and the next waits for it.
    if lost > 2 * every:
        raise Void(f"{lost} steps are lost with a save every {every}: {row}")
    if lost and row["signal"] == "SIGTERM" and row["when"] != "restore":
        raise Void(f"{lost} steps are lost although SIGTERM leaves time to save: {row}")


def _said(folder: Path) -> str:
    return (folder / "said.txt").read_text("utf-8", errors="replace")[-2000:]


def _settings(folder: Path, steps: int, save_every: int, processes: int, devices: int) -> Settings:
    return Settings(str(folder), steps, save_every, processes, devices)


def _start(settings: Settings, folder: Path, timeout: float) -> int:
    words, env = chaos_run.command(settings)
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "said.txt").open("ab") as said:
        process = subprocess.Popen(
            words, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            raise Void(f"a start has not ended within {timeout:g} s: {settings}") from None


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def curve(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    from steppe.train import metrics

    rows = metrics.read(folder / "metrics.jsonl")
    return [(row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def difference(
    found: Sequence[tuple[float, float]], wanted: Sequence[tuple[float, float]]
) -> float:
    """The largest difference of two curves, losses and norms."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


def run(config: ChaosBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs both and returns the result.

    Raises:
      Void: something was lost, or the losses are not those of the undisturbed run.
    """
    load = environment.load_average()
    rng = random.Random(config.seed)
    result: dict[str, Any] = {
        "bench": "chaos",
        "config": environment.plain(config),
        "load_average": load,
        **environment.environment(),
    }
    with tempfile.TemporaryDirectory(prefix="steppe-chaos-") as scratch:
        root = Path(scratch)
        for name, topologies, last, tolerance in (
            ("same devices", (SAME,), SAME, 0.0),
            ("other devices", TOPOLOGIES, (1, 2), TOLERANCE),
        ):
            whole = SAME if tolerance == 0 else (1, 1)
            short = name.replace(" ", "-")
            alone, killed = root / f"{short}-alone", root / short
            say(f"{name}: the undisturbed run")
            sizes = (config.steps, config.save_every)
            disturbed(alone, *sizes, (), whole, timeout=config.timeout)
            kills = draw(config, topologies, rng)
            found = disturbed(killed, *sizes, kills, last, timeout=config.timeout, say=say)
            worst = difference(curve(killed), curve(alone))
            if worst > tolerance:
                raise Void(f"{name}: the losses differ by {worst:.2e}, more than {tolerance:g}")
            result[name] = {"largest_difference": worst, "tolerance": tolerance, **found}
    result["load_average_after"] = environment.load_average()
    if config.out is not None:
        environment.write_json(config.out, json.loads(json.dumps(result)))
    return result


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.table import Table

    steps = result["config"]["steps"]
    grid = Table(title=f"FSAM + KD + LoRA, {steps} steps", title_justify="left", box=None)
    for place, column in enumerate(
        ("", "kills", "steps repeated", "most at once", "half-written", "difference", "goodput")
    ):
        grid.add_column(column, justify="right" if place else "left")
    for name in ("same devices", "other devices"):
        found = result[name]
        grid.add_row(
            name,
            str(len(found["kills"])),
            str(found["repeated_steps"]),
            str(found["lost_most"]),
            str(found["half_written"]),
            "none" if found["largest_difference"] == 0 else f"{found['largest_difference']:.1e}",
            f"{found['goodput']:.1%}",
        )
    return grid
