"""Small charts as SVG that stands inside a page: its style sheet gives the colours.

Classes: `axis` and `grid` for lines, `tick` for words, and those of the series, which give a colour each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 42
MOST_POINTS = 200


class Series(NamedTuple):
    """Attributes: `name` as it is shown, `points` as x, y, and the `style` class."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


class Scale(NamedTuple):
    """From values to pixels on one axis.

    Attributes:
        ticks: round values inside.
        low, high: the values at the ends.
        start, end: their pixels.
    """

    ticks: list[float]
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def lines(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Curves; those of the first series lie on top."""
    shown = [one for one in series if one.points]
    scales = _scales([point for one in shown for point in one.points])
    body = []
    for name, points, style in reversed(shown):
        places = " ".join(f"{scales[0](x)},{scales[1](y)}" for x, y in _thinned(points))
        title = f"<title>{escape(name)}</title>"
        body.append(f'<polyline class="line {style}" points="{places}">{title}</polyline>')
        if len(points) == 1:
            body.append(_dot(scales, points[0], style, name))
    return _chart(scales, body, x_label, y_label)


def scatter(
    series: Sequence[Series],
    front: Sequence[tuple[float, float]],
    x_label: str,
    y_label: str,
    errors: Sequence[tuple[float, float]] = (),
) -> str:
    """Points, and a staircase through the best of them.

    Args:
        series: of points.
        front: corners of the staircase, from left to right.
        x_label, y_label: of the axes.
        errors: of each series how far its points may be off in x and y; shown as bars.
    """
    bars = [
        (one.style, (x - across, x + across), (y - up, y + up))
        for one, (across, up) in zip(series, errors)
        for x, y in one.points
    ]
    ends = [end for _, xs, ys in bars for end in zip(xs, ys)]
    scales = _scales([*ends, *(point for one in series for point in one.points)])
    corners = []
    for place, (x, y) in enumerate(front):
        if place:
            corners.append((x, front[place - 1][1]))
        corners.append((x, y))
    path = " ".join(f"{scales[0](x)},{scales[1](y)}" for x, y in corners)
    body = [f'<polyline class="front" points="{path}"/>'] if len(corners) > 1 else []
    for style, xs, ys in bars:
        left, right, low, high = *(scales[0](x) for x in xs), *(scales[1](y) for y in ys)
        middle, level = scales[0](sum(xs) / 2), scales[1](sum(ys) / 2)
        body.append(f'<path class="noise {style}" d="M{left} {level}H{right}M{middle} {low}V{high}"/>')
    body += [_dot(scales, point, one.style, one.name) for one in series for point in one.points]
    return _chart(scales, body, x_label, y_label)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values between two others, with these inside or at the ends."""
    if not high > low:
        low, high = (low * 0.9, low * 1.1) if low > 0 else (low * 1.1, low * 0.9) if low else (0.0, 1.0)
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _scales(points: Sequence[tuple[float, float]]) -> tuple[Scale, Scale]:
    xs, ys = zip(*points) if points else ((0.0, 1.0), (0.0, 1.0))
    across, up = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys))
    return (
        Scale(across, across[0], across[-1], LEFT, WIDTH - RIGHT),
        Scale(up, up[0], up[-1], HEIGHT - BOTTOM, TOP),
    )


def _chart(scales: tuple[Scale, Scale], body: Sequence[str], x_label: str, y_label: str) -> str:
    across, up = scales
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for value in up.ticks:
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in across.ticks:
        parts.append(
            f'<text class="tick" x="{across(value)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        )
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(13 {(TOP + floor) / 2}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "\n".join([*parts, *body, "</svg>"])


def _dot(scales: tuple[Scale, Scale], point: tuple[float, float], style: str, name: str) -> str:
    x, y = point
    title = f"<title>{escape(name)}: {x:.4g}, {y:.4g}</title>"
    return f'<circle class="dot {style}" cx="{scales[0](x)}" cy="{scales[1](y)}" r="4.5">{title}</circle>'


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `MOST_POINTS` of them, the last one among them."""
    step = math.ceil(len(points) / MOST_POINTS)
    return points if step < 2 else [*points[:-1:step], points[-1]]
