"""The page of ``steppe merge``: scores by task, the sweep, coefficients, mask, task vectors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from steppe.launch.report import surfaces
from steppe.launch.report.folder import mapping, number, sequence
from steppe.launch.report.sharpness import finite as finite
from steppe.launch.report.surfaces import STYLES, Line
from steppe.launch.report.svg import WIDTH, Canvas, escape

TALL = 16.0
# A coefficient a tensor is a table of so many rows at most; the heat map shows all.
LISTED = 400
LAYER = re.compile(r"(^|/)layers\.(\d+)/")
_STYLE = """
.wide { overflow-x: auto; }
.wide tbody th, .wide td { white-space: nowrap; }
figcaption .key.dashed::before {
  background: repeating-linear-gradient(90deg, currentColor 0 3px, transparent 3px 6px);
}
"""


def render(result: Mapping[str, Any]) -> str:
    """The whole page as text; depends on ``result`` only.

    Args:
      result: what is in merge.json, with NaN for null (see :func:`finite`).
    """
    parts = [
        _header(result),
        _scores(result),
        _sweep(result),
        _adaptation(result),
        _coefficients(result),
        _mask(result),
        _vectors(result),
        _how(result),
    ]
    page = resources.files("steppe.launch.report")
    return Template(page.joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(f"{result['method']} · steppe"),
        style=page.joinpath("style.css").read_text("utf-8").rstrip() + _STYLE.rstrip(),
        body="\n".join(part for part in parts if part),
    )


def _names(result: Mapping[str, Any]) -> list[str]:
    return [str(task["name"]) for task in result["tasks"]]


def _header(result: Mapping[str, Any]) -> str:
    names = _names(result)
    facts = [f"{len(names)} models into one", f"base {result['base']}"]
    adaptation = mapping(result.get("adaptation"))
    if adaptation:
        kind = ", transductive" if adaptation.get("transductive") else ""
        facts.append(f"adapted on unlabelled inputs of the {adaptation['on']} split{kind}")
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    strip = ""
    rows = sequence(result.get("table"))
    if rows:
        shown = [(row["name"], f"{number(row['mean']):.4f}") for row in rows]
        shown.append(("of individual", _share(rows[-1]["normalised_mean"])))
        cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown)
        strip = f'<dl class="strip">{"".join(cells)}</dl>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in sequence(result.get("notes")))
    box = f'<div class="notes"><b>To know</b><ul>{notes}</ul></div>' if notes else ""
    return (
        f'<header><p class="over">steppe merge</p><h1>{escape(result["method"])}</h1>'
        f'<p class="lede">{lede}</p>{box}</header>{strip}'
    )


def _scores(result: Mapping[str, Any]) -> str:
    rows = sequence(result.get("table"))
    if not rows:
        return ""
    heads = ["", *_names(result), "mean", "of individual"]
    under = [""] + [str(task.get("metric", "")) for task in result["tasks"]]
    body = [[*under, "", ""]]
    for row in rows:
        cells = [f"{number(v):.4f}" for v in row["scores"]]
        body.append(
            [row["name"], *cells, f"{number(row['mean']):.4f}", _share(row["normalised_mean"])]
        )
    merged = rows[-1]
    shares = [_share(value) for value in merged["normalised"]]
    body.append([f"{merged['name']}, of individual", *shares, "", ""])
    return (
        f"<section><h2>Scores on the test split</h2>{_table(heads, body)}"
        '<p class="under">Every task by its own head. Of individual: what is left of the score of '
        "the model that was fine-tuned on the task alone, averaged over tasks.</p></section>"
    )


def _sweep(result: Mapping[str, Any]) -> str:
    swept = mapping(result.get("sweep"))
    if not swept:
        return ""
    at = [number(v) for v in swept["lambdas"]]
    figures = _curves(result, swept, at) if len(set(at)) > 1 else ""
    heads = ["lam", "valid, mean", *(f"{n}, test" for n in _names(result)), "test, mean"]
    body = []
    for i, lam in enumerate(at):
        mark = " (used)" if lam == swept["used"] else ""
        test = swept["test"][i]
        cells = [f"{number(v):.4f}" for v in test["scores"]]
        mean = f"{number(swept['valid'][i]['mean']):.4f}"
        body.append([f"{lam:g}{mark}", mean, *cells, f"{number(test['mean']):.4f}"])
    how = {
        "validation": "It was chosen on the validation split",
        "given": "It was given",
    }.get(str(swept["by"]), "It is the default; labels had no part in it")
    return (
        f'<section><h2>Over the coefficient</h2><div class="pair">{figures}</div>'
        f'<div class="block" style="margin-top:32px">{_table(heads, body)}</div>'
        f'<p class="under">theta_0 + lam times the direction of the method; 0 is the base. {how}: '
        f"lam {number(swept['used']):g}.</p></section>"
    )


def _curves(result: Mapping[str, Any], swept: Mapping[str, Any], at: Sequence[float]) -> str:
    lines = [
        Line(split, at, [number(row["mean"]) for row in swept[split]])
        for split in ("valid", "test")
    ]
    drawn = surfaces.lines("Mean score over the coefficient", lines, dots=True)
    figures = figure("Mean score over the coefficient", drawn, ("valid", "test"))
    names = _names(result)[: len(STYLES)]
    each = [
        Line(name, at, [number(row["scores"][i]) for row in swept["test"]])
        for i, name in enumerate(names)
    ]
    figures += figure("Test score of each task", surfaces.lines("Scores", each, dots=True), names)
    return figures


def _adaptation(result: Mapping[str, Any]) -> str:
    curves = mapping(mapping(result.get("adaptation")).get("entropy"))
    names = _names(result)
    figures = ""
    for phase, found in curves.items():
        steps = [number(s) for s in found["steps"]]
        if len(steps) < 2:
            continue
        lines = [
            Line(name, steps, [number(row[i]) for row in found["tasks"]])
            for i, name in enumerate(names[: len(STYLES)])
        ]
        drawn = surfaces.lines(f"Entropy, {phase}", lines)
        figures += figure(f"Entropy while the {phase} learnt, nats", drawn, names)
    if not figures:
        return ""
    return (
        f'<section><h2>Adaptation</h2><div class="pair">{figures}</div><p class="under">Mean '
        "entropy of the answers to each task's unlabelled inputs. It falls where answers become "
        "certain, which is no proof that they become right.</p></section>"
    )


def _coefficients(result: Mapping[str, Any]) -> str:
    rows = sequence(result.get("coefficients"))
    if not rows:
        return ""
    names = _names(result)
    body = [[row["tensor"] or "all", *(f"{number(v):.4f}" for v in row["values"])] for row in rows]
    table = _table(["tensor", *names], body[:LISTED])
    if len(rows) == 1:
        return f"<section><h2>Coefficients</h2>{table}</section>"
    figures = ""
    every = [number(v) for row in rows for v in row["values"]]
    known = [v for v in every if math.isfinite(v)] or [0.0, 1.0]
    for i, name in enumerate(names):
        cells = {row["tensor"]: number(row["values"][i]) for row in rows}
        figures += figure(name, heat(f"Coefficients of {name}", cells, (min(known), max(known))))
    rest = f"<p>{len(rows) - LISTED} more in merge.json</p>" if len(rows) > LISTED else ""
    return (
        f'<section><h2>Coefficients</h2><div class="pair">{figures}</div>'
        f"<details><summary>All {len(rows)}</summary>{table}{rest}</details></section>"
    )


def _mask(result: Mapping[str, Any]) -> str:
    rows = sequence(result.get("mask"))
    if not rows:
        return ""
    drawn, rates = kept(rows)
    figures = figure("Mean of the mask that was drawn", heat("Density of the mask", drawn))
    figures += figure("Probability that an entry is kept", heat("Rate of the mask", rates))
    return (
        f'<section><h2>The mask</h2><div class="pair">{figures}</div><p class="under">By layer and '
        "tensor. One mask serves all tasks; what is left of a tensor is divided by the mean of its "
        "mask, so a low density concentrates the task vectors on fewer entries. It lies in "
        "mask.safetensors.</p></section>"
    )


def kept(rows: Sequence[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(share of each tensor that the drawn mask keeps, mean probability that an entry is kept)."""
    drawn, rates = (
        {row["tensor"]: number(row[name]) for row in rows} for name in ("density", "rate")
    )
    return drawn, rates


def _vectors(result: Mapping[str, Any]) -> str:
    found = mapping(result.get("geometry"))
    if not found:
        return ""
    names = _names(result)
    figures = figure("Cosines of the task vectors", matrix("Cosines", names, found["cosines"]))
    shares = {name: number(differ) / met for name, met, differ in found["tensors"] if met}
    share = number(found["disagreement"])
    if shares:
        figures += figure("Where signs differ", heat("Share of entries whose signs differ", shares))
    lengths = ", ".join(
        f"{name} {number(v):.4g}" for name, v in zip(names, found["norms"], strict=True)
    )
    most = f"{number(found['k']):.0%}"
    signs = (
        f"Of the entries that two tasks or more keep among the {most} largest of their vectors, "
        f"signs differ on {_share(share)}: there adding the vectors loses what the tasks have "
        "learnt."
    )
    if not shares:
        signs = f"No entry is among the {most} largest of two tasks: there are no signs to compare."
    return (
        f'<section><h2>The task vectors</h2><div class="pair">{figures}</div><p class="under">'
        f"Lengths: {escape(lengths)}. {signs}</p></section>"
    )


def _how(result: Mapping[str, Any]) -> str:
    blocks = ""
    if result.get("command"):
        said = escape(result["command"])
        blocks = f'<div class="block"><h3>Command</h3><pre>{said}</pre></div>'
    data = {
        task["name"]: f"{mapping(task.get('data')).get('source', 'no data')}"
        + (f" ({task['licence']})" if task.get("licence") else "")
        + (f", {mapping(task.get('examples')).get('test'):,} test" if task.get("examples") else "")
        for task in result["tasks"]
    }
    config = {k: v for k, v in mapping(result.get("config")).items() if v not in (None, "", [])}
    groups = [("Tasks", data), ("Settings", config), ("Timings", mapping(result.get("timings")))]
    groups += [("Hardware", mapping(result.get("hardware")))]
    groups += [("Versions", mapping(result.get("versions")))]
    for title, rows in groups:
        body = "".join(
            f"<tr><th>{escape(k)}</th><td>{escape(_plain(v))}</td></tr>" for k, v in rows.items()
        )
        if body:
            blocks += (
                f"<details><summary>{title}</summary>"
                f'<table class="plain"><tbody>{body}</tbody></table></details>'
            )
    return f"<section><h2>How it was made</h2>{blocks}</section>"


def heat(label: str, values: Mapping[str, float], scale: tuple[float, float] | None = None) -> str:
    """A value a tensor: layers across, kinds of tensor down; outside of layers one cell each.

    Args:
      values: name of the tensor (``layers.3/attn/q/kernel``) -> value.
      scale: values of the faintest and the strongest shade; default the least and the largest.
    """
    grid: dict[str, dict[int | None, float]] = {}
    for name, value in values.items():
        match = LAYER.search(name)
        kind = name if match is None else f"{name[: match.start()]}/{name[match.end() :]}"
        grid.setdefault(kind.lstrip("/"), {})[None if match is None else int(match[2])] = value
    known = [v for v in values.values() if math.isfinite(v)]
    low, high = scale or ((min(known), max(known)) if known else (0.0, 1.0))
    room = (high - low) or 1.0
    layers = 1 + max((n for row in grid.values() for n in row if n is not None), default=0)
    left = min(max((len(kind) for kind in grid), default=0), 30) * 6.4 + 12
    cell = min((WIDTH - left) / layers, 40.0)
    canvas = Canvas(TALL * len(grid) + 38, label)
    for i, (kind, row) in enumerate(grid.items()):
        top = TALL * i
        cut = kind if len(kind) <= 30 else "…" + kind[-29:]
        canvas.text(left - 8, top + TALL - 5, cut, "end", title=kind)
        for layer, value in row.items():
            at = (left + cell * (layer or 0), top, cell - 1, TALL - 1)
            canvas.rect(*at, "cell")
            if math.isfinite(value):
                where = "" if layer is None else f", layer {layer}"
                shade = 0.04 + 0.96 * min(max((value - low) / room, 0.0), 1.0)
                title = f"{kind}{where}: {value:.4g}"
                canvas.rect(*at, "fill", opacity=shade, title=title)
    bottom = TALL * len(grid) + 14
    step = max(1, math.ceil(16 / cell))
    for layer in range(0, layers, step):
        canvas.text(left + cell * (layer + 0.5) - 0.5, bottom, layer, "middle")
    canvas.text(left, bottom + 18, f"layer; shades from {low:.4g} to {high:.4g}", "start")
    return canvas.render()


def matrix(label: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A square of numbers; the shade is the absolute value."""
    count = len(names)
    left = min(max(map(len, names)) * 6.4, 120.0) + 14
    cell = min((WIDTH - left) / count, 76.0)
    tall = min(cell, 44.0)
    canvas = Canvas(tall * count + 8, label)
    for i, name in enumerate(names):
        cut = name if len(name) <= 19 else name[:18] + "…"
        canvas.text(left - 8, tall * (i + 0.5) + 4, cut, "end strong", title=name)
        for j, other in enumerate(names):
            value = number(values[i][j])
            at = (left + cell * j, tall * i, cell - 2, tall - 2)
            canvas.rect(*at, "cell")
            if not math.isfinite(value):
                continue
            weight = min(abs(value), 1.0)
            title = f"{name}, {other}: {value:.4f}"
            canvas.rect(*at, "fill", opacity=0.04 + 0.9 * weight, title=title)
            style = "middle on-fill" if weight > 0.5 else "middle strong"
            canvas.text(left + cell * (j + 0.5) - 1, tall * (i + 0.5) + 4, f"{value:.2f}", style)
    return canvas.render()


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(title: str, drawn: str, names: Sequence[str] = ()) -> str:
    """A drawing under its title, with a key of the lines' names."""
    keys = "".join(
        f'<span class="key {style}">{escape(name)}</span>'
        for name, style in zip(names, STYLES, strict=False)
    )
    return f"<figure><figcaption><h3>{escape(title)}</h3>{keys}</figcaption>{drawn}</figure>"


def _share(value: Any) -> str:
    return f"{number(value):.1%}" if math.isfinite(number(value)) else "unknown"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
