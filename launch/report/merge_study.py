"""The page of a comparison of merging methods."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

from steppe.launch.merge import study_table
from steppe.launch.report import comparison
from steppe.launch.report.folder import mapping, number
from steppe.launch.report.svg import BOTTOM, RIGHT, TOP, WIDTH, Canvas, escape, fit, short

WHY = (
    f"All methods of a seed merge the same fine-tuned models. {study_table.SAW} The test split was "
    "seen by nothing."
)


def render(found: Mapping[str, Any]) -> str:
    """The whole page as text; depends on ``found`` only.

    Args:
      found: what is in table.json, see ``launch.merge.study_table.summary``.
    """
    page = resources.files("steppe.launch.report")
    body = [_header(found), _pictures(found), _table(found), comparison.how(found, WHY)]
    return Template(page.joinpath("page.html").read_text("utf-8")).substitute(
        title="merging · steppe",
        style=page.joinpath("style.css").read_text("utf-8").rstrip(),
        body="\n".join(part for part in body if part),
    )


def _header(found: Mapping[str, Any]) -> str:
    config = mapping(found.get("config"))
    facts = [
        str(mapping(config.get("base")).get("model", "")),
        f"{len(found['tasks'])} tasks",
        f"{len(config['seeds'])} seeds",
        f"{found['done']} of {found['of']} rows done",
    ]
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    name = escape(comparison.called(config))
    return (
        f'<header><p class="over">steppe compare merging</p><h1>{name}</h1>'
        f'<p class="lede">{lede}</p></header>'
    )


def _pictures(found: Mapping[str, Any]) -> str:
    arms, metric = found["arms"], found["metric"]
    merged = [arm for arm in arms if arm["name"] in found["config"]["methods"]]
    first = found["config"]["methods"][0]
    parts = [
        comparison.figure(
            f"Test {metric} by method, mean over the tasks",
            comparison.scores(arms, references=2),
            "A dot is a seed; the bar is the mean with its standard deviation",
        ),
        comparison.figure(
            f"The same less that of {first}, paired by seed",
            comparison.differences(merged),
            "Points of a percent with the 95% interval of the mean over seeds",
        ),
        comparison.figure(
            "Tasks", tasks(found), "Mean over seeds; a line is a method, dashed those of no merging"
        ),
    ]
    drawings = "".join(part for part in parts if part)
    return f'<section style="margin-top:36px"><div class="pair">{drawings}</div></section>'


def tasks(found: Mapping[str, Any]) -> str | None:
    """A line a method over the tasks."""
    shown = [arm for arm in found["arms"] if arm["seeds"]]
    if not shown:
        return None
    height = 260.0
    values = [100 * number(t["mean"]) for arm in shown for t in arm["tasks"]]
    y = fit(values, height - BOTTOM, TOP)
    canvas = Canvas(height, "Scores by task")
    left, right = 46.0, WIDTH - RIGHT - 12
    for tick in y.ticks(5):
        canvas.line(left, y(tick), right, y(tick), "grid")
        canvas.text(left - 7, y(tick) + 4, short(tick), "end")
    names = found["tasks"]
    places = [left + (right - left) * (i + 0.5) / len(names) for i in range(len(names))]
    for place, name in zip(places, names, strict=True):
        canvas.text(place, height - BOTTOM + 18, name[:12], "middle", title=name)
    for arm in shown:
        style = "accent" if arm["name"] in found["config"]["methods"] else "ink dashed"
        heights = [y(100 * number(t["mean"])) for t in arm["tasks"]]
        canvas.curve(places, heights, f"line {style}")
        for place, at, task in zip(places, heights, arm["tasks"], strict=True):
            title = f"{arm['name']}: {100 * number(task['mean']):.1f}"
            canvas.circle(place, at, 3, f"dot {style.split()[0]}", title=title)
    return canvas.render()


def _table(found: Mapping[str, Any]) -> str:
    body = study_table.rows(found)
    if not body:
        return ""
    notes = [f"{arm['name']}: {note}" for arm in found["arms"] for note in arm.get("notes", [])]
    under = "".join(f"<li>{escape(note)}</li>" for note in notes)
    said = f'<div class="notes"><ul>{under}</ul></div>' if notes else ""
    numbers = comparison.numbers(study_table.heads(found), body)
    return f"<section><h2>Numbers</h2>{numbers}{said}</section>"
