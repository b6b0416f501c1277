"""The page of a quantization: scores and sizes by row, error by layer, the games, the numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from steppe.launch.quantize import table
from steppe.launch.quantize.settings import GAMES
from steppe.launch.report import comparison
from steppe.launch.report.folder import mapping, number, sequence
from steppe.launch.report.svg import BOTTOM, RIGHT, TOP, WIDTH, Canvas, escape, fit, short

HOW = (
    "Every row starts from the same float model. Agreement is the share of test examples that get "
    "the float model's class; kernels are bytes of the packed integers and their steps over those "
    "of the float32 kernels that they replace; SQNR is the mean over kernels and layers. Forward "
    "passes were timed in turns in one process and are relative to the float model's."
)


def render(found: Mapping[str, Any], out: Path) -> str:
    """The whole page as text.

    Args:
      found: what is in quantize.json, see ``launch.quantize.table.summary``.
      out: the folder, whose games' metrics.jsonl are drawn.
    """
    page = resources.files("steppe.launch.report")
    noted = {**found, "command": str(found.get("command", "")).split()}
    body = [_header(found), _pictures(found, out), _numbers(found), _samples(found)]
    body.append(comparison.how(noted, HOW))
    return Template(page.joinpath("page.html").read_text("utf-8")).substitute(
        title="quantization · steppe",
        style=page.joinpath("style.css").read_text("utf-8").rstrip(),
        body="\n".join(part for part in body if part),
    )


def _header(found: Mapping[str, Any]) -> str:
    config = mapping(found.get("config"))
    facts = [str(config.get("model", "")), f"{len(found['rows'])} of {found['of']} rows done"]
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    return (
        '<header><p class="over">steppe quantize</p>'
        f"<h1>{escape(comparison.called(config))}</h1>"
        f'<p class="lede">{lede}</p></header>'
    )


def _pictures(found: Mapping[str, Any], out: Path) -> str:
    metric = found["metric"]
    parts = [
        comparison.figure(
            f"Test {metric} by row",
            scores(found),
            "A dot is a seed; the bar is the mean with its standard deviation",
        ),
        comparison.figure(
            f"{str(metric).capitalize()} against size",
            against_size(found),
            "Bytes of the packed kernels over those in float32",
        ),
        comparison.figure(
            "Signal to quantization noise of every kernel, dB",
            by_kernel(found),
            "In the order of the layers; a line is a row of the table",
        ),
    ]
    drawn = games(found, out)
    parts += [
        comparison.figure(title, picture, "Grey: on held-out noise, the present generator's")
        for title, picture in drawn
    ]
    drawings = "".join(part for part in parts if part)
    return f'<section style="margin-top:36px"><div class="pair">{drawings}</div></section>'


def scores(found: Mapping[str, Any]) -> str | None:
    """The metric of every row and seed beside the float model's."""
    metric = found["metric"]
    if metric not in ("accuracy", "f1"):
        return None
    value = mapping(mapping(found.get("float")).get("metrics")).get(metric)
    arms: list[dict[str, Any]] = [
        {"name": "float", "seeds": [0], "metrics": {"accuracy": {"mean": value, "values": [value]}}}
    ]
    for line in found["table"]:
        if "metric" in line:
            metrics = {"accuracy": line["metric"]}
            seeds = list(range(line["seeds"]))
            arms.append({"name": line["name"], "seeds": seeds, "metrics": metrics})
    return comparison.scores(arms)


def against_size(found: Mapping[str, Any]) -> str | None:
    """A point a row: share of the kernels' bytes, and the metric."""
    shown = [line for line in found["table"] if "metric" in line]
    plain = number(mapping(mapping(found.get("float")).get("metrics")).get(found["metric"]))
    if not shown or not math.isfinite(plain):
        return None
    height = 240.0
    canvas = Canvas(height, "metric against size")
    x = fit([line["share"] for line in shown] + [1.0], 52.0, WIDTH - RIGHT - 40, zero=True)
    values = [number(line["metric"]["mean"]) for line in shown]
    y = fit([*values, plain], height - BOTTOM, TOP)
    for tick in y.ticks(4):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 7, y(tick) + 4, short(tick), "end")
    for tick in x.ticks(5):
        canvas.text(x(tick), height - BOTTOM + 18, short(tick), "middle")
    canvas.line(x.start, y(plain), x.end, y(plain), "line ink dashed")
    canvas.circle(x(1.0), y(plain), 4, "dot ink", title=f"float: {plain:.4f}")
    for line, value in zip(shown, values, strict=True):
        if math.isfinite(value):
            title = f"{line['name']}: {value:.4f} at {line['share']:.3f}"
            canvas.circle(x(line["share"]), y(value), 4, "dot accent", title=title)
    return canvas.render()


def by_kernel(found: Mapping[str, Any]) -> str | None:
    """SQNR over the kernels, layer by layer; of the first seed of every row."""
    rows = {f"{row['bits']} {row['method']}": row["errors"] for row in reversed(found["rows"])}
    rows = {name: errors for name, errors in rows.items() if errors}
    if not rows:
        return None
    names = sorted(next(iter(rows.values())), key=_place)
    height = 240.0
    canvas = Canvas(height, "SQNR of every kernel")
    every = [number(e["sqnr"]) for errors in rows.values() for e in errors.values()]
    y = fit([v for v in every if math.isfinite(v)], height - BOTTOM, TOP)
    left, right = 46.0, WIDTH - RIGHT
    for tick in y.ticks(5):
        canvas.line(left, y(tick), right, y(tick), "grid")
        canvas.text(left - 7, y(tick) + 4, short(tick), "end")
    step = (right - left) / max(len(names), 1)
    canvas.text(left, height - BOTTOM + 18, "first layer", "start")
    canvas.text(right, height - BOTTOM + 18, "last", "end")
    for name, errors in rows.items():
        points = [number(mapping(errors.get(kernel)).get("sqnr")) for kernel in names]
        places = [left + step * (i + 0.5) for i in range(len(names))]
        canvas.curve(
            places, [y(p) if math.isfinite(p) else math.nan for p in points], "line accent"
        )
        for place, point, kernel in zip(places, points, names, strict=True):
            if math.isfinite(point):
                title = f"{name}, {kernel}: {point:.1f} dB"
                canvas.circle(place, y(point), 1.8, "dot accent", title=title)
    return canvas.render()


def _place(kernel: str) -> tuple[int, str]:
    layer = re.search(r"layers\.(\d+)", kernel)
    return (int(layer[1]) if layer else -1, kernel)


def games(found: Mapping[str, Any], out: Path) -> list[tuple[str, str | None]]:
    """(title, curves of the loss and of the divergence on held-out noise) of what learns."""
    drawn: list[tuple[str, str | None]] = []
    for row in found["rows"]:
        file = out / f"{row['folder']}-game" / "metrics.jsonl"
        if not file.is_file():
            continue
        steps, losses, looks, held = [], [], [], []
        for line in file.read_text("utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if math.isfinite(number(values.get("loss"))):
                steps.append(number(values.get("step")))
                losses.append(number(values["loss"]))
            if math.isfinite(number(values.get("held_out"))):
                looks.append(number(values.get("step")))
                held.append(number(values["held_out"]))
        if len(steps) > 1:
            what = "f over the game" if row["method"] in GAMES else "training loss"
            title = f"{row['bits']} {row['method']}, seed {row['seed']}: {what}"
            drawn.append((title, _curves(steps, losses, looks, held, what)))
    return drawn


def _curves(
    steps: Sequence[float],
    losses: Sequence[float],
    looks: Sequence[float],
    held: Sequence[float],
    what: str,
) -> str:
    height = 200.0
    canvas = Canvas(height, what)
    x = fit([0.0, *steps], 52.0, WIDTH - RIGHT, zero=True)
    y = fit([*losses, *held], height - BOTTOM, TOP)
    for tick in y.ticks(4):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 7, y(tick) + 4, short(tick), "end")
    for tick in x.ticks(5):
        canvas.text(x(tick), height - BOTTOM + 18, short(tick), "middle")
    canvas.curve([x(s) for s in steps], [y(v) for v in losses], "line accent")
    if len(looks) > 1:
        canvas.curve([x(s) for s in looks], [y(v) for v in held], "line ink dashed")
    return canvas.render()


def _numbers(found: Mapping[str, Any]) -> str:
    body = table.lines(found)
    if not body:
        return ""
    return f"<section><h2>Numbers</h2>{comparison.numbers(table.heads(found), body)}</section>"


def _samples(found: Mapping[str, Any]) -> str:
    """The nearest words of what the generators made."""
    blocks = ""
    for row in found["rows"]:
        texts = sequence(row.get("samples"))
        if texts:
            name = f"{row['bits']} {row['method']}, seed {row['seed']}"
            items = "".join(f"<li>{escape(text)}</li>" for text in texts)
            blocks += f'<div class="block"><h3>{escape(name)}</h3><ul>{items}</ul></div>'
    if not blocks:
        return ""
    lede = "The nearest words of the embeddings that the generators made at the end."
    return f'<section><h2>What was made</h2><p class="lede">{lede}</p>{blocks}</section>'
