"""What a comparison of merging methods found: mean and spread over seeds, paired differences."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.launch import config as config_
from steppe.launch import machine
from steppe.launch.compare.table import probability, spread
from steppe.launch.merge.study_settings import REFERENCES, StudyConfig, short
from steppe.train.evaluate.paired import paired

SAW = (
    "Methods that adapt saw the inputs of the validation split and no label; a lam that was swept "
    "was chosen by that split's labels; fisher and regmean saw inputs of the training split; the "
    "others, and a lam that was given, saw neither split."
)
Rows = Mapping[tuple[int, str], Mapping[str, Any]]


def summary(config: StudyConfig, done: Rows, command: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the table and the report show; what is missing yet is left out."""
    arms = []
    first = config.methods[0]
    for name in config.rows():
        own = {s: done[s, name] for s in config.seeds if (s, name) in done}
        arm: dict[str, Any] = {"name": name, "seeds": list(own), "metrics": {}, "differences": {}}
        if own:
            rows = list(own.values())
            arm["metrics"] = {
                "accuracy": spread([row["test"]["mean"] for row in rows]),
                "normalised": spread([row["test"]["normalised_mean"] for row in rows]),
                "valid": spread([row["valid"]["mean"] for row in rows]),
                "merge_s": spread([row["merge_s"] for row in rows]),
            }
            per_task = zip(*(row["test"]["scores"] for row in rows), strict=True)
            arm["tasks"] = [spread(list(values)) for values in per_task]
            arm |= _told(rows)
        both = [s for s in own if (s, first) in done]
        if both and name not in (first, *REFERENCES):
            pairs = [[done[s, n]["test"]["mean"] for s in both] for n in (first, name)]
            arm["differences"] = {"accuracy": paired(*pairs)._asdict()}
        arms.append(arm)
    return {
        "command": list(command),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "config": config_.to_dict(config),
        "tasks": [short(address) for address in config.tasks],
        "metric": _metric(done),
        "done": sum(len(arm["seeds"]) for arm in arms),
        "of": len(config.rows()) * len(config.seeds),
        "arms": arms,
    }


def _told(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What learnt methods say beside their scores."""
    found: dict[str, Any] = {}
    for name in ("lam", "mask_rate"):
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = values
    entropies = [list(row["entropy"].values())[-1] for row in rows if row.get("entropy")]
    if entropies:
        found["entropy"] = [sum(ends) / len(ends) for ends in zip(*entropies, strict=True)]
    found["notes"] = list(dict.fromkeys(note for row in rows for note in row.get("notes", [])))
    return found


def _metric(done: Rows) -> str:
    """The score that the tasks have in common."""
    for row in done.values():
        kinds = row["test"]["metrics"].values()
        # Language models have an accuracy too, but perplexity stands for them.
        values = [metrics.get("accuracy") for metrics in kinds]
        if None not in values and sorted(values) == sorted(row["test"]["scores"]):
            return "accuracy"
    return "score"


def heads(found: Mapping[str, Any]) -> list[str]:
    """Heads of the table."""
    return [
        "method",
        *found["tasks"],
        "mean",
        "of individual",
        "valid",
        "difference (95%)",
        "p: t / signs",
    ]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for every method that has finished on a seed."""
    body = []
    for arm in found["arms"]:
        if not arm["seeds"]:
            continue
        metrics, over = arm["metrics"], arm["differences"].get("accuracy")
        cells = [_percent(task) for task in arm["tasks"]]
        cells += [_percent(metrics[name]) for name in ("accuracy", "normalised", "valid")]
        text, p = "", ""
        if over:
            text, p = f"{100 * over['difference']:+.1f}", f"{over['p_sign']:.2f}"
            if math.isfinite(over["low"]):
                text += f" ({100 * over['low']:+.1f} to {100 * over['high']:+.1f})"
            if math.isfinite(over["p_t"]):
                p = f"{probability(over['p_t'])} / {p}"
        body.append([name_of(arm), *cells, text, p])
    return body


def name_of(arm: Mapping[str, Any]) -> str:
    """A method with the coefficients that were chosen for it."""
    values = sorted({f"{value:g}" for value in arm.get("lam", [])})
    return arm["name"] + (f" (lam {', '.join(values)})" if values else "")


def _percent(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "n/a"
    text = f"{100 * found['mean']:.1f}"
    return text if found["std"] is None else f"{text} ± {100 * found['std']:.1f}"


def markdown(found: Mapping[str, Any]) -> str:
    """The table, with what it shows."""
    top = heads(found)
    lines = [
        f"Test {found['metric']}, %; mean ± standard deviation over seeds. valid: the mean on "
        f"the validation split. {SAW} Differences of the mean are to "
        f"{found['config']['methods'][0]}, paired by seed.",
        "",
        "| " + " | ".join(top) + " |",
        "|" + " --- |" * len(top),
        *("| " + " | ".join(row) + " |" for row in rows(found)),
    ]
    lines += [f"\n{arm['name']}: {note}" for arm in found["arms"] for note in arm.get("notes", [])]
    if found["done"] < found["of"]:
        lines.append(f"\n{found['done']} of {found['of']} rows are done.")
    return "\n".join(lines) + "\n"


def rich_table(found: Mapping[str, Any]) -> Any:
    """For the terminal: means over the tasks; the rest stands in table.md and the report."""
    from rich.table import Table

    top = heads(found)
    kept = [0, *(top.index(name) for name in ("mean", "of individual", "difference (95%)"))]
    table = Table(box=None, header_style="bold")
    table.add_column("", overflow="fold")  # the settings of a method can be long
    for index in kept[1:]:
        table.add_column(top[index], justify="right", no_wrap=True)
    for row in rows(found):
        table.add_row(*(row[index] for index in kept))
    return table


def command_of(folder: Path) -> list[str]:
    """The command that wrote a folder's table; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return list(json.loads((folder / "table.json").read_text("utf-8"))["command"])
    return []
