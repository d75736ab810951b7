"""Charts as SVG."""

import itertools
import math
from xml.etree import ElementTree

import pytest

from detr_exp.runs.svg import HEIGHT, MOST_POINTS, WIDTH, Series, lines, scatter, ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.12, 0.37), (-3, 400), (1e-5, 2e-5), (5, 5), (0, 0), (-2, -2), (1e9, 3e9)]
)
def test_ticks_are_round_and_hold_all_values(low, high):
    found = ticks(low, high)
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}
    assert found[0] <= low <= high <= found[-1]
    assert 3 <= len(found) <= 9
    digits = f"{(found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0])):.3f}"
    assert digits in ("1.000", "2.000", "2.500", "5.000", "10.000")


def points_of(chart: str, tag: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(chart)
    if tag == "circle":
        return [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    return [tuple(map(float, p.split(","))) for line in root.iter("polyline") for p in line.get("points").split()]


def test_everything_lies_inside_and_more_is_higher():
    chart = lines([Series("a <b>", [(0, 0.1), (1, 0.5), (2, 0.3)], "c0"), Series("none", [], "c1")], "epoch", "mAP")
    points = points_of(chart, "polyline")
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[1][1] < points[2][1] < points[0][1]
    assert "a &lt;b&gt;" in chart


def test_long_curves_are_thinned_and_keep_their_end():
    long = [(float(k), float(k)) for k in range(10_001)]
    points = points_of(lines([Series("a", long, "c0")], "x", "y"), "polyline")
    assert len(points) <= MOST_POINTS + 1
    assert points[-1][0] == pytest.approx(WIDTH - 14, abs=1)


def test_single_points_are_seen_and_no_points_are_no_error():
    assert len(points_of(lines([Series("a", [(1, 1)], "c0")], "x", "y"), "circle")) == 1
    ElementTree.fromstring(lines([], "x", "y"))
    chart = scatter([Series("a", [(1, 1)], "c0"), Series("b", [(2, 3)], "c1")], [(1, 1), (2, 3)], "x", "y")
    assert len(points_of(chart, "circle")) == 2
    assert len(points_of(chart, "polyline")) == 3, "a staircase"
