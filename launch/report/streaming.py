"""The page of ``steppe continual``: what is left of each task after those that came later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from steppe.launch.continual import table
from steppe.launch.report import comparison, touring_figures
from steppe.launch.report.folder import mapping, number
from steppe.launch.report.svg import BOTTOM, RIGHT, TOP, WIDTH, Axis, Canvas, escape, short

WHY = (
    "All methods of a seed see the same tasks in the same order and the same examples of them. "
    "After every task all tasks are scored on their test splits, which nothing was trained on or "
    "chosen by."
)
ROW = 24.0


def render(found: Mapping[str, Any]) -> str:
    """The whole page as text; depends on ``found`` only.

    Args:
      found: what is in results.json, see ``launch.continual.table.summary``.
    """
    page = resources.files("steppe.launch.report")
    body = [_header(found), _left(found), _matrices(found), _numbers(found)]
    body.append(comparison.how(found, WHY))
    return Template(page.joinpath("page.html").read_text("utf-8")).substitute(
        title="continual · steppe",
        style=page.joinpath("style.css").read_text("utf-8").rstrip(),
        body="\n".join(part for part in body if part),
    )


def means(row: Mapping[str, Any]) -> np.ndarray:
    """Accuracies [after task, of task], mean over the seeds of a method that has some."""
    return np.asarray(row["matrices"], np.float64).mean(0)


def _shown(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in found["methods"] if row["seeds"]]


def _header(found: Mapping[str, Any]) -> str:
    config = mapping(found.get("config"))
    facts = [
        str(config.get("model", "")),
        f"{len(found['tasks'])} tasks",
        f"{found['done']} of {found['of']} streams done",
    ]
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    title = escape(", then ".join(found["tasks"]))
    return (
        f'<header><p class="over">steppe continual</p><h1>{title}</h1>'
        f'<p class="lede">{lede}</p></header>'
    )


def _left(found: Mapping[str, Any]) -> str:
    drawn = comparison.figure(
        "What is left of each task",
        left(_shown(found), found["tasks"]),
        "Test accuracy: the grey dot just after the task was learnt, the other one after the last "
        "task; mean over seeds",
    )
    if not drawn:
        return ""
    return f'<section style="margin-top:36px"><div class="pair">{drawn}</div></section>'


def left(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """A line from the accuracy when learnt to that at the end, for every task and method."""
    if not rows:
        return None
    ends = []
    for row in rows:
        matrix = 100 * means(row)
        ends.append(list(zip(np.diagonal(matrix).tolist(), matrix[-1].tolist(), strict=True)))
    values = [v for own in ends for pair in own for v in pair if math.isfinite(v)]
    if not values:
        return None
    labels = [name for _ in rows for name in names]
    start = min(max(map(len, labels)), 24) * 6.3 + 14
    height = TOP + (ROW * len(names) + 26) * len(rows) + BOTTOM
    canvas = Canvas(height, "Accuracy of each task when it was learnt and at the end")
    room = 0.05 * (max(values) - min(values)) or 0.5
    x = Axis(min(values) - room, max(values) + room, start, WIDTH - RIGHT)
    for tick in x.ticks(5):
        canvas.line(x(tick), TOP, x(tick), height - BOTTOM, "grid")
        canvas.text(x(tick), height - BOTTOM + 18, short(tick), "middle")
    top = TOP
    for row, own in zip(rows, ends, strict=True):
        canvas.text(start, top + 14, row["name"], "start strong")
        top += 26
        for name, (first, last) in zip(names, own, strict=True):
            middle = top + ROW / 2
            label = name if len(name) <= 24 else name[:23] + "…"
            canvas.text(start - 8, middle + 4, label, "end", title=name)
            if math.isfinite(first) and math.isfinite(last):
                said = f"{row['name']}, {name}: {first:.1f} when learnt, {last:.1f} at the end"
                canvas.line(x(first), middle, x(last), middle, "line muted")
                canvas.circle(x(first), middle, 4, "dot muted", title=said)
                canvas.circle(x(last), middle, 4.5, "dot accent", title=said)
            top += ROW
    return canvas.render()


def _matrices(found: Mapping[str, Any]) -> str:
    rows = _shown(found)
    if not rows:
        return ""
    every = np.concatenate([means(row).ravel() for row in rows])
    known = every[np.isfinite(every)]
    scale = (float(known.min()), float(known.max())) if known.size else None
    names = found["tasks"]
    drawn = "".join(
        comparison.figure(
            row["name"],
            touring_figures.grid(
                f"Accuracy of every task after every task, {row['name']}",
                [f"after {name}" for name in names],
                names,
                means(row).tolist(),
                scale,
            ),
            f"Mean over {len(row['seeds'])} seed{'s' if len(row['seeds']) > 1 else ''}",
        )
        for row in rows
    )
    return f'<section><h2>After every task</h2><div class="pair">{drawn}</div></section>'


def _numbers(found: Mapping[str, Any]) -> str:
    heads, body = table.columns(found)
    if not body:
        return ""
    notes = []
    for row in _shown(found):
        cosines = [number(value) for value in row["cosines"]]
        if cosines:
            notes.append(
                f"{row['name']}: the subspaces of the tasks have a largest cosine of "
                f"{max(cosines):.2f}; 0 is orthogonal."
            )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    said = f'<div class="notes"><ul>{items}</ul></div>' if notes else ""
    return f"<section><h2>Numbers</h2>{comparison.numbers(heads, body)}{said}</section>"
