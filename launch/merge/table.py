"""Scores by task: of the base, of each model by itself, and merged; and over the coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steppe.launch.merge.material import Task
from steppe.launch.merge.methods import Nets
from steppe.models.tree import Params
from steppe.train.merge.heads import MultiHead

Scores = dict[str, dict[str, float]]  # task -> metrics


def score(tasks: Sequence[Task], merged: MultiHead, nets: Nets, split: str) -> Scores:
    """Every task by its own head on one trunk."""
    found = {}
    for task in tasks:
        model, params = merged.model(task.name)
        found[task.name] = task.score(nets.of(model.config), params, split)
    return found


def individual(
    tasks: Sequence[Task], models: Mapping[str, tuple[Any, Params]], nets: Nets, split: str
) -> Scores:
    """Every task by the model that was fine-tuned on it."""
    return {
        task.name: task.score(nets.of(models[task.name][0]), models[task.name][1], split)
        for task in tasks
    }


def row(name: str, tasks: Sequence[Task], scores: Scores, reference: Scores) -> dict[str, Any]:
    """One row of the table: what stands for each task, means, and what is left of the
    individual models' scores."""
    values = [scores[task.name][task.metric] for task in tasks]
    shares = [
        task.ratio(value, reference[task.name][task.metric])
        for task, value in zip(tasks, values, strict=True)
    ]
    return {
        "name": name,
        "scores": values,
        "mean": mean(values),
        "normalised": shares,
        "normalised_mean": mean(shares),
        "metrics": scores,
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def sweep(
    tasks: Sequence[Task],
    at: Callable[[float], MultiHead],
    lambdas: Sequence[float],
    reference: Mapping[str, Scores],
    nets: Nets,
    tell: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores on the validation and the test split for every coefficient.

    Args:
      at: lam -> merged model.
      reference: split -> scores of the individual models.

    Returns:
      ``{"lambdas", "valid": rows, "test": rows, "best"}``; best has the highest normalised
      mean on the validation split.
    """
    found: dict[str, Any] = {"lambdas": list(lambdas), "valid": [], "test": []}
    for number, lam in enumerate(lambdas):
        if tell is not None:
            tell(f"coefficient {lam:g}", number, len(lambdas))
        merged = at(lam)
        for split in ("valid", "test"):
            scores = score(tasks, merged, nets, split)
            made = row(f"{lam:g}", tasks, scores, reference[split])
            found[split].append({k: made[k] for k in ("scores", "mean", "normalised_mean")})
    marks = [one["normalised_mean"] for one in found["valid"]]
    known = [i for i, mark in enumerate(marks) if math.isfinite(mark)]
    # Of equal ones the smallest: it leaves the base least.
    found["best"] = found["lambdas"][max(known, key=lambda i: (marks[i], -i))] if known else None
    return found


def terminal(result: Mapping[str, Any]) -> Any:
    """The table for the terminal."""
    from rich.table import Table

    table = Table("", box=None, header_style="bold")
    for task in result["tasks"]:
        table.add_column(task["name"], justify="right")
    for name in ("mean", "of individual"):
        table.add_column(name, justify="right")
    for one in result["table"]:
        left = one["normalised_mean"]
        cells = [f"{value:.4f}" for value in one["scores"]]
        share = f"{left:.1%}" if left is not None and math.isfinite(left) else ""
        table.add_row(one["name"], *cells, f"{one['mean']:.4f}", share)
    return table


def said(result: Mapping[str, Any]) -> list[str]:
    """Sentences below the table."""
    lines = []
    swept = result.get("sweep")
    if swept:
        how = {"validation": "chosen on the validation split", "given": "as given"}
        lines.append(f"lam {swept['used']:g}, {how.get(swept['by'], 'the default')}")
    geometry = result.get("geometry")
    if geometry and not any(met for _, met, _ in geometry["tensors"]):
        lines.append(
            f"no entry is among the largest {geometry['k']:.0%} of two tasks: there are no signs "
            "to compare"
        )
    elif geometry:
        lines.append(
            f"signs differ on {geometry['disagreement']:.1%} of the entries that two tasks or "
            f"more keep (largest {geometry['k']:.0%} of each)"
        )
    return [*lines, *result.get("notes", [])]
