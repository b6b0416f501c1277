"""``steppe compare``: runs what is left of a comparison and writes its table and report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from steppe.launch import config as config_
from steppe.launch import outputs
from steppe.launch.compare import folders, schedule, table
from steppe.launch.compare.journal import Journal, Trial
from steppe.launch.compare.settings import CompareConfig
from steppe.launch.compare.trial import Trials
from steppe.train import loop

# What may change when a comparison is gone on with: more rows, not other ones.
GROWS = ("out", "sources", "sizes", "noise", "methods", "seeds", "resume", "dry_run")


def run(config: CompareConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in table.json.

    Raises:
      FileExistsError: ``out`` holds another comparison.
      Interrupted: stopped by Ctrl-C or SIGTERM; finished trials are kept.
    """
    from rich.console import Console

    console = Console(stderr=True)
    folder = Path(config.out)
    if config.dry_run:
        from steppe.launch.compare import estimate

        return estimate.show(config)
    folders.check(config, folder, GROWS)
    journal = Journal(folder)
    _nothing_lost(config, folder, journal)
    trials = Trials(config)
    trials.open()
    outputs.write_json(folder / folders.CONFIG, config_.to_dict(config))
    progress = _Progress(config, journal, console)
    try:
        with folders.terminable():
            for cell in config.cells():
                for trial in schedule.selecting(config, cell):
                    _one(trial, trials, journal, progress)
                for trial in schedule.reported(config, cell, journal):
                    if _one(trial, trials, journal, progress):
                        _write(config, journal, folder, command)
    except KeyboardInterrupt:
        _write(config, journal, folder, command)
        raise loop.Interrupted(
            f"interrupted; {len(journal.rows)} finished trials are in {journal.file}. "
            "Give the same command with --resume to go on"
        ) from None
    finally:
        progress.close()
    found = _write(config, journal, folder, command)
    Console().print(table.rich_table(found))
    return found


def report(folder: Path) -> dict[str, Any]:
    """Writes table and report of a folder again, from the trials that are finished.

    Raises:
      ValueError: its config.json or runs.jsonl is damaged.
    """
    config: CompareConfig = folders.read(folder, CompareConfig)
    command: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        command = json.loads((folder / "table.json").read_text("utf-8"))["command"]
    return _write(config, Journal(folder), folder, command)


def _nothing_lost(config: CompareConfig, folder: Path, journal: Journal) -> None:
    """
    Raises:
      ValueError: a row of the table would be missing.
    """
    done = [t for t in journal.rows if t.reported]
    held: dict[str, Iterable[Any]] = {
        "sources": [t.cell.source for t in done],
        "sizes": [t.cell.size for t in done],
        "noise": [t.cell.noise for t in done],
        "methods": [t.arm for t in done],
        "seeds": sorted({t.seed for t in done}),
    }
    given: dict[str, Iterable[Any]] = {name: getattr(config, name) for name in held}
    arms = {arm.name: arm for arm in config.arms()}
    given["methods"] = list(arms)
    folders.nothing_lost(folder, held, given)
    # A grid may grow, and another radius be chosen of it; one that was reported must be in it.
    for trial in done:
        grid = arms[trial.arm].grid or (0.0,)
        if trial.rho not in grid:
            raise ValueError(
                f"{folder} has finished runs of {trial.arm} with rho {trial.rho:g}, which methods "
                f"does not name ({', '.join(f'{r:g}' for r in grid)}): add it, or choose a new out"
            )


def _one(trial: Trial, trials: Trials, journal: Journal, progress: _Progress) -> bool:
    if trial in journal:
        return False
    begin = time.perf_counter()
    found = trials.run(trial)
    seconds = time.perf_counter() - begin
    journal.add(trial, {**found, "wall_s": seconds, "time": time.time()})
    progress.done(trial, found, seconds)
    return True


def _write(
    config: CompareConfig, journal: Journal, folder: Path, command: Sequence[str]
) -> dict[str, Any]:
    from steppe.launch.report import comparison

    found = table.summary(config, journal, command)
    outputs.write_json(folder / "table.json", found)
    outputs.write_text(folder / "table.md", table.markdown(found))
    outputs.write_text(folder / "report.html", comparison.render(found))
    return found


class _Progress:
    """A bar with the time that is left on a terminal; a line a trial elsewhere."""

    def __init__(self, config: CompareConfig, journal: Journal, console: Any) -> None:
        self.total = schedule.count(config)
        self.console = console
        self._metric = config.select_by
        planned = schedule.planned(config)
        self._finished = len([t for t in journal.rows if planned(t)])
        self._begin, self._ran = time.perf_counter(), 0
        self._stack = contextlib.ExitStack()
        self._bar: Any = None
        if console.is_terminal:
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
            )
            self._bar = self._stack.enter_context(progress.Progress(*columns, console=console))
            self._task = self._bar.add_task("trials", total=self.total, completed=self._finished)

    def done(self, trial: Trial, found: dict[str, Any], seconds: float) -> None:
        """After every trial."""
        self._ran += 1
        self._finished += 1
        split = "test" if trial.reported else "valid"
        value = found.get(split, {}).get(self._metric)
        said = "diverged" if value is None else f"{split} {self._metric} {value:.4f}"
        source = trial.cell.source.split(":", 1)[-1]
        text = (
            f"{source} {trial.cell.size or 'all'} {trial.arm} rho {trial.rho:g} "
            f"seed {trial.seed}: {said}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._finished, description=text)
            return
        each = (time.perf_counter() - self._begin) / self._ran
        left = max(self.total - self._finished, 0) * each
        self.console.print(
            f"{self._finished}/{self.total} {text} ({seconds:.0f} s; about {left / 60:.0f} min "
            "left)",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Leaves the terminal in order."""
        self._stack.close()
