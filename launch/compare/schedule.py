"""Which trials are left, cell by cell: those that choose rho, then those that are reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from steppe.launch.compare.journal import Journal, Trial
from steppe.launch.compare.settings import Arm, Cell, CompareConfig


def selecting(config: CompareConfig, cell: Cell) -> list[Trial]:
    """Trials on the validation split, seed by seed; AdamW among them, as the mark to beat."""
    arms = config.arms()
    if not any(arm.chooses for arm in arms):
        return []
    return [
        Trial(cell, arm.name, rho, seed, reported=False)
        for seed in config.select_seeds
        for arm in arms
        for rho in (arm.grid if arm.chooses else (0.0,) if not arm.grid else ())
    ]


def reported(config: CompareConfig, cell: Cell, journal: Journal) -> list[Trial]:
    """Trials on the test split, seed by seed; of every arm whose rho is known."""
    chosen = {arm.name: choose(config, cell, arm, journal) for arm in config.arms()}
    return [
        Trial(cell, name, rho, seed, reported=True)
        for seed in config.seeds
        for name, rho in chosen.items()
        if rho is not None
    ]


def choose(config: CompareConfig, cell: Cell, arm: Arm, journal: Journal) -> float | None:
    """The rho of the best mean score on the validation split; None where trials are missing.

    A trial that diverged counts as the worst score there is. Ties take the smaller rho.
    """
    if not arm.grid:
        return 0.0
    if not arm.chooses:
        return arm.grid[0]
    scores = {}
    for rho in arm.grid:
        found = validation(config, cell, arm, rho, journal)
        if any(score is None for score in found):
            return None
        sign = -1.0 if config.select_by == "loss" else 1.0
        values = [sign * float(score) if score is not None else 0.0 for score in found]
        mean = sum(values) / len(values)
        scores[rho] = mean if math.isfinite(mean) else -math.inf
    return max(sorted(scores), key=lambda rho: scores[rho])


def validation(
    config: CompareConfig, cell: Cell, arm: Arm, rho: float, journal: Journal
) -> list[float | None]:
    """Scores of the selection seeds: None where one has not run, NaN where it diverged."""
    rows = [journal.get(Trial(cell, arm.name, rho, s, False)) for s in config.select_seeds]
    return [None if row is None else score(row.get("valid"), config.select_by) for row in rows]


def score(metrics: Any, name: str) -> float:
    """A metric of a row of the journal; NaN where the trial diverged."""
    value = (metrics or {}).get(name)
    return math.nan if value is None else float(value)


def planned(config: CompareConfig) -> Callable[[Trial], bool]:
    """Whether a trial is one of those that :func:`count` counts, as far as is known before rho is
    chosen: of the reported ones of an arm that chooses, those of all its radii are."""
    cells, seeds = set(config.cells()), set(config.seeds)
    grids = {arm.name: arm.grid or (0.0,) for arm in config.arms()}
    choosing = {trial for cell in cells for trial in selecting(config, cell)}

    def found(trial: Trial) -> bool:
        if not trial.reported:
            return trial in choosing
        known = trial.cell in cells and trial.seed in seeds
        return known and trial.rho in grids.get(trial.arm, ())

    return found


def count(config: CompareConfig) -> int:
    """All trials of the comparison."""
    arms, cells = config.arms(), config.cells()
    each = len(arms) * len(config.seeds) + len(selecting(config, cells[0]))
    return each * len(cells)
