"""The page of a comparison: for every block of the table its scores by method, the differences
to the first method, what each radius did on the validation split, and the numbers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from steppe.launch.compare import table
from steppe.launch.report.folder import mapping, number, sequence
from steppe.launch.report.svg import BOTTOM, RIGHT, TOP, WIDTH, Axis, Canvas, escape, fit, short

ROW = 34.0
LONGEST = 26


def render(found: Mapping[str, Any]) -> str:
    """The whole page as text; depends on ``found`` only.

    Args:
      found: what is in table.json, see ``launch.compare.table.summary``.
    """
    cells = [cell for cell in sequence(found.get("cells")) if _begun(cell)]
    body = [_header(found, cells)]
    body += [_block(found, cell) for cell in cells]
    body.append(_record(found))
    page = resources.files("steppe.launch.report")
    return Template(page.joinpath("page.html").read_text("utf-8")).substitute(
        title="comparison · steppe",
        style=page.joinpath("style.css").read_text("utf-8").rstrip(),
        body="\n".join(part for part in body if part),
    )


def _begun(cell: Mapping[str, Any]) -> bool:
    return any(arm["seeds"] or arm["grid"] for arm in cell["arms"])


def _header(found: Mapping[str, Any], cells: Sequence[Any]) -> str:
    config = mapping(found.get("config"))
    base = mapping(config.get("base"))
    facts = [str(base.get("model", "")), f"{len(sequence(config.get('seeds')))} seeds"]
    facts.append(f"{found['trials']} of {found['of']} runs done")
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    out = f'<p class="over">steppe compare</p><h1>{escape(called(config))}</h1>'
    out += f'<p class="lede">{lede}</p>'
    rows = []
    for cell in cells:
        shown = [arm for arm in cell["arms"] if arm["differences"]]
        for place, arm in enumerate(shown):
            where = "" if place else table.title(cell)
            rows.append((where, arm["name"], *table.difference(arm)[:2]))
    if rows:
        first = cells[0]["arms"][0]["name"]
        body = "".join(
            f"<tr><th>{escape(where)}</th>"
            + "".join(f"<td>{escape(v)}</td>" for v in rest)
            + "</tr>"
            for where, *rest in rows
        )
        head = "".join(
            f"<th>{escape(h)}</th>"
            for h in ("", "method", f"accuracy less {first}'s", "p over seeds: t / signs")
        )
        out += (
            f'<div class="block" style="margin-top:36px"><table class="numbers">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return f"<header>{out}</header>"


def called(config: Mapping[str, Any]) -> str:
    """What a comparison is called: the last part of its folder."""
    return str(config.get("out") or "comparison").rstrip("/").rsplit("/", 1)[-1]


def _block(found: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    parts = [
        figure(
            "Test accuracy by method",
            scores(cell["arms"]),
            "A dot is a seed; the bar is the mean with its standard deviation",
        ),
        figure(
            f"Accuracy less that of {cell['arms'][0]['name']}, paired by seed",
            differences(cell["arms"]),
            "Points of a percent with the 95% interval of the mean over seeds",
        ),
    ]
    metric = str(mapping(found.get("config")).get("select_by", "accuracy")).replace("_", " ")
    drawn = grids(cell["arms"])
    for name, picture, chosen in drawn:
        parts.append(
            figure(
                f"{name}: validation {metric} over rho",
                picture,
                f"Dashed: without it. Ring: chosen, rho {chosen:g}"
                if chosen
                else "Dashed: without it",
            )
        )
    out = f"<h2>{escape(table.title(cell))}</h2>"
    out += f'<div class="pair">{"".join(p for p in parts if p)}</div>'
    out += _numbers(cell)
    return f"<section>{out}</section>"


def _numbers(cell: Mapping[str, Any]) -> str:
    """The block's table, turned: methods side by side, a row a number."""
    heads, rows = table.rows(cell)
    if not rows:
        return ""
    turned = list(zip(heads, *rows, strict=True))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *turned[0][1:]))
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(v)}</td>" for v in row[1:])
        + "</tr>"
        for row in turned[1:]
    )
    return (
        '<div class="block" style="margin-top:32px"><table class="numbers">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(title: str, picture: str | None, under: str = "") -> str:
    """A picture with title and a line below; nothing where there is no picture."""
    if picture is None:
        return ""
    below = f'<p class="under">{escape(under)}</p>' if under else ""
    return f"<figure><figcaption><h3>{escape(title)}</h3></figcaption>{picture}{below}</figure>"


def scores(arms: Sequence[Mapping[str, Any]], references: int = 1) -> str | None:
    """Accuracy of every seed of every method, with mean and standard deviation.

    The first ``references`` methods are those that the others are held against.
    """
    shown = [(a, mapping(a["metrics"].get("accuracy"))) for a in arms]
    shown = [(a, m) for a, m in shown if math.isfinite(number(m.get("mean")))]
    if not shown:
        return None
    values = [100 * v for _, m in shown for v in map(number, m["values"])]
    for _, metric in shown:
        mean, spread = 100 * number(metric["mean"]), 100 * number(metric.get("std"))
        values += [mean - spread, mean + spread]
    canvas, x = _rows("Test accuracy by method", [a["name"] for a, _ in shown], values)
    for i, (arm, metric) in enumerate(shown):
        middle = TOP + ROW * (i + 0.5)
        style = "ink" if i < references else "accent"
        mean, spread = 100 * number(metric["mean"]), 100 * number(metric.get("std"))
        if math.isfinite(spread):
            canvas.line(x(mean - spread), middle, x(mean + spread), middle, f"line {style}")
        title = f"{arm['name']}: mean {mean:.2f}%"
        canvas.rect(x(mean) - 1.5, middle - 9, 3, 18, _FILL[style], title=title)
        for seed, value in zip(arm["seeds"], map(number, metric["values"]), strict=False):
            if math.isfinite(value):
                title = f"{arm['name']}, seed {seed}: {100 * value:.2f}%"
                canvas.circle(x(100 * value), middle, 3, f"dot {style}", title=title)
    return canvas.render()


_FILL = {"ink": "quiet", "accent": "fill"}


def differences(arms: Sequence[Mapping[str, Any]]) -> str | None:
    """Mean difference of the accuracy to the first method with its interval, and zero."""
    shown = [(a["name"], mapping(mapping(a["differences"]).get("accuracy"))) for a in arms[1:]]
    shown = [(n, d) for n, d in shown if math.isfinite(number(d.get("difference")))]
    if not shown:
        return None
    ends = [100 * number(d.get(k)) for _, d in shown for k in ("difference", "low", "high")]
    # One pair of seeds has no interval; very few have one that would flatten the others.
    reach = max(abs(100 * number(d["difference"])) for _, d in shown) * 4 + 2
    values = [min(max(v, -reach), reach) for v in ends if math.isfinite(v)] + [0.0]
    canvas, x = _rows("Difference to the first method", [n for n, _ in shown], values)
    canvas.line(x(0), TOP, x(0), TOP + ROW * len(shown), "line ink dashed")
    for i, (name, found) in enumerate(shown):
        middle = TOP + ROW * (i + 0.5)
        mean, low, high = (100 * number(found.get(k)) for k in ("difference", "low", "high"))
        if math.isfinite(low) and math.isfinite(high):
            canvas.line(x(low), middle, x(high), middle, "line accent")
            # An interval that goes on beyond the figure has no end in it.
            for end in (e for e in (low, high) if x.low <= e <= x.high):
                canvas.line(x(end), middle - 4, x(end), middle + 4, "line accent")
        title = f"{name}: {mean:+.2f} ({low:+.2f} to {high:+.2f})"
        canvas.circle(x(mean), middle, 4, "dot accent", title=title)
    return canvas.render()


def _rows(label: str, names: Sequence[str], values: Sequence[float]) -> tuple[Canvas, Axis]:
    """A canvas with a row a name, and the axis of the values below."""
    left = min(max(map(len, names)), LONGEST) * 6.3 + 14
    height = TOP + ROW * len(names) + BOTTOM
    canvas = Canvas(height, label)
    bottom = height - BOTTOM
    known = [v for v in values if math.isfinite(v)]
    room = 0.05 * (max(known) - min(known)) or 0.5
    x = Axis(min(known) - room, max(known) + room, left, WIDTH - RIGHT)
    for tick in x.ticks(5):
        canvas.line(x(tick), TOP, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 18, short(tick), "middle")
    for i, name in enumerate(names):
        cut = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        canvas.text(left - 10, TOP + ROW * (i + 0.5) + 4, cut, "end strong", title=name)
    return canvas, x


def grids(arms: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float | None]]:
    """A figure a method: validation score over rho. The methods share the vertical axis.

    Returns:
      (method, figure, chosen rho or None) of every method with several radii.
    """
    curves = {a["name"]: a for a in arms if len(a["grid"]) > 1}
    marks = [a["grid"][0] for a in arms if len(a["grid"]) == 1 and a["grid"][0]["rho"] == 0]
    if not curves:
        return []
    every = [v for a in curves.values() for g in a["grid"] for v in map(number, g["values"])]
    every += [v for g in marks for v in map(number, g["values"])]
    height = 190.0
    y = fit([v for v in every if math.isfinite(v)], height - BOTTOM, TOP)
    out = []
    for name, arm in curves.items():
        radii = [g["rho"] for g in arm["grid"] if g["rho"] > 0]
        if not radii:
            continue
        x = Axis(min(radii) / 1.3, max(radii) * 1.3, 46.0, WIDTH - RIGHT, log=True)
        canvas = Canvas(height, f"{name}: validation score over rho")
        for tick in y.ticks(4):
            canvas.line(x.start, y(tick), x.end, y(tick), "grid")
            canvas.text(x.start - 7, y(tick) + 4, short(tick), "end")
        for mark in marks:
            if math.isfinite(number(mark.get("mean"))):
                level = y(number(mark["mean"]))
                canvas.line(x.start, level, x.end, level, "line ink dashed")
        points = [g for g in arm["grid"] if g["rho"] > 0]
        means = [number(g.get("mean")) for g in points]
        canvas.curve(
            [x(g["rho"]) for g in points],
            [y(m) if math.isfinite(m) else math.nan for m in means],
            "line accent",
        )
        for point, mean in zip(points, means, strict=True):
            at = x(point["rho"])
            canvas.text(at, height - BOTTOM + 18, f"{point['rho']:g}", "middle")
            for value in map(number, point["values"]):
                if math.isfinite(value):
                    canvas.circle(at, y(value), 2.2, "dot muted", title=f"{value:.4f}")
            if math.isfinite(mean):
                if point["rho"] == arm["rho"]:
                    canvas.circle(at, y(mean), 7, "line ink")
                canvas.circle(at, y(mean), 3.4, "dot accent", title=f"mean {mean:.4f}")
        out.append((name, canvas.render(), arm["rho"]))
    return out


def numbers(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is wider than the page."""
    head = "".join(
        f'<th style="white-space:nowrap">{escape(name)}</th>' for name in ("", *heads[1:])
    )
    lines = "".join(
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(value)}</td>" for value in row[1:])
        + "</tr>"
        for row in body
    )
    return (
        '<div class="block" style="overflow-x:auto"><table class="numbers">'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _record(found: Mapping[str, Any]) -> str:
    arms = [arm for cell in sequence(found.get("cells")) for arm in sequence(cell["arms"])]
    radius = (
        "rho was chosen for every method, source and size by its mean score on the validation "
        "split over seeds that are not reported"
        if any(len(arm["grid"]) > 1 for arm in arms)
        else "Every method had the one rho that it was given, so nothing was chosen"
    )
    note = (
        f"{radius}; the test split was scored once for each reported seed. All methods of a seed "
        "share the training examples, the initial head, the order of the batches and the dropout."
    )
    return how(found, note)


def how(found: Mapping[str, Any], note: str) -> str:
    """The last section: what was run on what."""
    blocks = ""
    command = [str(part) for part in sequence(found.get("command"))]
    if command:
        said = escape(shlex.join(command))
        blocks += f'<div class="block"><h3>Command</h3><pre>{said}</pre></div>'
    config = dict(_leaves(mapping(found.get("config")), ""))
    for title, rows in (
        ("Hardware", mapping(found.get("hardware"))),
        ("Versions", mapping(found.get("versions"))),
        ("Configuration", config),
    ):
        body = "".join(
            f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items()
        )
        if body:
            blocks += (
                f"<details><summary>{title}</summary>"
                f'<table class="plain"><tbody>{body}</tbody></table></details>'
            )
    return f'<section><h2>How it was made</h2><p class="lede">{note}</p>{blocks}</section>'


def _leaves(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    out = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _leaves(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            out.append((f"{prefix}{key}", shown))
    return out
