"""The figures of a loss landscape: a plane with its contours, curves, a spectral density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steppe.launch.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Canvas, fit, short

HEIGHT = 230.0
# One kind of line a model, in this order; also the classes of the keys beside the figures.
STYLES = ("accent", "ink", "muted", "accent dashed", "ink dashed", "muted dashed")
_FINER = 5  # grid points between two measured ones


class Line(NamedTuple):
    """Values of one model.

    Attributes:
      name: for the text that shows on hovering.
      xs, ys: [N]; what is not finite breaks the line.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


class _Map(Canvas):
    """A canvas that also draws shapes of many pieces."""

    def path(self, pieces: Sequence[str], style: str, opacity: float | None = None) -> None:
        """One element for all pieces: their common borders leave no hairlines."""
        if pieces:
            fade = "" if opacity is None else f' fill-opacity="{opacity:.3f}"'
            self._parts.append(f'<path class="{style}"{fade} d="{"".join(pieces)}"/>')


def lines(label: str, found: Sequence[Line], *, dots: bool = False, zero: bool = False) -> str:
    """Several models' values on one pair of axes.

    Args:
      dots: mark the measured points.
      zero: both axes begin at 0.
    """
    xs = np.concatenate([np.asarray(line.xs, np.float64) for line in found])
    ys = np.concatenate([np.asarray(line.ys, np.float64) for line in found])
    x = Axis(0.0 if zero else float(xs.min()), float(xs.max()), LEFT, WIDTH - RIGHT)
    y = fit(ys, HEIGHT - BOTTOM, TOP, zero=zero)
    canvas = Canvas(HEIGHT, label)
    canvas.axes(x, y)
    if x.low < 0 < x.high:
        canvas.line(x(0), y.start, x(0), y.end, "line muted dashed")
    for line, style in reversed(list(zip(found, STYLES, strict=False))):
        heights = [y(v) if math.isfinite(v) else math.nan for v in line.ys]
        canvas.curve([x(v) for v in line.xs], heights, f"line {style}")
        for a, b in zip(line.xs, line.ys, strict=True):
            if dots and math.isfinite(b):
                title = f"{line.name}, {short(a)}: {b:.4g}"
                canvas.circle(x(a), y(b), 3, f"dot {style.split()[0]}", title=title)
    return canvas.render()


def density(label: str, found: Sequence[Line], rugs: Sequence[Line]) -> str:
    """Spectral densities on a logarithmic axis, with every model's largest eigenvalues below.

    Args:
      found: eigenvalue -> density.
      rugs: the largest eigenvalues as ``xs``.
    """
    xs = np.concatenate([np.asarray(line.xs) for line in found])
    highest = max(float(np.max(line.ys)) for line in found)
    strip = 11.0 * len(rugs)
    x = Axis(float(xs.min()), float(xs.max()), LEFT, WIDTH - RIGHT)
    # One eigenvalue of 10^7 has a share of 10^-7 of the whole.
    y = Axis(highest * 1e-9, highest * 2, HEIGHT - BOTTOM - strip, TOP, log=True)
    canvas = Canvas(HEIGHT, label)
    for tick in y.ticks(4):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 7, y(tick) + 4, short(tick), "end")
    for tick in x.ticks(5):
        canvas.text(x(tick), HEIGHT - BOTTOM + 18, short(tick), "middle")
    canvas.line(x.start, y.start, x.end, y.start, "grid")
    if x.low < 0 < x.high:
        canvas.line(x(0), y.start, x(0), y.end, "line muted dashed")
    for line, style in reversed(list(zip(found, STYLES, strict=False))):
        heights = [y(v) if v > y.low else math.nan for v in line.ys]
        canvas.curve([x(v) for v in line.xs], heights, f"line {style}")
    for row, (rug, style) in enumerate(zip(rugs, STYLES, strict=False)):
        for value in rug.xs:
            title = f"{rug.name}: eigenvalue {value:.4g}"
            height = y.start + 11.0 * (row + 0.5) + 2
            canvas.circle(x(value), height, 3, f"dot {style.split()[0]}", title=title)
    return canvas.render()


def levels(planes: Sequence[np.ndarray], count: int = 12) -> list[float]:
    """Round values for contours that all planes share; never empty."""
    values = np.concatenate([np.ravel(plane) for plane in planes])
    values = values[np.isfinite(values)]
    if not values.size:
        return [0.0]
    axis = fit(values, 0.0, 1.0)
    inside = [t for t in axis.ticks(count) if values.min() < t < values.max()]
    return inside or [float(values.mean())]


def plane(label: str, at: Sequence[float], losses: np.ndarray, marks: Sequence[float]) -> str:
    """A loss over a plane: darker is higher, a line at each of ``marks``, a dot at the model.

    Args:
      at: positions along both directions, evenly spaced.
      losses: [len(at), len(at)]; rows along the first direction, drawn from left to right.
      marks: ascending, from :func:`levels`.
    """
    side, legend = WIDTH - LEFT - RIGHT, 46.0
    canvas = _Map(TOP + side + BOTTOM + legend, label)
    x = Axis(float(at[0]), float(at[-1]), LEFT, WIDTH - RIGHT)
    y = Axis(float(at[0]), float(at[-1]), TOP + side, TOP)
    fine = _finer(_whole(losses))
    xs = np.linspace(x.start, x.end, fine.shape[0])
    ys = np.linspace(y.start, y.end, fine.shape[1])
    canvas.rect(LEFT, TOP, side, side, "fill", opacity=0.05)
    # Laid over each other, each covers this share of what shines through: 90% after the last.
    cover = 1 - 0.1 ** (1 / len(marks))
    for mark in marks:
        filled, edges = _above(fine, mark, xs, ys)
        canvas.path(filled, "fill", cover)
        canvas.path(edges, "contour")
    for tick in x.ticks(4):
        canvas.text(x(tick), y.start + 18, short(tick), "middle")
        canvas.text(x.start - 7, y(tick) + 4, short(tick), "end")
    canvas.circle(x(0), y(0), 4, "dot ink", title=f"the model: {_centre(losses):.4g}")
    _legend(canvas, marks, TOP + side + BOTTOM + 14, cover)
    return canvas.render()


def _legend(canvas: _Map, marks: Sequence[float], top: float, cover: float) -> None:
    width = (WIDTH - LEFT - RIGHT) / (len(marks) + 1)
    for number in range(len(marks) + 1):
        left = LEFT + number * width
        canvas.rect(left, top, width, 10, "fill", opacity=0.05)
        if number:
            canvas.rect(left, top, width, 10, "fill", opacity=1 - (1 - cover) ** number)
            if number % math.ceil(len(marks) / 8) == 0 or len(marks) <= 8:
                canvas.text(left, top + 25, short(marks[number - 1]), "middle")


def _whole(losses: np.ndarray) -> np.ndarray:
    """Without gaps: what is not finite is drawn as the highest loss that is."""
    values = np.asarray(losses, np.float64)
    known = np.isfinite(values)
    return np.where(known, values, values[known].max() if known.any() else 0.0)


def _centre(losses: np.ndarray) -> float:
    values = np.asarray(losses, np.float64)
    return float(values[values.shape[0] // 2, values.shape[1] // 2])


def _finer(values: np.ndarray) -> np.ndarray:
    """Catmull-Rom interpolation along both axes; goes through the measured values."""
    for _ in range(2):
        padded = np.concatenate(
            [2 * values[:1] - values[1:2], values, 2 * values[-1:] - values[-2:-1]]
        )
        before, here, after, beyond = (padded[i : len(padded) - 3 + i] for i in range(4))
        pieces = []
        for t in np.arange(_FINER) / _FINER:
            pieces.append(
                here
                + 0.5 * t * (after - before)
                + t**2 * (before - 2.5 * here + 2 * after - 0.5 * beyond)
                + t**3 * (1.5 * (here - after) + 0.5 * (beyond - before))
            )
        dense = np.stack(pieces, 1).reshape(-1, values.shape[1])
        values = np.concatenate([dense, values[-1:]]).T
    return values


def _above(
    values: np.ndarray, mark: float, xs: np.ndarray, ys: np.ndarray
) -> tuple[list[str], list[str]]:
    """Outlines of where the values exceed ``mark``, cell by cell, and the border itself."""
    filled: list[str] = []
    edges: list[str] = []
    high = values > mark
    for j in range(values.shape[1] - 1):
        start = None  # of a row of cells that lie above as a whole
        for i in range(values.shape[0]):
            last = i == values.shape[0] - 1
            inside = not last and bool(high[i : i + 2, j : j + 2].all())
            if inside and start is None:
                start = i
            if not inside and start is not None:
                corners = [(xs[start], ys[j]), (xs[i], ys[j])]
                corners += [(xs[i], ys[j + 1]), (xs[start], ys[j + 1])]
                filled.append(_outline(corners))
                start = None
            if last or inside or not high[i : i + 2, j : j + 2].any():
                continue
            around = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            polygon, crossings = [], []
            for (a, b), (c, d) in zip(around, [*around[1:], around[0]], strict=True):
                if high[a, b]:
                    polygon.append((xs[a], ys[b]))
                if high[a, b] != high[c, d]:
                    t = (mark - values[a, b]) / (values[c, d] - values[a, b])
                    point = (xs[a] + t * (xs[c] - xs[a]), ys[b] + t * (ys[d] - ys[b]))
                    polygon.append(point)
                    crossings.append(point)
            filled.append(_outline(polygon))
            for p, q in zip(crossings[::2], crossings[1::2], strict=True):
                edges.append(f"M{p[0]:.1f} {p[1]:.1f}L{q[0]:.1f} {q[1]:.1f}")
    return filled, edges


def _outline(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "Z"
