"""Plots as SVG text: axes, marks and legends, coloured by the page's CSS classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Plot", "legend", "ticks"]


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers between two bounds, about ``count`` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _label(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Legend of CSS classes and texts, as HTML."""
    items = "".join(
        f'<span class="key"><i class="swatch {name}"></i>{escape(text)}</span>'
        for name, text in entries
    )
    return f'<div class="legend">{items}</div>'


class Plot:
    """One plot with linear axes.

    Parameters
    ----------
    title : :class:`str`
        What it shows, for readers that can't see it.
    width, height : :class:`int`
        Size, in pixels.
    x, y : pair of :class:`float`
        Bounds of the axes. ``y`` may be reversed to count downwards.
    x_label, y_label : :class:`str`
        Names of the axes with their units.
    left, top : :class:`int`
        Room for the texts of the y axis, and above the plot, in pixels.
    """

    RIGHT, BOTTOM = 26, 40

    def __init__(
        self,
        *,
        title: str,
        width: int,
        height: int,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        left: int = 56,
        top: int = 10,
    ) -> None:
        self.title = title
        self.width = width
        self.height = height
        self._x = x if x[1] != x[0] else (x[0], x[0] + 1)
        self._y = y if y[1] != y[0] else (y[0], y[0] + 1)
        self._left = left
        self._top = top
        self._labels = (x_label, y_label)
        self._marks: list[str] = []
        self._axes: list[str] = []

    def px(self, x: float) -> float:
        """Pixel of a value on the x axis."""
        low, high = self._x
        return self._left + (x - low) / (high - low) * (self.width - self._left - self.RIGHT)

    def py(self, y: float) -> float:
        """Pixel of a value on the y axis."""
        low, high = self._y
        bottom = self.height - self.BOTTOM
        return bottom - (y - low) / (high - low) * (bottom - self._top)

    def x_ticks(self, values: Sequence[float], *, texts: Sequence[str] | None = None) -> None:
        """Mark values on the x axis."""
        bottom = self.height - self.BOTTOM
        for at, value in enumerate(values):
            x = _number(self.px(value))
            text = escape(texts[at] if texts else _label(value))
            self._axes.append(
                f'<line class="tick" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
            )

    def y_ticks(
        self, values: Sequence[float], *, unit: str = "", texts: Sequence[str] | None = None
    ) -> None:
        """Mark values on the y axis with lines across."""
        for at, value in enumerate(values):
            y = self.py(value)
            text = escape(texts[at] if texts else _label(value) + unit)
            self._axes.append(
                f'<line class="grid" x1="{self._left}" x2="{self.width - self.RIGHT}"'
                f' y1="{_number(y)}" y2="{_number(y)}"/>'
                f'<text x="{self._left - 6}" y="{_number(y + 4)}" text-anchor="end">{text}</text>'
            )

    def bar(
        self, x: tuple[float, float], y: tuple[float, float], kind: str, *, tip: str = ""
    ) -> None:
        """A rectangle between two corners, at least a pixel wide; ``tip`` shows on hovering."""
        left, right = sorted((self.px(x[0]), self.px(x[1])))
        top, bottom = sorted((self.py(y[0]), self.py(y[1])))
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self._marks.append(
            f'<rect class="{kind}" x="{_number(left)}" y="{_number(top)}"'
            f' width="{_number(max(right - left, 1))}" height="{_number(bottom - top)}">'
            f"{inner}</rect>"
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> None:
        """A line through points."""
        points = " ".join(
            f"{_number(self.px(x))},{_number(self.py(y))}" for x, y in zip(xs, ys, strict=True)
        )
        self._marks.append(f'<polyline class="{kind}" points="{points}"/>')

    def dot(self, x: float, y: float, kind: str, *, tip: str) -> None:
        """A point; ``tip`` shows on hovering."""
        self._marks.append(
            f'<circle class="{kind}" cx="{_number(self.px(x))}" cy="{_number(self.py(y))}" r="3">'
            f"<title>{escape(tip)}</title></circle>"
        )

    def area(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], kind: str
    ) -> None:
        """The area between two lines."""
        path = [*zip(xs, high, strict=True), *zip(reversed(xs), reversed(low), strict=True)]
        points = " ".join(f"{_number(self.px(x))},{_number(self.py(y))}" for x, y in path)
        self._marks.append(f'<polygon class="{kind}" points="{points}"/>')

    def vertical(self, x: float, kind: str, *, text: str = "") -> None:
        """A line across the plot at a value on the x axis."""
        at = _number(self.px(x))
        bottom = self.height - self.BOTTOM
        self._marks.append(
            f'<line class="{kind}" x1="{at}" x2="{at}" y1="{self._top}" y2="{bottom}"/>'
        )
        if text:
            self._marks.append(
                f'<text class="note" x="{_number(self.px(x) + 4)}" y="{self._top - 6}">'
                f"{escape(text)}</text>"
            )

    def __str__(self) -> str:
        x_label, y_label = self._labels
        middle = (self._top + self.height - self.BOTTOM) / 2
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img"'
            f' aria-label="{escape(self.title)}">{"".join(self._axes)}{"".join(self._marks)}'
            f'<line class="axis" x1="{self._left}" x2="{self.width - self.RIGHT}"'
            f' y1="{self.height - self.BOTTOM}" y2="{self.height - self.BOTTOM}"/>'
            f'<text class="label" x="{(self._left + self.width - self.RIGHT) / 2}"'
            f' y="{self.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" transform="translate(13 {_number(middle)}) rotate(-90)"'
            f' text-anchor="middle">{escape(y_label)}</text></svg>'
        )
