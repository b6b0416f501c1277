"""The figures of a tour: accuracy against what a model costs, accuracies as a grid, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steppe.launch.report.figures import clip
from steppe.launch.report.folder import number
from steppe.launch.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Canvas, fit, short

HEIGHT = 300.0
# Room between the numbers beside the dots, from a dot to its number, and what a number takes.
APART, ASIDE, BROAD = 12.0, 8.0, 30.0
# Dots so near that they look like one have one tag.
SAME = 1.5
# Bars of the phases.
TALL = 26.0


class Point(NamedTuple):
    """One model.

    Attributes:
      number: beside its dot, and in the table.
      name: for the text that shows on hovering.
      cost, value: positions; less and more are better.
      style: accent (goes on), ink or muted.
    """

    number: int
    name: str
    cost: float
    value: float
    style: str


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in both, and better in one, by cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.value)):
        if not found or point.value > found[-1].value:
            found.append(point)
    return found


def pareto(label: str, points: Sequence[Point], unit: str) -> str:
    """Accuracy in percent over a cost; the line joins what nothing else is better than in both.

    Args:
      unit: of the costs, below the axis.
    """
    known = [p for p in points if math.isfinite(p.cost) and math.isfinite(p.value)]
    canvas = Canvas(HEIGHT + 16, label)
    if not known:
        return canvas.render()
    x = fit([p.cost for p in known], LEFT, WIDTH - RIGHT - 26)
    low, high = min(p.cost for p in known), max(p.cost for p in known)
    if high / low > 8:  # sizes differ by factors
        x = Axis(low / 1.25, high * 1.25, LEFT, WIDTH - RIGHT - 26, log=True)
    y = fit([p.value for p in known], HEIGHT - BOTTOM, TOP)
    canvas.axes(x, y)
    canvas.text((x.start + x.end) / 2, HEIGHT + 8, unit, "middle")
    best = frontier(known)
    steps: list[tuple[float, float]] = []
    for point in best:
        if steps:
            steps.append((x(point.cost), steps[-1][1]))
        steps.append((x(point.cost), y(point.value)))
    if len(best) > 1:
        canvas.curve([s[0] for s in steps], [s[1] for s in steps], "line muted dashed")
    for point in known:
        title = f"{point.number}. {point.name}: {point.value:.1f}% at {short(point.cost)}"
        radius = 5 if point.style == "accent" else 4
        canvas.circle(x(point.cost), y(point.value), radius, f"dot {point.style}", title=title)
    for tag in tags(known, x, y):
        if tag.style.startswith("start") and abs(tag.y - tag.dot) > 3:
            canvas.line(tag.x - ASIDE + 4, tag.dot, tag.x - 1, tag.y, "grid")
        canvas.text(tag.x, tag.y + 4, tag.text, tag.style + " tag")
    return canvas.render()


class Tag(NamedTuple):
    """The numbers of one or several dots.

    Attributes:
      x, y: where the text stands; dot: height of the dot.
      style: anchor, and whether it goes on.
    """

    text: str
    x: float
    y: float
    dot: float
    style: str


def tags(points: Sequence[Point], x: Axis, y: Axis) -> list[Tag]:
    """Numbers at the right of their dots, moved apart where these lie close together, and above
    where another dot is in the way."""
    clusters: list[list[Point]] = []
    for point in points:
        at = (x(point.cost), y(point.value))
        for cluster in clusters:
            if math.dist(at, (x(cluster[0].cost), y(cluster[0].value))) < SAME:
                cluster.append(point)
                break
        else:
            clusters.append([point])
    columns: dict[int, list[list[Point]]] = {}
    for cluster in clusters:
        columns.setdefault(round(x(cluster[0].cost) / 6), []).append(cluster)
    dots = [(x(c[0].cost), y(c[0].value)) for c in clusters]
    out: list[Tag] = []
    for column in columns.values():
        inside = sorted(column, key=lambda c: (y(c[0].value), c[0].number))
        heights = [y(c[0].value) for c in inside]
        wanted = sum(heights) / len(heights)
        for n in range(1, len(heights)):
            heights[n] = max(heights[n], heights[n - 1] + APART)
        # Half of what they were moved back up, as far as there is room.
        shift = max(min(wanted - sum(heights) / len(heights), 0.0), TOP - heights[0])
        for cluster, height in zip(inside, heights, strict=True):
            across, dot = x(cluster[0].cost), y(cluster[0].value)
            text = ", ".join(str(p.number) for p in cluster)
            strong = " strong" if any(p.style == "accent" for p in cluster) else ""
            blocked = any(2 < a - across < BROAD and abs(b - dot) < APART for a, b in dots)
            if blocked:
                out.append(Tag(text, across, dot - 12, dot, "middle" + strong))
            else:
                out.append(Tag(text, across + ASIDE, height + shift, dot, "start" + strong))
    return out


def grid(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    scale: tuple[float, float] | None = None,
) -> str:
    """Accuracies [rows, columns] in percent; the shade is from the least to the largest, or
    along ``scale`` where several grids are compared."""
    known = [v for row in values for v in row if math.isfinite(v)]
    low, high = scale or ((min(known), max(known)) if known else (0.0, 1.0))
    room = (high - low) or 1.0
    left = min(max(map(len, rows)) * 6.4, 132.0) + 12
    cell = min((WIDTH - left) / len(columns), 84.0)
    tall, top = 34.0, 22.0
    canvas = Canvas(top + tall * len(rows) + 4, label)
    fits = max(int(cell / 6.2), 3)
    for j, name in enumerate(columns):
        canvas.text(left + cell * (j + 0.5) - 1, 12, clip(name, fits), "middle strong", title=name)
    for i, name in enumerate(rows):
        middle = top + tall * (i + 0.5) + 4
        canvas.text(left - 8, middle, clip(name, int(left / 6.2)), "end strong", title=name)
        for j, column in enumerate(columns):
            at = (left + cell * j, top + tall * i, cell - 2, tall - 2)
            value = values[i][j]
            canvas.rect(*at, "cell")
            if not math.isfinite(value):
                continue
            weight = (value - low) / room
            title = f"{name}, {column}: {value:.1%}"
            canvas.rect(*at, "fill", opacity=0.05 + 0.85 * weight, title=title)
            style = "middle on-fill" if weight > 0.55 else "middle strong"
            canvas.text(at[0] + cell / 2 - 1, middle, f"{100 * value:.1f}", style)
    return canvas.render()


def seconds(label: str, phases: Mapping[str, float]) -> str:
    """A bar a phase, as long as its share of the time."""
    total = sum(phases.values()) or 1.0
    longest = max(phases.values()) or 1.0
    left, right = 132.0, 96.0
    canvas = Canvas(TALL * len(phases) + 2, label)
    for i, (name, value) in enumerate(phases.items()):
        top = TALL * i
        canvas.text(left - 8, top + 16, name, "end strong")
        width = (WIDTH - left - right) * value / longest
        canvas.rect(left, top + 3, width, TALL - 8, "fill", opacity=0.75, title=name)
        canvas.text(left + width + 6, top + 16, f"{value:,.0f} s, {value / total:.0%}", "start")
    return canvas.render()


def points(found: Mapping[str, Any], cost: str) -> list[Point]:
    """Every row of the table over ``bytes`` (in MB) or ``ms`` (of one text)."""
    out = []
    for place, row in enumerate(found["rows"], 1):
        spent = number(row["bytes"]) / 1e6 if cost == "bytes" else number(row["ms"]["1"])
        style = "accent" if row["goes_on"] else "ink" if row["phase"] != "shared" else "muted"
        out.append(Point(place, row["name"], spent, 100 * number(row["test"]), style))
    return out
