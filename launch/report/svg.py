"""Small figures as inline SVG, written by hand so that the page's style sheet colours them.

Every figure is 400 units wide and uses classes instead of colours (``grid``, ``accent``,
``ink``, ``muted``, ``soft``), so light and dark come from one set of CSS variables. Output
depends on the input only.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 400.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 26.0


@dataclass(frozen=True)
class Axis:
    """Maps values to positions.

    Attributes:
      low, high: the range of values.
      start, end: positions of low and high, in units of the figure.
      log: logarithmic scale.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the range: about ``count`` of them, or decades."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = (1.0,) if len(powers) > 3 else (1.0, 2.0, 5.0)
            values = [m * 10.0**p for p in powers for m in marks]
            inside = [v for v in values if self.low <= v <= self.high]
            return inside[:: max(1, math.ceil(len(inside) / (count + 2)))]
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def fit(
    values: Sequence[float] | np.ndarray, start: float, end: float, *, zero: bool = False
) -> Axis:
    """An axis that holds all finite values: a little room, logarithmic over two decades or more.

    Args:
      zero: begin at 0; the axis is then never logarithmic.
    """
    data = np.asarray(values, np.float64)
    data = data[np.isfinite(data)]
    if not data.size:
        return Axis(0.0, 1.0, start, end)
    low, high = float(data.min()), float(data.max())
    if not zero and low > 0 and high / low > 100:
        return Axis(low / 1.2, high * 1.2, start, end, log=True)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    if zero:
        return Axis(0.0, high + room if high > 0 else 1.0, start, end)
    # Losses, rates and norms do not fall below 0, so the room must not suggest it.
    return Axis(max(low - room, 0.0) if low >= 0 else low - room, high + room, start, end)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return min((m * power for m in (1.0, 2.0, 5.0, 10.0)), key=lambda s: abs(math.log(s / raw)))


def short(value: float) -> str:
    """A number as an axis shows it: 12k, 0.25, 2e-5."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.4g}{unit}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def escape(value: object) -> str:
    """Text that is safe in HTML content and attributes, whatever it holds.

    Lone surrogates (valid in JSON, not in UTF-8) and control characters are replaced.
    """
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    text = "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text)
    return html.escape(text, quote=True)


class Canvas:
    """Collects shapes; positions are in units from the top left corner."""

    def __init__(self, height: float, label: str, width: float = WIDTH) -> None:
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line."""
        self._parts.append(
            f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'
        )

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        style: str,
        *,
        opacity: float | None = None,
        title: str = "",
    ) -> None:
        """A filled rectangle; ``title`` shows on hovering."""
        fade = "" if opacity is None else f' fill-opacity="{opacity:.3f}"'
        shape = f'class="{style}" x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}"'
        self._close("rect", f'{shape} height="{_n(max(height, 0))}"{fade}', title)

    def circle(self, x: float, y: float, radius: float, style: str, *, title: str = "") -> None:
        """A dot."""
        self._close("circle", f'class="{style}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"', title)

    def text(self, x: float, y: float, text: object, style: str, *, title: str = "") -> None:
        """One line of text; ``style`` says its anchor: start, middle or end."""
        inside = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<text class="{style}" x="{_n(x)}" y="{_n(y)}">{inside}{escape(text)}</text>'
        )

    def curve(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """A line through the points, broken where y is NaN; a lone point becomes a dot."""
        for piece in _pieces(xs, ys):
            if len(piece) == 1:
                self.circle(*piece[0], 1.5, style + " dot")
            else:
                path = "L".join(f"{_n(x)} {_n(y)}" for x, y in piece)
                self._parts.append(f'<path class="{style}" d="M{path}"/>')

    def area(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], style: str
    ) -> None:
        """The area between two lines, broken where they are NaN."""
        tops, bottoms = _pieces(xs, high), _pieces(xs, low)
        for top, bottom in zip(tops, bottoms, strict=True):
            if len(top) > 1:
                path = "L".join(f"{_n(x)} {_n(y)}" for x, y in [*top, *reversed(bottom)])
                self._parts.append(f'<path class="{style}" d="M{path}Z"/>')

    def axes(self, x: Axis, y: Axis, *, x_count: int = 5, y_count: int = 4) -> None:
        """Grid lines with their values at the left, and values along the bottom."""
        for tick in y.ticks(y_count):
            self.line(min(x.start, x.end), y(tick), max(x.start, x.end), y(tick), "grid")
            self.text(x.start - 7, y(tick) + 4, short(tick), "end")
        for tick in x.ticks(x_count):
            self.text(x(tick), y.start + 18, short(tick), "middle")

    def render(self) -> str:
        """The ``<svg>`` element."""
        return (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" '
            f'aria-label="{escape(self.label)}">{"".join(self._parts)}</svg>'
        )

    def _close(self, tag: str, attributes: str, title: str) -> None:
        end = f"><title>{escape(title)}</title></{tag}>" if title else "/>"
        self._parts.append(f"<{tag} {attributes}{end}")


def _n(value: float) -> str:
    """A position with one decimal, without a trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


def _pieces(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            pieces[-1].append((float(x), float(y)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
