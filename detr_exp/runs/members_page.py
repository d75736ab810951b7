"""What the members of a checkpoint reach and cost: the front, the file, the table and the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from detr_exp.runs import svg
from detr_exp.runs.analysis import Cost, told_apart
from detr_exp.runs.html import filled
from detr_exp.values import Values

TEMPLATE = "members.html"
FAST, BALANCED, ACCURATE = "fast", "balanced", "accurate"
SURE = 1.96  # standard errors on both sides of a 95 % interval


@dataclass
class Point:
    """A member of a network.

    Attributes:
        name: as `at.name` has it.
        layers, queries, image_size: its extent; (height, width).
        metric: which value is to be high.
        values: all metrics.
        timed: whether it may be on the front.
        draws: `[B]` of the metric on draws of the images, the same for all points; None where it has none.
        latency, noise: milliseconds of one image, and the standard error of that.
    """

    name: str
    layers: int
    queries: int
    image_size: tuple[int, int]
    metric: str
    values: dict[str, float]
    timed: bool = False
    draws: np.ndarray | None = None
    latency: float | None = None
    noise: float | None = None

    @property
    def gain(self) -> float:
        """Negative infinity where it could not be measured."""
        value = self.values[self.metric]
        return value if math.isfinite(value) and value != -1 else -math.inf

    @property
    def cost(self) -> Cost:
        return Cost(self.latency or 0.0, self.noise or 0.0, self.gain)

    @property
    def error(self) -> float | None:
        """Standard error of the metric, by draws of the images."""
        return None if self.draws is None else _deviation(self.draws)


def is_beaten(point: Point, others: Sequence[Point]) -> bool:
    """Whether another point gains as much with no more layers, queries and pixels, so that no timing is needed."""
    if point.gain == -math.inf:
        return True

    def extent(one: Point) -> tuple[int, ...]:
        return (one.layers, one.queries, *one.image_size)

    return any(
        other.gain >= point.gain
        and extent(other) != extent(point)
        and all(mine <= own for mine, own in zip(extent(other), extent(point)))
        for other in others
    )


def front_of(points: Sequence[Point]) -> list[Point]:
    """The timed points that can be told apart, the quickest first."""
    drawn = [np.zeros(2) if point.draws is None else point.draws for point in points]
    spread = np.array([[_deviation(one - other) for other in drawn] for one in drawn])
    return [points[place] for place in told_apart([point.cost for point in points], spread)]


def names_of(front: Sequence[Point]) -> dict[str, str]:
    """`fast`, `balanced` and `accurate`: both ends of a front, and the point farthest above the line between them."""
    low, high = front[0], front[-1]

    def above(point: Point) -> tuple[float, float]:
        gain = (point.gain - low.gain) / (high.gain - low.gain) if high.gain > low.gain else 0.0
        cost = (point.cost.cost - low.cost.cost) / (high.cost.cost - low.cost.cost) if high is not low else 0.0
        return gain - cost, point.gain

    return {FAST: low.name, BALANCED: max(front, key=above).name, ACCURATE: high.name}


def content(points: Sequence[Point], facts: Values) -> Values:
    """What `members.json` holds.

    Args:
        points: all members; some of them timed.
        facts: of the checkpoint and the measurement.
    """
    front = front_of([point for point in points if point.timed])
    ranked = sorted(points, key=lambda point: (point.latency is None, point.latency or 0.0, -point.gain))
    return {
        **facts,
        "metric": points[0].metric,
        "names": names_of(front),
        "front": [point.name for point in front],
        "points": [_row(point) for point in ranked],
    }


def _row(point: Point) -> Values:
    threshold = point.values.get("F1_threshold")
    return {
        "name": point.name,
        "layers": point.layers,
        "queries": point.queries,
        "image_size": list(point.image_size),
        "value": _finite(point.gain),
        "error": _finite(point.error),
        "latency_ms": _finite(point.latency),
        "latency_error_ms": _finite(point.noise),
        "threshold": _finite(threshold) if point.values.get("F1", 0.0) > 0 else None,
        "metrics": {name: _finite(value) for name, value in point.values.items()},
    }


def table(found: Values) -> list[list[str]]:
    """A head and a row for each timed point, the quickest first."""
    called = _called(found)
    rows = [["", "member", found["metric"], "±", f"ms ({found['form']})", "±"]]
    for row in found["points"]:
        if row["latency_ms"] is not None:
            numbers = [_text(row["value"], 4), _text(row["error"], 4), _text(row["latency_ms"], 2)]
            rows.append([called.get(row["name"], ""), row["name"], *numbers, _text(row["latency_error_ms"], 2)])
    return rows


def render(found: Values, now: datetime) -> str:
    """The page as HTML, complete in itself.

    Args:
        found: from `content`.
        now: when it was made.
    """
    called = _called(found)
    timed = [row for row in found["points"] if row["latency_ms"] is not None]
    on_front = [row for row in timed if row["name"] in found["front"]]
    places = [(row, (row["latency_ms"], row["value"]), "c0" if row in on_front else "c1 rest") for row in timed]
    series = [svg.Series(row["name"], [place], style) for row, place, style in places]
    errors = [(SURE * row["latency_error_ms"], SURE * (row["error"] or 0.0)) for row in timed]
    stairs = [(row["latency_ms"], row["value"]) for row in on_front]
    label = f"milliseconds of one image, {found['form']}, {found['device']}"
    return filled(
        TEMPLATE,
        title=f"Members of {found['checkpoint'].replace(chr(92), '/').rpartition('/')[2]}",
        about=found["checkpoint"],
        now=f"{now:%Y-%m-%d %H:%M}",
        found=found,
        called=called,
        rows=found["points"],
        timed=len(timed),
        front=on_front,
        own=next((row for row in found["points"] if row["name"] == found["own"]), None),
        chart=svg.scatter(series[::-1], stairs, label, found["metric"], errors[::-1]),
        use=shlex.quote(found["checkpoint"]),
        knows_noise=any(row["error"] for row in timed),
    )


def _called(found: Values) -> dict[str, str]:
    """Names in words, by the names of the points."""
    called: dict[str, str] = {}
    for word, name in found["names"].items():
        called[name] = f"{called[name]}, {word}" if name in called else word
    return called | {name: "on the front" for name in found["front"] if name not in called}


def _deviation(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
