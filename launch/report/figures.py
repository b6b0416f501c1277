"""The figures of the report, each a pure function from numbers to SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from steppe.launch.report.curves import Series, band, smooth, thin
from steppe.launch.report.outcomes import Calibration, Confusion
from steppe.launch.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Canvas, fit, short

HEIGHT = 230.0
MAX_DOTS = 1200


def curves(
    label: str,
    train: Series | None,
    evals: Mapping[str, Series],
    *,
    zero: bool = False,
    smoothed: bool = True,
    second: Series | None = None,
    robust: bool = False,
) -> str | None:
    """A value over steps: training as a line in its band, evaluations as dots.

    Args:
      train: the accent line.
      evals: name of the split -> its values; the first is drawn strongest.
      zero: begin the axis at 0.
      smoothed: average the training line and show its range behind it.
      second: another training line, in grey.
      robust: let a few far outliers run into the upper edge instead of flattening the rest.

    Returns None when there is nothing finite to draw.
    """
    lines = [s for s in (train, second, *evals.values()) if s is not None and not s.empty]
    if not lines:
        return None
    steps = np.concatenate([s.steps for s in lines])
    x = Axis(0.0, float(max(steps.max(), 1.0)), LEFT, WIDTH - RIGHT)
    values = np.concatenate([s.values for s in lines])
    if robust:
        values = np.minimum(values, 1.25 * np.nanpercentile(values, 99))
    y = fit(values, HEIGHT - BOTTOM, TOP, zero=zero)  # positions grow downwards
    canvas = Canvas(HEIGHT, label)
    canvas.axes(x, y)
    if second is not None:
        _line(canvas, thin(smooth(second) if smoothed else second), x, y, "line muted")
    if train is not None and not train.empty:
        if smoothed:
            edges = band(train)
            low, high = _at(edges.low, y), _at(edges.high, y)
            canvas.area([x(s) for s in edges.steps], low, high, "band")
            if len(train.steps) == len(edges.steps):  # a short run: the band is a line
                canvas.curve([x(s) for s in edges.steps], high, "line faint")
        _line(canvas, thin(smooth(train) if smoothed else train), x, y, "line accent")
    for number, (split, measured) in enumerate(evals.items()):
        style = "ink" if number == 0 else "muted"
        few = thin(measured, 120)
        _line(canvas, few, x, y, f"line {style}")
        for step, value in zip(few.steps, few.values, strict=True):
            if np.isfinite(value):
                title = f"{split}, step {step:.0f}: {value:.4g}"
                canvas.circle(x(step), y(value), 3, f"dot {style}", title=title)
    return canvas.render()


def confusion(found: Confusion) -> str:
    """Rows are true classes, columns predictions; shade is the share of the row."""
    names, counts = found
    size = len(names)
    longest = max(len(name) for name in names)
    left = min(max(longest * 6.4, 30.0), 110.0) + 24
    cell = min((WIDTH - left - 4) / size, 104.0)
    tall = max(min(cell, 72.0 if size <= 3 else 48.0), 16.0)
    slanted = longest * 6.4 > cell
    top = 40.0 if not slanted else 24.0
    bottom = 0.0 if not slanted else 20.0
    canvas = Canvas(top + tall * size + 8 + bottom, "Confusion matrix")
    canvas.text(left + cell * size / 2, 12, "predicted", "middle")
    room = int((left - 24) / 6.2)
    total = counts.sum(1)
    for i, name in enumerate(names):
        middle = top + tall * (i + 0.5) + 4
        canvas.text(left - 8, middle, clip(name, room), "end strong", title=name)
        if not slanted:
            canvas.text(left + cell * (i + 0.5), 32, name, "middle strong")
        for j, other in enumerate(names):
            share = counts[i, j] / total[i] if total[i] else 0.0
            title = f"{counts[i, j]} of {total[i]} {name} predicted as {other} ({share:.1%})"
            x, y = left + cell * j, top + tall * i
            canvas.rect(x, y, cell - 2, tall - 2, "cell")
            if share:
                shade = 0.08 + 0.92 * share
                canvas.rect(x, y, cell - 2, tall - 2, "fill", opacity=shade, title=title)
            style = "middle on-fill" if share > 0.5 else "middle strong"
            if size <= 3 and tall > 44:
                canvas.text(x + cell / 2 - 1, y + tall / 2 - 2, counts[i, j], style + " big")
                canvas.text(x + cell / 2 - 1, y + tall / 2 + 16, f"{share:.0%}", style)
            elif counts[i, j] and cell >= 6.4 * len(str(counts[i, j])) + 4:
                canvas.text(x + cell / 2 - 1, y + tall / 2 + 3, counts[i, j], style)
    if slanted:  # names do not fit above the columns: the order is that of the rows
        canvas.text(left, top + tall * size + 18, "columns in the order of the rows", "start")
    return canvas.render()


def reliability(found: Calibration) -> str:
    """Accuracy of each bin of confidence beside the diagonal, and how many items it holds."""
    height, strip = 250.0, 34.0
    x = Axis(0.0, 1.0, LEFT, WIDTH - RIGHT)
    y = Axis(0.0, 1.0, height - BOTTOM - strip - 8, TOP)
    base = height - BOTTOM
    canvas = Canvas(height, "Reliability diagram")
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        canvas.text(LEFT - 7, y(tick) + 4, short(tick), "end")
        canvas.text(x(tick), base + 18, short(tick), "middle")
    for i, size in enumerate(found.sizes):
        left, right = x(found.low[i]) + 1, x(found.high[i]) - 1
        title = (
            f"{size} items at confidence {found.confidence[i]:.3f}: "
            f"accuracy {found.accuracy[i]:.3f}"
        )
        top = y(found.accuracy[i])
        canvas.rect(left, top, right - left, y.start - top, "fill", opacity=0.75, title=title)
        share = strip * size / found.sizes.max()
        canvas.rect(left, base - share, right - left, share, "quiet", title=title)
    canvas.line(x(0), y(0), x(1), y(1), "line ink dashed")
    canvas.line(LEFT, base, WIDTH - RIGHT, base, "grid")
    return canvas.render()


def scatter(true: np.ndarray, predicted: np.ndarray) -> str:
    """Predictions over labels of a regression, with the diagonal on which they should lie."""
    stride = max(1, -(-len(true) // MAX_DOTS))
    true, predicted = true[::stride], predicted[::stride]
    both = fit(np.concatenate([true, predicted]), 0.0, 1.0)
    low, high = (both.low, both.high) if not both.log else (0.0, both.high)
    height = 300.0
    x = Axis(low, high, LEFT, WIDTH - RIGHT)
    y = Axis(low, high, height - BOTTOM, TOP)
    canvas = Canvas(height, "Predictions over labels")
    canvas.axes(x, y)
    canvas.line(x(low), y(low), x(high), y(high), "line ink dashed")
    for a, b in zip(true, predicted, strict=True):
        canvas.circle(x(a), y(b), 2.6, "point")
    return canvas.render()


def histogram(label: str, values: np.ndarray, bins: int = 31) -> str:
    """How often each value occurs, in equal bins around zero."""
    bound = float(np.abs(values).max()) or 1.0
    count, edges = np.histogram(values, bins, (-bound, bound))
    height = 300.0
    x = Axis(-bound, bound, LEFT, WIDTH - RIGHT)
    y = fit(count, height - BOTTOM, TOP, zero=True)
    canvas = Canvas(height, label)
    canvas.axes(x, y)
    for i, number in enumerate(count):
        left, right = x(edges[i]) + 0.5, x(edges[i + 1]) - 0.5
        top = y(float(number))
        title = f"{number} between {edges[i]:.3g} and {edges[i + 1]:.3g}"
        canvas.rect(left, top, right - left, y.start - top, "fill", opacity=0.75, title=title)
    canvas.line(x(0), y.start, x(0), TOP, "line ink dashed")
    return canvas.render()


def clip(name: str, length: int) -> str:
    """A name of at most ``length`` characters."""
    return name if len(name) <= max(length, 3) else name[: max(length, 3) - 1] + "…"


def _at(values: Sequence[float] | np.ndarray, axis: Axis) -> list[float]:
    return [axis(v) if np.isfinite(v) else float("nan") for v in values]


def _line(canvas: Canvas, values: Series, x: Axis, y: Axis, style: str) -> None:
    canvas.curve([x(s) for s in values.steps], _at(values.values, y), style)
