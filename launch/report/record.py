"""How the run can be repeated: command, data, versions, hardware, timings, configuration."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from steppe.launch.report.facts import big, duration, value_text
from steppe.launch.report.folder import RunFolder, mapping, number, sequence
from steppe.launch.report.svg import escape

VALUE_LIMIT = 300
ROW_LIMIT = 400


def record(run: RunFolder) -> str:
    """The section; empty when the run wrote down nothing."""
    results = run.results
    blocks = []
    command = results.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    if isinstance(command, str) and command:
        blocks.append(f'<div class="block"><h3>Command</h3><pre>{escape(command)}</pre></div>')
    table = _metrics(mapping(results.get("metrics")))
    if table:
        blocks.append(f'<div class="block"><h3>Metrics</h3>{table}</div>')
    timings = {
        name.removesuffix("_s").replace("_", " "): duration(number(value))
        for name, value in mapping(results.get("timings")).items()
        if math.isfinite(number(value))
    }
    small = [
        ("Data", _flat(results.get("data"))),
        ("Model", _flat(results.get("model"))),
        ("Optimiser", _flat(results.get("optimiser"))),
        ("Timings", timings),
        ("Hardware", _flat(results.get("hardware"))),
        ("Versions", _flat(results.get("versions"))),
        ("Compiled shapes", _shapes(results.get("shapes"))),
    ]
    tables = "".join(
        f'<section class="block"><h3>{title}</h3>{_table(rows)}</section>'
        for title, rows in small
        if rows
    )
    if tables:
        blocks.append(f'<div class="columns">{tables}</div>')
    config = _flat(run.config)
    if config:
        blocks.append(
            f"<details><summary>Configuration, {len(config)} settings</summary>"
            f"{_table(config)}</details>"
        )
    if not blocks:
        return ""
    return f"<section><h2>How it was made</h2>{''.join(blocks)}</section>"


def _metrics(metrics: Mapping[str, Any]) -> str:
    """All metrics of all splits, one row a metric."""
    splits = {str(name): mapping(values) for name, values in metrics.items()}
    rows = list(dict.fromkeys(key for values in splits.values() for key in values))
    if not rows:
        return ""
    head = "".join(f"<th>{escape(split)}</th>" for split in splits)
    body = ""
    for key in rows:
        cells = ""
        for values in splits.values():
            given = values.get(key, "")
            numeric = isinstance(given, (int, float)) and not isinstance(given, bool)
            text = value_text("", number(given)) if numeric else _text(given)
            cells += f"<td>{escape(text)}</td>"
        body += f"<tr><th>{escape(key)}</th>{cells}</tr>"
    thead = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<table class="numbers">{thead}<tbody>{body}</tbody></table>'


def _table(rows: Mapping[str, str]) -> str:
    shown = list(rows.items())[:ROW_LIMIT]
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in shown)
    if len(rows) > len(shown):
        body += f"<tr><th></th><td>and {len(rows) - len(shown)} more</td></tr>"
    return f'<table class="plain"><tbody>{body}</tbody></table>'


def _flat(tree: Any) -> dict[str, str]:
    return dict(_leaves(mapping(tree), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        text = ", ".join(_text(v) for v in value) or "none"
    else:
        text = str(value)
    return text if len(text) <= VALUE_LIMIT else text[: VALUE_LIMIT - 1] + "…"


def _shapes(shapes: Any) -> dict[str, str]:
    """Shapes of batches: (rows, tokens), (rows, tokens, tokens), or (rows, height, width, 3)."""
    found = {}
    for shape in sequence(shapes):
        sizes = [number(n) for n in sequence(shape)]
        if len(sizes) not in (2, 3, 4) or not all(map(math.isfinite, sizes)):
            continue
        name = " by ".join(str(int(n)) for n in sizes)
        if len(sizes) == 4:
            found[name] = f"{big(sizes[0])} images a batch"
        else:
            found[name] = f"{big(sizes[0] * sum(sizes[1:]))} tokens a batch"
    return found
