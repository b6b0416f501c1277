"""Merging the fine-tuned models of a seed by every method, and which of them goes on."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.launch.merge import inputs, methods
from steppe.launch.merge.settings import SWEPT, MergeConfig
from steppe.launch.tour.graph import Done, Result
from steppe.launch.tour.world import MODEL, World, mean
from steppe.models.tree import Params
from steppe.train import merge
from steppe.train.merge import heads


class Trees:
    """The models of one seed and optimiser in memory; the last ones asked for are kept."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._held: tuple[tuple[Path, ...], methods.Trees] | None = None

    def of(self, runs: Mapping[str, Done], scratch: Path) -> methods.Trees:
        """
        Args:
          runs: task -> its fine-tuning.
          scratch: a name in a folder where a base of another format may be written.
        """
        folders = tuple(done.folder / "run" for done in runs.values())
        if self._held is None or self._held[0] != folders:
            shared = MergeConfig(
                base=self.world.config.model,
                models=tuple(map(str, folders)),
                names=tuple(runs),
                out=str(scratch),
            )
            base, models, _ = inputs.collect(shared)
            self._held = (folders, methods.load(base, models, self.world.tell))
            inputs.clean(scratch)
        return self._held[1]


def merged(world: World, trees: methods.Trees, arm: MergeConfig, folder: Path) -> Result:
    """One method; the trunk with all heads lies in ``folder/model``.

    Returns:
      ``method``, and of those that have them ``lam``, ``notes``, ``coefficients`` (means a task)
      and ``mask`` (rows of tensor, density, rate).
    """
    found = {"method": arm.method, **_merge(world, trees, arm)}
    trunk = found.pop("trunk")
    own = world.origin.tokenizer
    heads.save(folder / MODEL, trees.multihead(trunk), tokenizer_dir=own if own.is_dir() else None)
    return found


def _merge(world: World, trees: methods.Trees, arm: MergeConfig) -> dict[str, Any]:
    if arm.method == "average":
        return {"trunk": merge.average(trees.thetas)}
    if arm.method in SWEPT:
        at = methods.line(arm, trees)
        if arm.lam is not None:
            return {"trunk": at(arm.lam), "lam": arm.lam}
        lam, marks = best(world, trees, at, arm.sweep)
        return {"trunk": at(lam), "lam": lam, "sweep": marks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they say stands in the notes
        got = methods.with_data(arm, trees, list(world.tasks.values()), world.nets, world.tell)
    said: dict[str, Any] = {"trunk": got.trunk, "notes": got.notes}
    if got.coefficients:
        columns = zip(*(values for _, values in got.coefficients), strict=True)
        said["coefficients"] = [mean(list(column)) for column in columns]
    if got.mask is not None:
        drawn = methods.densities(got.mask)
        said["mask"] = [
            {"tensor": name, "density": value, "rate": got.rates.get(name)}
            for name, value in drawn.items()
        ]
    return said


def best(
    world: World, trees: methods.Trees, at: Callable[[float], Params], lambdas: Sequence[float]
) -> tuple[float, dict[str, float]]:
    """The coefficient of the best mean accuracy on the validation splits, and all of these."""
    marks = {}
    for number, lam in enumerate(lambdas):
        world.tell(f"coefficient {lam:g}", number, len(lambdas))
        scores = world.score(world.several(trees.multihead(at(lam))), "valid")
        marks[lam] = mean([one["accuracy"] for one in scores.values()])
    chosen = max(marks, key=lambda lam: (marks[lam], -lam))
    return chosen, {f"{lam:g}": value for lam, value in marks.items()}


def choose(scores: Mapping[str, Done]) -> Result:
    """The method of the best mean accuracy on the validation splits; of equal ones the first."""
    marks = {name: float(done.result["mean"]["valid"]) for name, done in scores.items()}
    known = [name for name, mark in marks.items() if math.isfinite(mark)]
    chosen = max(known, key=lambda name: (marks[name], -known.index(name)))
    return {"best": chosen, "valid": marks}


def arm_of(world: World, method: str, seed: int) -> MergeConfig:
    """Settings of a method, with those of the data that it may see."""
    return dataclasses.replace(
        world.config.merge(method, seed), eval_limit=world.config.data.eval_limit
    )
