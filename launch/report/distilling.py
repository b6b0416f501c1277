"""Sections of a distilled student: beside its teacher, and the KL by difficulty of the tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steppe.launch.report.facts import big, primary, value_text
from steppe.launch.report.folder import RunFolder, mapping, number, sequence
from steppe.launch.report.outcomes import task
from steppe.launch.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Canvas, escape, fit

HEIGHT = 230.0
_COUNTS = ("examples", "tokens", "generated")


def beside(run: RunFolder) -> str:
    """Scores, size and speed of student and teacher in one table; empty for other runs."""
    given = mapping(run.results.get("distillation"))
    if not given:
        return ""
    rows = _scores(run, given) + _sizes(given)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
        for name, *cells in rows
    )
    head = (
        "<thead><tr><th></th><th>student before</th><th>student</th><th>teacher</th></tr></thead>"
    )
    table = f'<table class="numbers">{head}<tbody>{body}</tbody></table>'
    under = f'<p class="under">{escape(_said(given))}</p>'
    return f"<section><h2>Student and teacher</h2>{table}{under}</section>"


def _scores(run: RunFolder, given: Mapping[str, Any]) -> list[tuple[str, ...]]:
    earlier = mapping(mapping(run.results.get("before")).get("test"))
    later = mapping(mapping(run.results.get("metrics")).get("test"))
    theirs = mapping(mapping(mapping(given.get("teacher")).get("metrics")).get("test"))
    kind, _ = task(run.results, run.predictions)
    first = primary(kind, later)
    names = [name for name in later if name not in _COUNTS]
    names.sort(key=lambda name: name != first)
    return [
        (
            f"test {name}".replace("_", " "),
            *(_value(name, side.get(name)) for side in (earlier, later, theirs)),
        )
        for name in names
    ]


def _value(name: str, value: Any) -> str:
    return value_text(name, number(value)) if math.isfinite(number(value)) else ""


def _sizes(given: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sizes, speed = mapping(given.get("sizes")), mapping(given.get("speed"))
    sides = [mapping(sizes.get(name)) for name in ("student", "teacher")]
    rows: list[tuple[str, ...]] = []
    counts = [number(side.get("parameters")) for side in sides]
    if all(map(math.isfinite, counts)):
        rows.append(("parameters", "", *map(big, counts)))
    held = [number(side.get("bytes")) for side in sides]
    if all(map(math.isfinite, held)):
        rows.append(("weights on disk", "", *(f"{n / 2**20:,.1f} MiB" for n in held)))
    times = [number(speed.get(f"{name}_s")) for name in ("student", "teacher")]
    if all(map(math.isfinite, times)):
        rows.append(("forward pass", "", *(f"{1e3 * t:,.2f} ms" for t in times)))
    return rows


def _said(given: Mapping[str, Any]) -> str:
    """What the numbers are of, in sentences."""
    parts = [f"{given.get('what', '')}."] if given.get("what") else []
    same = mapping(given.get("agreement"))
    if math.isfinite(number(same.get("top1"))):
        text = f"Both say the same for {number(same['top1']):.1%} of {big(number(same['items']))} "
        text += str(same.get("unit", "items"))
        bounds = [number(v) for v in sequence(same.get("interval"))]
        if len(bounds) == 2:
            text += f" (95% interval {bounds[0]:.1%} to {bounds[1]:.1%})"
        if math.isfinite(number(same.get("kl"))):
            text += f"; KL(teacher, student) {number(same['kl']):.4f} nats"
        parts.append(f"{text}.")
    bias = mapping(given.get("exposure"))
    if math.isfinite(number(bias.get("ex_acc_err"))):
        texts, length = (number(bias.get(name)) for name in ("texts", "length"))
        parts.append(
            f"Over {length:.0f} tokens of {texts:.0f} texts of its own its errors add up to "
            f"{number(bias['ex_acc_err']):.0f}% more than on the data's (ExAccErr)."
        )
    speed = mapping(given.get("speed"))
    ratio, low, high = (number(speed.get(name)) for name in ("ratio", "low", "high"))
    if math.isfinite(ratio):
        shape = " by ".join(str(n) for n in sequence(speed.get("shape")))
        parts.append(
            f"The student's forward pass is {ratio:.2f} times as fast ({low:.2f} to {high:.2f} in "
            f"{speed.get('rounds')} rounds in turn, {shape} tokens)."
        )
    return " ".join(parts)


def difficulty(run: RunFolder) -> str:
    """The parts of the KL over the teacher's uncertainty; empty where no texts are written."""
    given = mapping(mapping(run.results.get("distillation")).get("difficulty"))
    groups = [mapping(row) for row in sequence(given.get("groups"))]
    groups = [row for row in groups if math.isfinite(number(row.get("unc")))]
    if not groups:
        return ""
    figures = "".join(
        _figure(title, under, _bars(title, groups, key, style))
        for title, under, key, style in (
            ("TKD", "Between the label and everything else, nats a token", "tkd", "fill"),
            ("DKD", "Between the other tokens, nats a token", "dkd", "fill"),
            (
                "UNC",
                "The teacher's 1 - p of the label, which DKD has as its weight",
                "unc",
                "quiet",
            ),
            ("KL(teacher, student)", "TKD + UNC DKD, nats a token", "kl", "fill"),
        )
    )
    rows = [("easy", given.get("easy")), ("hard", given.get("hard")), ("all", given.get("all"))]
    return (
        "<section><h2>By difficulty of the token</h2>"
        f'<div class="pair">{figures}</div>{_table(rows)}'
        f'<p class="under">Test split. {len(groups)} groups of equally many tokens, from what the '
        "teacher is sure of (left) to what it is unsure of (right). Hard: the "
        f"{number(given.get('hard_ratio')):.0%} with the highest UNC.</p></section>"
    )


def _figure(title: str, under: str, drawing: str) -> str:
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3></figcaption>{drawing}"
        f'<p class="under">{escape(under)}</p></figure>'
    )


def _bars(title: str, groups: Sequence[Mapping[str, Any]], key: str, style: str) -> str:
    """One bar a group, from easy to hard."""
    values = [number(row.get(key)) for row in groups]
    x = Axis(0.0, float(len(groups)), LEFT, WIDTH - RIGHT)
    y = fit(values, HEIGHT - BOTTOM, TOP, zero=True)  # positions grow downwards
    canvas = Canvas(HEIGHT, f"{title} by difficulty of the token")
    for tick in y.ticks(4):
        canvas.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        canvas.text(LEFT - 7, y(tick) + 4, f"{tick:.3g}", "end")
    for place, (row, value) in enumerate(zip(groups, values, strict=True)):
        if not math.isfinite(value):
            continue
        count, unc = number(row.get("tokens")), number(row.get("unc"))
        title = f"{value:.4g} over {count:,.0f} tokens of mean UNC {unc:.3f}"
        left, right = x(place) + 2, x(place + 1) - 2
        canvas.rect(left, y(value), right - left, y.start - y(value), style, title=title)
    canvas.text(LEFT, y.start + 18, "easy", "start")
    canvas.text(WIDTH - RIGHT, y.start + 18, "hard", "end")
    return canvas.render()


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    names = ("tokens", "unc", "tkd", "dkd", "kl")
    head = "".join(f"<th>{name.upper() if name != 'tokens' else name}</th>" for name in names)
    body = ""
    for title, values in rows:
        cells = ""
        for name in names:
            value = number(mapping(values).get(name))
            text = "" if not math.isfinite(value) else _count(name, value)
            cells += f"<td>{escape(text)}</td>"
        body += f"<tr><th>{escape(title)}</th>{cells}</tr>"
    thead = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<table class="numbers">{thead}<tbody>{body}</tbody></table>'


def _count(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "tokens" else f"{value:.4f}"
