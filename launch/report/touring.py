"""The page of a tour: what every stage cost and gained, and whether it held what it promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from steppe.launch.report import merging, surfaces, touring_figures
from steppe.launch.report.folder import mapping, number, sequence
from steppe.launch.report.svg import escape
from steppe.launch.tour import claims, table
from steppe.launch.tour.stages import named

_STYLE = """
.wide { overflow-x: auto; }
.wide th, .wide td { white-space: nowrap; }
.wide table { font-size: 13px; }
.wide table.numbers th, .wide table.numbers td { padding-right: 10px; }
svg .tag { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.wide td:first-child, .wide th:first-child { padding-right: 12px; }
@media (max-width: 640px) {
  /* The names stay where the numbers scroll. */
  .wide tbody th:nth-child(2) {
    position: sticky; left: 0; background: var(--paper); min-width: 30vw; white-space: normal;
  }
}
tr.on th, tr.on td { font-weight: 650; }
tr.phase th { color: var(--accent); font-weight: 600; padding-top: 18px; }
svg .contour {
  fill: none; stroke: var(--ink); stroke-opacity: .35; stroke-width: .8; stroke-linecap: round;
}
.claims { list-style: none; }
.claims li { display: grid; grid-template-columns: 96px minmax(0, 1fr); gap: 2px 16px;
  padding: 12px 0; border-top: 1px solid var(--rule); }
.claims li:first-child { border-top: 0; padding-top: 0; }
.claims b { font-weight: 650; }
.claims .true { color: var(--accent); }
.claims .shown { color: var(--muted); }
.claims p { color: var(--muted); font-size: 13px; grid-column: 2; }
@media (max-width: 760px) { .claims li { grid-template-columns: 76px minmax(0, 1fr); } }
"""
PHASES = {
    "flat": "Fine-tuned: a model a task",
    "shared": "Merged into one, with a head a task",
    "small": "Distilled",
    "rounded": "In integers",
}
# Phases of the seconds: first words of the stages' names below the seed.
KINDS = {
    "fine-tuning": ("finetune",),
    "merging": ("merge",),
    "distilling": ("student",),
    "quantizing": ("quantize",),
    "scores": ("scores", "choice"),
    "flatness": ("flatness", "surface"),
    "export, latency": ("export", "costs"),
}


def render(found: Mapping[str, Any]) -> str:
    """The whole page as text; depends on ``found`` only.

    Args:
      found: what is in tour.json, with NaN for null (see ``sharpness.finite``).
    """
    parts = [
        _header(found),
        _fronts(found),
        _claims(found),
        _table(found),
        _surface(found),
        _mask(found),
        _domains(found),
        _answers(found),
        _cost(found),
        _how(found),
    ]
    page = resources.files("steppe.launch.report")
    return Template(page.joinpath("page.html").read_text("utf-8")).substitute(
        title=escape("tour · steppe"),
        style=page.joinpath("style.css").read_text("utf-8").rstrip() + _STYLE.rstrip(),
        body="\n".join(part for part in parts if part),
    )


def _chosen(found: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """The row of the table that was chosen: optimiser, merge or rounded."""
    key = str(found["choices"][what]["best"]).rpartition("/")[2]
    return next(row for row in found["rows"] if row["key"] == key)


def _header(found: Mapping[str, Any]) -> str:
    names = [str(task["name"]) for task in found["tasks"]]
    seeds = sequence(found["config"]["seeds"])
    first, last = _chosen(found, "optimiser"), _chosen(found, "rounded")
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    facts = [found["model"]["name"], ", ".join(names), count]
    facts.append(f"{_examples(found, 'train')} training texts")
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    held = sum(one["holds"] is True for one in found["claims"])
    shown = [
        ("accuracy", f"{_percent(first['test'])} → {_percent(last['test'])}"),
        ("megabytes", f"{_mb(first)} → {_mb(last)}"),
        ("ms a text", f"{number(first['ms']['1']):.1f} → {number(last['ms']['1']):.1f}"),
        ("claims that held", f"{held} of {len(found['claims'])}"),
        ("minutes", f"{number(found['seconds']['total']) / 60:.1f}"),
    ]
    strip = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown)
    title = f"{len(names)} tasks, one model of {_mb(last)} MB"
    return (
        f'<header><p class="over">steppe tour</p><h1>{escape(title)}</h1>'
        f'<p class="lede">{lede}</p></header><dl class="strip">{strip}</dl>'
        f'<p class="under">From the fine-tuned models, one a task '
        f"({escape(first['name'].split(',')[0])}), to what is handed out ({escape(last['name'])})."
        "</p>"
    )


def _examples(found: Mapping[str, Any], split: str) -> str:
    counts = [int(task["examples"][split]) for task in found["tasks"]]
    return " + ".join(f"{count:,}" for count in counts)


def _percent(value: Any) -> str:
    return f"{100 * number(value):.1f}"


def _mb(row: Mapping[str, Any]) -> str:
    size = number(row["bytes"]) / 1e6
    return f"{size:,.0f}" if size >= 10 else f"{size:.2g}"


def _fronts(found: Mapping[str, Any]) -> str:
    figures = ""
    for cost, title, unit in (
        ("bytes", "Accuracy against size", "megabytes on disk, of all tasks together"),
        ("ms", "Accuracy against latency", "milliseconds for one text, median"),
    ):
        drawn = touring_figures.pareto(title, touring_figures.points(found, cost), unit)
        figures += merging.figure(title, drawn)
    return (
        f'<section><h2>What it costs, what it gains</h2><div class="pair">{figures}</div>'
        '<p class="under">Mean test accuracy of the tasks in percent; the numbers are those of '
        "the table. Green: goes on to the next stage, chosen on the validation splits. The dashed "
        "line joins what nothing else is both better and cheaper than. A merged model is as fast "
        "as one fine-tuned model and serves all tasks.</p></section>"
    )


def _claims(found: Mapping[str, Any]) -> str:
    items = ""
    for one in found["claims"]:
        verdict = claims.verdict(one)
        style = {"true": "true", "not true": "not"}.get(verdict, "shown")
        items += (
            f'<li><b class="{style}">{verdict}</b><span>{escape(one["claim"])}: '
            f"{escape(one['said'])}</span><p>{escape(one['about'])}</p></li>"
        )
    seeds = len(sequence(found["config"]["seeds"]))
    how = (
        "A difference is true where the 95% interval of its mean over the seeds is above 0, not "
        "true where it is below, and not shown where it holds 0."
        if seeds > 1
        else "This is one seed, which has no spread: a difference of less than twice the standard "
        "error that so few test texts give is not shown, up or down. steppe tour --seeds 0 1 2 "
        "runs more."
    )
    return (
        f'<section><h2>What each stage promises</h2><ul class="claims">{items}</ul>'
        f'<p class="under">{escape(how)}</p></section>'
    )


def _table(found: Mapping[str, Any]) -> str:
    tasks = [str(task["name"]) for task in found["tasks"]]
    heads = ["", "", "mean", *tasks, "elsewhere", "ECE", "λ₁", "ball", "MB", "ms"]
    heads += ["MFLOPs", "Gbit-op", "seconds"]
    body, phase = "", ""
    for place, row in enumerate(found["rows"], 1):
        if row["phase"] != phase:
            phase = row["phase"]
            body += f'<tr class="phase"><th colspan="{len(heads)}">{PHASES[phase]}</th></tr>'
        cells = [table.spread(row), *(_percent(row["tasks"][name]) for name in tasks)]
        cells += [_text(row["further"], ".1f", 100), _text(row["ece"], ".1f", 100)]
        cells += [_text(row.get("top_eigenvalue"), ".0f"), _text(row.get("ball_gap"), ".2f")]
        cells += [_text(row["bytes"], ",.1f", 1e-6), _text(row["ms"]["1"], ".2f")]
        cells += [_text(row["flops"], ",.0f", 1e-6), _text(row["bit_operations"], ",.0f", 1e-9)]
        cells += [_text(row["seconds"], ",.0f")]
        mark = ' class="on"' if row["goes_on"] else ""
        texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr{mark}><th>{place}</th><th>{escape(row['name'])}</th>{texts}</tr>"
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    config = found["config"]
    return (
        '<section><h2>The stages</h2><div class="wide"><table class="numbers"><thead>'
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="under" style="max-width:80ch">Test accuracies in percent; elsewhere: mean over '
        "the data that was never trained on; ECE: expected calibration error in percent. "
        "λ₁ and ball: largest eigenvalue of the Hessian, and largest rise of the loss "
        f"within {number(config['ball']):g} of the weights, on {config['curvature']} training "
        "texts a task; a rounded model has steps in the place of slopes. MB: weights on disk, of "
        f"all tasks together. ms: one text of {config['data']['max_length']} tokens; MFLOPs of the "
        "same, heads and embeddings left out; Gbit-op: its multiply-adds times the bits of both, "
        "which stands for the energy. Seconds: its own making alone. Bold goes on.</p>"
        f"{_notes(found)}</section>"
    )


def _notes(found: Mapping[str, Any]) -> str:
    """What the methods of merging have to say of themselves."""
    said = "".join(f"<li>{escape(note)}</li>" for note in sequence(found.get("notes")))
    return f'<div class="notes"><b>To know</b><ul>{said}</ul></div>' if said else ""


def _text(value: Any, form: str, unit: float = 1.0) -> str:
    return table.number(number(value), form, unit)


def _surface(found: Mapping[str, Any]) -> str:
    held = mapping(found.get("surface"))
    planes = mapping(held.get("planes"))
    if not planes:
        return ""
    values = {name: np.asarray(one["losses"], np.float64) for name, one in planes.items()}
    marks = surfaces.levels(list(values.values()))
    figures = ""
    for name, losses in values.items():
        drawn = surfaces.plane(f"Loss around {named(name)}", planes[name]["at"], losses, marks)
        figures += merging.figure(named(name), drawn)
    return (
        f'<section><h2>The surface around {escape(held["task"])}</h2><div class="pair">{figures}'
        '</div><p class="under">Training loss along two random directions, each filter as long as '
        "the same filter of the weights; both models from the same side, with the same lines.</p>"
        "</section>"
    )


def _mask(found: Mapping[str, Any]) -> str:
    rows = sequence(found.get("mask"))
    if not rows:
        return ""
    drawn, rates = merging.kept(rows)
    figures = merging.figure("Mean of the mask that was drawn", merging.heat("Density", drawn))
    said = "The Concrete mask that serves all tasks, by tensor and layer."
    known = [rate for rate in rates.values() if math.isfinite(rate)]
    if known and max(known) - min(known) > 1e-3:
        figures += merging.figure("Probability that an entry is kept", merging.heat("Rate", rates))
    elif known:
        said += (
            f" Every entry is kept with a probability of {known[0]:.2f}: the mask is the one that "
            "it began with, since its guard saw the answers of a task collapse, and the shades "
            "are the noise of one draw."
        )
    return (
        f'<section><h2>The shared subspace</h2><div class="pair">{figures}'
        f'<p class="under">{said}</p></div></section>'
    )


def _domains(found: Mapping[str, Any]) -> str:
    tasks = [str(task["name"]) for task in found["tasks"]]
    optimiser = str(found["choices"]["optimiser"]["best"]).rpartition("/")[2]
    crossed = mapping(found["crossed"][optimiser])
    chain = [_chosen(found, "optimiser"), _chosen(found, "merge")]
    chain += [row for row in found["rows"] if row["phase"] == "small"]
    chain.append(_chosen(found, "rounded"))
    rows = [f"{name} alone" for name in tasks]
    values = [[number(crossed[name][other]) for other in tasks] for name in tasks]
    for row in chain[1:]:
        rows.append(_short(row))
        values.append([number(row["tasks"][name]) for name in tasks])
    title = f"Trunk of a row, head of a column ({named(optimiser)})"
    figures = merging.figure(title, touring_figures.grid(title, rows, tasks, values))
    places = [(task, other) for task in tasks for other in chain[0]["away"][task]]
    if places:
        columns = [f"{task} → {other}" for task, other in places]
        away = [[number(row["away"][task][other]) for row in chain] for task, other in places]
        heads = [_short(row) for row in chain]
        name = "Head of a task on other data"
        figures += merging.figure(name, touring_figures.grid(name, columns, heads, away))
    return (
        f'<section><h2>Across domains</h2><div class="pair">{figures}</div><p class="under">Test '
        "accuracy in percent. First: what the models of other tasks know of a task, with its head "
        "put on their trunks, above what serves all of them. Second: texts of a kind that was "
        "never trained on, by the heads whose classes have the same names.</p></section>"
    )


def _short(row: Mapping[str, Any]) -> str:
    """A row's name in a figure."""
    if row["phase"] == "flat":
        return str(row["name"]).partition(",")[0]
    return "student" if row["phase"] == "small" else str(row["key"])


def _answers(found: Mapping[str, Any]) -> str:
    rows = sequence(found["export"].get("texts"))
    if not rows:
        return ""
    tasks = [str(task["name"]) for task in found["tasks"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("text", *tasks))
    body = ""
    for row in rows:
        cells = ""
        for name in tasks:
            label, share = row["said"][name]
            text = f"{label} {number(share):.0%}"
            cells += f"<td>{'<b>' if name == row['task'] else ''}{escape(text)}"
            cells += f"{'</b>' if name == row['task'] else ''}</td>"
        said = str(row["text"])
        cut = said if len(said) <= 160 else said[:159] + "…"
        body += (
            f'<tr><td style="white-space:normal; min-width:220px">{escape(cut)}</td>{cells}</tr>'
        )
    integers = mapping(found["export"].get("integers"))
    return (
        '<section><h2>What the small model says</h2><div class="wide">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="under">Test texts of every task, answered by all heads of the packed model in '
        "one pass; bold: the task that the text is of. Multiplying integers, it differs from "
        f"itself in rounded floats by {number(integers.get('difference')):.1g} at most in a logit: "
        "an input that lies between two steps may be rounded to either.</p></section>"
    )


def _cost(found: Mapping[str, Any]) -> str:
    stages = mapping(found["seconds"]["stages"])
    phases = dict.fromkeys(KINDS, 0.0)
    for name, value in stages.items():
        kind = name.split("/")[1]
        phase = next(p for p, kinds in KINDS.items() if kind in kinds)
        phases[phase] += number(value)
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(found['hashes'][name])}</td>"
        f"<td>{number(value):,.1f}</td></tr>"
        for name, value in stages.items()
    )
    drawn = touring_figures.seconds("Seconds by phase", phases)
    return (
        f'<section><h2>What it cost</h2><div class="pair">{merging.figure("Seconds", drawn)}'
        '<p class="under">Every stage lies in a folder of its own, called by its settings and by '
        "what it depends on: another setting runs again what depends on it, and nothing "
        'else.</p></div><details><summary>All stages</summary><div class="wide">'
        '<table class="numbers"><thead><tr><th>stage</th><th>hash</th><th>seconds</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details></section>"
    )


def _how(found: Mapping[str, Any]) -> str:
    blocks = ""
    if found.get("command"):
        said = escape(found["command"])
        blocks = f'<div class="block"><h3>Command</h3><pre>{said}</pre></div>'
    data = {
        task["name"]: f"{task['source']}"
        + (f" ({task['licence']})" if task.get("licence") else "")
        + f", {task['examples']['test']:,} test"
        for task in found["tasks"]
    }
    config = {k: v for k, v in mapping(found["config"]).items() if not isinstance(v, Mapping)}
    config |= {f"data.{k}": v for k, v in mapping(found["config"]["data"]).items()}
    config |= {f"optim.{k}": v for k, v in mapping(found["config"]["optim"]).items()}
    kept = {k: v for k, v in config.items() if v not in (None, "", []) and v == v}  # no NaN
    groups: list[tuple[str, Mapping[str, Any]]] = [("Tasks", data), ("Settings", kept)]
    groups += [("Hardware", mapping(found.get("hardware")))]
    groups += [("Versions", mapping(found.get("versions")))]
    for title, rows in groups:
        body = "".join(
            f"<tr><th>{escape(k)}</th><td>{escape(_plain(v))}</td></tr>" for k, v in rows.items()
        )
        blocks += (
            f"<details><summary>{title}</summary>"
            f'<table class="plain"><tbody>{body}</tbody></table></details>'
        )
    return f"<section><h2>How it was made</h2>{blocks}</section>"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
