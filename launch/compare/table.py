"""What a comparison found: mean and spread over seeds, and tests against the first method.

Two questions are kept apart. Over *seeds*: would another head, order and draw of training
examples give the same difference? A paired t-test and all sign flips over the seeds. Over
*examples*: would another test set? A paired bootstrap of the test examples, each with the mean
over the seeds of being right; pooling seeds and examples as if all were independent would make
every difference look sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steppe.launch import config as config_
from steppe.launch import machine
from steppe.launch.compare import schedule
from steppe.launch.compare.journal import Journal, Trial
from steppe.launch.compare.settings import Arm, Cell, CompareConfig
from steppe.train.evaluate.paired import paired
from steppe.train.evaluate.significance import paired_bootstrap

# name in the table -> where a row of the journal has it
COLUMNS = {
    "accuracy": ("test", "accuracy"),
    "f1_macro": ("test", "f1_macro"),
    "loss": ("test", "loss"),
    "ece": ("test", "ece"),
    "brier": ("test", "brier"),
    "train_loss": ("train_loss",),
    "top_eigenvalue": ("curvature", "top_eigenvalue"),
    "ball_loss": ("curvature", "ball_loss"),
    "ball_gap": ("curvature", "ball_gap"),
    "train_s": ("train_s",),
    "trained": ("trained",),
}
RESAMPLES = 2000


def summary(config: CompareConfig, journal: Journal, command: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the table and the report show; what is missing yet is left out."""
    return {
        "command": list(command),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "config": config_.to_dict(config),
        "trials": len(journal.rows),
        "of": schedule.count(config),
        "cells": [_cell(config, cell, journal) for cell in config.cells()],
    }


def _cell(config: CompareConfig, cell: Cell, journal: Journal) -> dict[str, Any]:
    arms = config.arms()
    rows = {arm.name: _rows(config, cell, arm, journal) for arm in arms}
    out = []
    for arm in arms:
        own = rows[arm.name]
        found: dict[str, Any] = {
            "name": arm.name,
            "rho": schedule.choose(config, cell, arm, journal),
            "grid": _grid(config, cell, arm, journal),
            "seeds": list(own),
            "diverged": sum("diverged" in row for row in own.values()),
            "metrics": {},
            "differences": {},
        }
        for name in _names(own):
            values = {seed: _value(row, name) for seed, row in own.items()}
            found["metrics"][name] = spread(list(values.values()))
        if own:
            first = next(iter(own.values()))
            found |= {"steps": first["steps"], "gradients": first["gradients"]}
        if arm is not arms[0]:
            found["differences"] = _differences(rows[arms[0].name], own)
        out.append(found)
    return {**cell._asdict(), "per_class": config.per_class, "arms": out}


def _rows(
    config: CompareConfig, cell: Cell, arm: Arm, journal: Journal
) -> dict[int, dict[str, Any]]:
    rho = schedule.choose(config, cell, arm, journal)
    if rho is None:
        return {}
    found = {s: journal.get(Trial(cell, arm.name, rho, s, True)) for s in config.seeds}
    return {seed: row for seed, row in found.items() if row is not None}


def _names(rows: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Columns that any row has; transfer as ``transfer/SOURCE``, the accuracy there."""
    names = [n for n in COLUMNS if any(math.isfinite(_value(r, n)) for r in rows.values())]
    others = dict.fromkeys(s for row in rows.values() for s in row.get("transfer", {}))
    return names + [f"transfer/{source}" for source in others]


def _value(row: Mapping[str, Any], name: str) -> float:
    if name.startswith("transfer/"):
        place: Any = row.get("transfer", {}).get(name.removeprefix("transfer/"), {})
        place = place.get("accuracy")
    else:
        place = row
        for key in COLUMNS[name]:
            place = place.get(key) if isinstance(place, Mapping) else None
    return math.nan if place is None else float(place)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of the finite values; ``values`` has the others too."""
    good = [v for v in values if math.isfinite(v)]
    return {
        "mean": float(np.mean(good)) if good else None,
        "std": float(np.std(good, ddof=1)) if len(good) > 1 else None,
        "values": list(values),
    }


def _grid(config: CompareConfig, cell: Cell, arm: Arm, journal: Journal) -> list[dict[str, Any]]:
    """Validation scores of every radius, those of AdamW as rho 0; empty where none was chosen."""
    if not any(a.chooses for a in config.arms()) or (arm.grid and not arm.chooses):
        return []
    out = []
    for rho in arm.grid or (0.0,):
        found = schedule.validation(config, cell, arm, rho, journal)
        scores = [s for s in found if s is not None]
        if scores:
            worst = [0.0 if math.isnan(s) and config.select_by != "loss" else s for s in scores]
            out.append({"rho": rho, **spread(worst)})
    return out


def _differences(first: dict[int, Any], second: dict[int, Any]) -> dict[str, Any]:
    """Second less first of every column both have, over the seeds that both have."""
    seeds = [s for s in second if s in first]
    out: dict[str, Any] = {}
    if not seeds:
        return out
    for name in _names(second):
        a = [_value(first[s], name) for s in seeds]
        b = [_value(second[s], name) for s in seeds]
        good = [i for i in range(len(seeds)) if math.isfinite(a[i]) and math.isfinite(b[i])]
        if good:
            out[name] = paired([a[i] for i in good], [b[i] for i in good])._asdict()
    both = [s for s in seeds if "correct" in first[s] and "correct" in second[s]]
    if both:
        right = [
            np.mean([np.frombuffer(rows[s]["correct"].encode(), np.uint8) - 48 for s in both], 0)
            for rows in (first, second)
        ]
        over = paired_bootstrap(
            lambda p, _: float(np.mean(p)), np.zeros(len(right[0])), *right, samples=RESAMPLES
        )
        out["examples"] = over._asdict()
    return out


HEAD = {
    "accuracy": ("accuracy", 100, 1),
    "f1_macro": ("macro F1", 100, 1),
    "loss": ("NLL", 1, 3),
    "ece": ("ECE", 100, 1),
    "top_eigenvalue": ("top eigenvalue", 1, 1),
    "ball_loss": ("worst in ball", 1, 2),
    "train_loss": ("train loss", 1, 3),
    "train_s": ("train s", 1, 0),
    "trained": ("trained parameters", 1, 0),
}


def columns(cell: Mapping[str, Any]) -> list[str]:
    """Columns that the table of a cell has, in order."""
    have = dict.fromkeys(name for arm in cell["arms"] for name in arm["metrics"])
    shown = [name for name in HEAD if name in have]
    # Where all methods train the same parameters, their number says nothing.
    counts = {arm["metrics"].get("trained", {}).get("mean") for arm in cell["arms"]}
    if len(counts - {None}) < 2:
        shown = [name for name in shown if name != "trained"]
    return shown[:4] + [n for n in have if n.startswith("transfer/")] + shown[4:]


def heading(name: str) -> str:
    """A column's heading."""
    if name.startswith("transfer/"):
        return "on " + name.split("/", 1)[1].split(":", 1)[-1]
    return HEAD[name][0]


def number(name: str, found: Mapping[str, Any] | None) -> str:
    """``mean ± spread`` of a column as the table shows it; percentages without the sign."""
    if not found or found.get("mean") is None:
        return ""
    if name == "trained":
        return f"{found['mean']:,.0f}"
    _, scale, digits = HEAD.get(name, ("", 100, 1))
    text = f"{scale * found['mean']:.{digits}f}"
    if found.get("std") is not None:
        text += f" ± {scale * found['std']:.{digits}f}"
    values = found.get("values", ())
    good = sum(math.isfinite(v) for v in values)
    # Seeds without this number are often those where it would have been the largest.
    return text if good == len(values) else f"{text} ({good} of {len(values)})"


def title(cell: Mapping[str, Any]) -> str:
    """A cell in words."""
    size = f"{cell['size']:,} training examples" if cell["size"] else "all training examples"
    if cell.get("per_class"):
        size += " a class"
    noise = f", {cell['noise']:.0%} of the labels wrong" if cell["noise"] else ""
    return f"{cell['source'].split(':', 1)[-1]}, {size}{noise}"


def difference(arm: Mapping[str, Any]) -> list[str]:
    """Difference of the accuracy with its interval over seeds, p over seeds, p over examples."""
    over = arm["differences"].get("accuracy")
    if not over:
        return ["", "", ""]
    text = f"{100 * over['difference']:+.1f}"
    if math.isfinite(over["low"]):
        text += f" ({100 * over['low']:+.1f} to {100 * over['high']:+.1f})"
    seeds = f"{over['p_sign']:.2f}"
    if math.isfinite(over["p_t"]):
        seeds = f"{probability(over['p_t'])} / {seeds}"
    examples = arm["differences"].get("examples")
    return [text, seeds, probability(examples["p_value"]) if examples else ""]


def probability(p: float) -> str:
    """p in three digits."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


DIFFERENCE = ("difference (95%)", "p seeds: t / signs", "p examples")


def rows(cell: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a cell's table; arms without a finished trial are left out."""
    names = columns(cell)
    heads = ["method", "rho", "seeds", *map(heading, names), *DIFFERENCE]
    body = []
    for arm in cell["arms"]:
        if not arm["seeds"]:
            continue
        rho = f"{arm['rho']:g}" if arm["rho"] else ""
        count = str(len(arm["seeds"])) + (
            f" ({arm['diverged']} diverged)" if arm["diverged"] else ""
        )
        values = [number(name, arm["metrics"].get(name)) for name in names]
        body.append([arm["name"], rho, count, *values, *difference(arm)])
    return heads, body


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of all cells."""
    lines = [
        "Test split; mean ± standard deviation over seeds; percentages for accuracy, F1, ECE. "
        "Differences are to the first row, paired by seed.",
        "",
    ]
    for cell in found["cells"]:
        heads, body = rows(cell)
        if not body:
            continue
        lines += [f"### {title(cell)}", ""]
        lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
    if found["trials"] < found["of"]:
        lines.append(f"{found['trials']} of {found['of']} runs are done.")
    return "\n".join(lines).rstrip() + "\n"


def rich_table(found: Mapping[str, Any]) -> Any:
    """For the terminal: a table a cell."""
    from rich.console import Group
    from rich.table import Table

    tables: list[Any] = []
    for cell in found["cells"]:
        heads, body = rows(cell)
        if not body:
            continue
        shown = Table(title=title(cell), box=None, title_justify="left")
        # Methods side by side: a row of all numbers is wider than most terminals.
        for i, name in enumerate(("", *(row[0] for row in body))):
            shown.add_column(name, justify="left" if i == 0 else "right")
        for head, *values in list(zip(heads, *body))[1:]:
            shown.add_row(head, *values)
        tables.append(shown)
    if found["trials"] < found["of"]:
        tables.append(f"{found['trials']} of {found['of']} runs are done")
    return Group(*tables)
