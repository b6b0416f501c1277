"""The section of a black-box search: candidates, step sizes, and what it cost and found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steppe.launch.report import figures
from steppe.launch.report.curves import Series, series, thin
from steppe.launch.report.facts import value_text
from steppe.launch.report.folder import RunFolder, mapping, number, sequence
from steppe.launch.report.svg import BOTTOM, RIGHT, TOP, WIDTH, Canvas, escape, fit, short

HEIGHT = 230.0


def search(run: RunFolder) -> str:
    """Figures and numbers of the search; empty for other runs."""
    given = mapping(run.results.get("search"))
    rows = [row for row in run.train if math.isfinite(number(row.get("sigma")))]
    if not given and not rows:
        return ""
    drawn = _figure(
        "Loss of the candidates",
        figures.curves(
            "Loss of the candidates over forward passes",
            series(rows, "loss"),
            {},
            second=series(rows, "mean_loss"),
        ),
        "By forward passes over the examples; the best of a generation, and in grey their mean",
    )
    drawn += _figure("Step size", sigmas(rows), "sigma; a line is the prompt of a layer")
    under = _said(given)
    facts = f'<p class="under">{escape(under)}</p>' if under else ""
    return f'<section><h2>Search</h2><div class="pair">{drawn}</div>{facts}</section>'


def sigmas(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The step size of every layer's search over forward passes."""
    lines: dict[int, Series] = {}
    for layer in sorted({int(number(row.get("layer"))) for row in rows if "layer" in row}):
        own = [row for row in rows if number(row.get("layer")) == layer]
        lines[layer] = thin(series(own, "sigma"))
    values = [float(v) for line in lines.values() for v in line.values if math.isfinite(v)]
    steps = [float(s) for line in lines.values() for s in line.steps]
    if not values:
        return None
    canvas = Canvas(HEIGHT, "Step size over forward passes")
    x = fit([0.0, *steps], 52.0, WIDTH - RIGHT, zero=True)
    y = fit(values, HEIGHT - BOTTOM, TOP)
    for tick in y.ticks(4):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 7, y(tick) + 4, short(tick), "end")
    for tick in x.ticks(5):
        canvas.text(x(tick), HEIGHT - BOTTOM + 18, short(tick), "middle")
    for layer, line in lines.items():
        ys = [y(v) if math.isfinite(v) else math.nan for v in line.values]
        canvas.curve([x(s) for s in line.steps], ys, "line accent")
        if len(line.steps) and math.isfinite(line.values[-1]):
            title = f"layer {layer + 1}: {line.values[-1]:.4g} at the end"
            canvas.circle(x(line.steps[-1]), ys[-1], 2.4, "dot accent", title=title)
    return canvas.render()


def _said(given: Mapping[str, Any]) -> str:
    """What was searched, in sentences."""
    parts = []
    shape = [number(v) for v in sequence(given.get("prompts"))]
    if len(shape) == 3 and all(map(math.isfinite, shape)):
        layers, length, width = (int(v) for v in shape)
        of = "one prompt" if layers == 1 else f"{layers} prompts"
        parts.append(f"{of.capitalize()} of {length} x {width} numbers in {given.get('rank')} "
                     "dimensions each.")  # fmt: skip
    calls = number(given.get("calls"))
    if math.isfinite(calls):
        parts.append(f"{calls:,.0f} forward passes over the examples, no gradient.")
    dev = mapping(given.get("dev"))
    if math.isfinite(number(dev.get("accuracy"))):
        accuracy = value_text("accuracy", number(dev["accuracy"]))
        at = number(given.get("chosen_at"))
        parts.append(
            f"The prompt was chosen at pass {at:,.0f} by its accuracy on the development examples, "
            f"{accuracy}."
        )
    if given.get("head"):
        parts.append(f"Scores of the classes: {given['head']}.")
    failed = number(given.get("failed"))
    if failed > 0:
        parts.append(f"{failed:,.0f} candidates had no loss and were never selected.")
    return " ".join(parts)


def _figure(title: str, drawing: str | None, under: str) -> str:
    if drawing is None:
        return ""
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3></figcaption>{drawing}"
        f'<p class="under">{escape(under)}</p></figure>'
    )
