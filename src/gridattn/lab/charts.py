"""Small charts as SVG text that takes its colours from the page around it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 40
COLOURS = ("#4c6ef5", "#f08c00", "#2f9e44", "#e03131", "#9c36b5", "#0c8599", "#a0522d", "#d6336c", "#868e96", "#94a30f")


@dataclass(frozen=True)
class Line:
    """A named series of (x, y) in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


@dataclass(frozen=True)
class Point:
    """A named point."""

    name: str
    x: float
    y: float
    colour: str


def series_colour(index: int) -> str:
    """The colour of the series with this index; the palette comes round after ten."""
    return COLOURS[index % len(COLOURS)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]: the first is not above `low`, the last not below `high`.

    Example:
        >>> ticks(0.0, 10.0)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = max(high - low, 1e-9)
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def line_chart(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Lines over a common pair of axes, as SVG; the name of each shows on hovering."""
    points = [point for line in lines for point in line.points]
    frame = _Frame([x for x, _ in points], [y for _, y in points], tight=True)
    drawn = []
    for line in lines:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
        x, y = line.points[-1]
        drawn.append(
            f'<g><title>{escape(line.name)}</title><polyline points="{path}" fill="none" stroke="{line.colour}" '
            f'stroke-width="2" stroke-linejoin="round"/>'
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{line.colour}"/></g>'
        )
    return frame.svg("".join(drawn), x_label, y_label)


def scatter_chart(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Named points as SVG, the x axis starting at zero; labels move up or down until they do not touch."""
    frame = _Frame([0.0, *(point.x for point in points)], [point.y for point in points])
    drawn, taken = [], []
    for point in sorted(points, key=lambda p: (-p.y, p.x)):
        x, y = frame.x(point.x), frame.y(point.y)
        width = 6.4 * len(point.name)
        start = x + 8 if x + 8 + width < WIDTH else x - 8 - width
        level = y + 4
        while any(abs(level - other) < 12 and start < right and left < start + width for left, right, other in taken):
            level += 3
        taken.append((start, start + width, level))
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{point.colour}">'
            f"<title>{escape(point.name)}: {point.x:.3g}, {point.y:.4g}</title></circle>"
            f'<text class="label" x="{start:.1f}" y="{level:.1f}">{escape(point.name)}</text>'
        )
    return frame.svg("".join(drawn), x_label, y_label)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, half a unit apart on either side where they are one."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high - low > 1e-6 * max(1.0, abs(high)) else (low - 0.5, high + 0.5)


class _Frame:
    """Axes that hold given values, and the maps from values to places; `tight` ends the x axis where the values end."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], tight: bool = False) -> None:
        low, high = _span(xs)
        self.x_ticks = ticks(low, high)
        self.x_range = (low, high) if tight else (self.x_ticks[0], self.x_ticks[-1])
        self.x_ticks = [tick for tick in self.x_ticks if self.x_range[0] <= tick <= self.x_range[1]]
        self.y_ticks = ticks(*_span(ys))

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def svg(self, inside: str, x_label: str, y_label: str) -> str:
        rows = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
            for t in self.y_ticks
        )
        columns = "".join(
            f'<text x="{self.x(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{t:g}</text>'
            for t in self.x_ticks
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">'
            f"{rows}{columns}"
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>{inside}</svg>"
        )
