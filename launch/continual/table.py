"""results.json and table.md of ``steppe continual``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steppe.launch import config as config_
from steppe.launch import machine
from steppe.launch.compare.table import spread
from steppe.launch.continual.settings import ContinualConfig, short
from steppe.train import continual

# (method, seed, number of the task) -> row of stages.jsonl
Rows = Mapping[tuple[str, int, int], Mapping[str, Any]]
SCORES = {
    "average_accuracy": "average",
    "learning_accuracy": "when learnt",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
}


def summary(config: ContinualConfig, rows: Rows, command: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the table shows; streams that are not complete are left out."""
    names = [short(address) for address in config.tasks]
    methods = []
    for method in config.method:
        found: dict[str, Any] = {"name": method, "seeds": [], "matrices": [], "cosines": []}
        seconds = []
        for seed in config.seeds:
            own = [rows.get((method, seed, number)) for number in range(len(names))]
            done = [row for row in own if row is not None]
            if len(done) < len(names):
                continue
            found["seeds"].append(seed)
            found["matrices"].append([row["accuracy"] for row in done])
            seconds.append(sum(row["train_s"] for row in done))
            found["cosines"] += [row["cosine"] for row in done if "cosine" in row][-1:]
        matrices = [continual.continual_matrix(m) for m in found["matrices"]]
        found["metrics"] = {
            name: spread([getattr(continual, name)(matrix) for matrix in matrices])
            for name in SCORES
        } | {"train_s": spread(seconds)}
        found["final"] = [
            spread([float(matrix[-1, number]) for matrix in matrices])
            for number in range(len(names))
        ]
        methods.append(found)
    return {
        "command": list(command),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "config": config_.to_dict(config),
        "tasks": names,
        "done": sum(len(found["seeds"]) for found in methods),
        "of": len(config.method) * len(config.seeds),
        "methods": methods,
    }


def columns(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows; methods without a complete stream are left out."""
    heads = ["method", "seeds", *found["tasks"], *SCORES.values(), "train s"]
    body = []
    for row in found["methods"]:
        if not row["seeds"]:
            continue
        values = [_shown(value) for value in row["final"]]
        values += [_shown(row["metrics"][name]) for name in SCORES]
        body.append(
            [row["name"], str(len(row["seeds"])), *values, _shown(row["metrics"]["train_s"], 1, 0)]
        )
    return heads, body


def _shown(found: Mapping[str, Any], scale: float = 100.0, digits: int = 1) -> str:
    if found["mean"] is None or not math.isfinite(found["mean"]):
        return ""
    text = f"{scale * found['mean']:.{digits}f}"
    return text if found["std"] is None else f"{text} ± {scale * found['std']:.{digits}f}"


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and for each stream the accuracy on every task after each task."""
    heads, body = columns(found)
    lines = [
        "Test accuracy in per cent: of every task after the last one, their average, the average "
        "of each just after it was learnt, backward transfer and forgetting. Mean ± standard "
        "deviation over seeds.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
        *("| " + " | ".join(row) + " |" for row in body),
        "",
    ]
    for row in found["methods"]:
        for seed, matrix in zip(row["seeds"], row["matrices"], strict=True):
            lines += [f"### {row['name']}, seed {seed}", ""]
            lines += ["| after | " + " | ".join(found["tasks"]) + " |"]
            lines += ["|" + " --- |" * (len(found["tasks"]) + 1)]
            for name, accuracies in zip(found["tasks"], matrix, strict=True):
                lines.append(
                    f"| {name} | " + " | ".join(f"{100 * a:.1f}" for a in accuracies) + " |"
                )
            lines.append("")
    if found["done"] < found["of"]:
        lines.append(f"{found['done']} of {found['of']} streams are done.")
    return "\n".join(lines).rstrip() + "\n"


def rich_table(found: Mapping[str, Any]) -> Any:
    """For the terminal: methods side by side."""
    from rich.table import Table

    heads, body = columns(found)
    shown = Table(title=", then ".join(found["tasks"]), box=None, title_justify="left")
    for number, name in enumerate(("", *(row[0] for row in body))):
        shown.add_column(name, justify="left" if number == 0 else "right")
    for head, *values in list(zip(heads, *body))[1:]:
        shown.add_row(head, *values)
    return shown
