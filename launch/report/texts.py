"""Sections of language models: scores before and after the training, and what they write."""

from __future__ import annotations

import math
from typing import Any

from steppe.launch.report.facts import value_text
from steppe.launch.report.folder import RunFolder, mapping, number, sequence
from steppe.launch.report.svg import escape

SHOWN = 12
TEXT_LIMIT = 700


def before_and_after(run: RunFolder) -> str:
    """The metrics of every split before the training and after it; empty without the first."""
    earlier, later = mapping(run.results.get("before")), mapping(run.results.get("metrics"))
    rows = ""
    for split, values in earlier.items():
        for name, old in mapping(values).items():
            new = mapping(later.get(split)).get(name)
            if name in _COUNTS or not all(math.isfinite(number(v)) for v in (old, new)):
                continue
            cells = "".join(f"<td>{escape(value_text(name, number(v)))}</td>" for v in (old, new))
            rows += f"<tr><th>{escape(f'{split} {name}'.replace('_', ' '))}</th>{cells}</tr>"
    if not rows:
        return ""
    head = "<thead><tr><th></th><th>before</th><th>after</th></tr></thead>"
    table = f'<table class="numbers">{head}<tbody>{rows}</tbody></table>'
    return f"<section><h2>Before and after the training</h2>{table}</section>"


_COUNTS = ("examples", "tokens", "generated")


def written(run: RunFolder) -> str:
    """Texts of the sample, side by side: given, expected, before, after, the teacher's."""
    rows = [mapping(row) for row in sequence(run.results.get("samples"))][:SHOWN]
    rows = [row for row in rows if row]
    if not rows:
        return ""
    has_before = any(_text(row.get("before")) for row in rows)
    columns = [("source", "given"), ("reference", "expected")]
    columns += [("before", "before")] if has_before else []
    columns += [("after", "after" if has_before else "written")]
    columns += [("teacher", "teacher")] if any(_text(row.get("teacher")) for row in rows) else []
    head = "".join(f"<th>{name}</th>" for _, name in columns)
    body = ""
    for row in rows:
        cells = "".join(f'<td dir="auto">{escape(_text(row.get(key)))}</td>' for key, _ in columns)
        body += f"<tr>{cells}</tr>"
    table = f'<table class="texts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    under = '<p class="under">Greedy texts for examples of the test split.</p>'
    return f"<section><h2>What it writes</h2>{table}{under}</section>"


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1].rstrip() + "…"
