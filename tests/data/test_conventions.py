"""Boxes in another convention are recognised by what does not fit; correct ones are not reported."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.data.conventions import (
    CENTRE_AND_SIDES,
    CORNER_AND_SIDES,
    TWO_CORNERS,
    check_convention,
    check_extents,
    spans,
)
from detr_exp.data.problems import Problems

HEIGHT, WIDTH = 480, 640
MAKE = {
    CORNER_AND_SIDES: lambda b: b,
    TWO_CORNERS: lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1),
    CENTRE_AND_SIDES: lambda b: np.concatenate([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1),
}
TAKE = {
    CORNER_AND_SIDES: lambda n: n,
    TWO_CORNERS: lambda n: np.concatenate([n[:, :2], n[:, 2:] - n[:, :2]], 1),
    CENTRE_AND_SIDES: lambda n: np.concatenate([n[:, :2] - n[:, 2:] / 2, n[:, 2:]], 1),
}


def boxes(count: int, seed: int = 0) -> np.ndarray:
    """Boxes inside their image, of all sizes."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), 1) * (WIDTH, HEIGHT)
    return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0] + 1], 1)


def complaints(given: np.ndarray, convention: str, areas: np.ndarray | None = None) -> Problems:
    problems = Problems("here")
    areas = np.full(len(given), np.nan) if areas is None else areas
    sizes = np.tile([HEIGHT, WIDTH], (len(given), 1))
    check_convention(given, sizes, areas, convention, [f"box {i}" for i in range(len(given))], problems)
    return problems


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("convention", list(MAKE))
@pytest.mark.parametrize("count", [1, 5, 200])
def test_right_boxes_are_left_in_peace(convention, count, seed):
    given = boxes(count, seed)
    given[::7, :2] -= 15  # careless
    for areas in (None, given[:, 2:].prod(1), given[:, 2:].prod(1) * 0.6):
        problems = complaints(given, convention, areas)
        assert not problems.errors
        assert not problems.warnings


@pytest.mark.parametrize("taken", [CORNER_AND_SIDES, CENTRE_AND_SIDES])
def test_corners_are_recognised_by_boxes_that_do_not_fit(taken):
    problems = complaints(TAKE[taken](MAKE[TWO_CORNERS](boxes(60))), taken)
    (kind,) = problems.errors
    assert f"look like {TWO_CORNERS}, but are read as {taken}" in kind


def test_sides_are_recognised_where_corners_are_expected():
    assert any(CORNER_AND_SIDES in kind for kind in complaints(TAKE[TWO_CORNERS](boxes(60)), TWO_CORNERS).errors)


@pytest.mark.parametrize("count", [2, 6])
def test_few_corners_are_recognised_by_their_areas(count):
    given = boxes(count) / 8  # none sticks out
    problems = complaints(MAKE[TWO_CORNERS](given), CORNER_AND_SIDES, given[:, 2:].prod(1))
    assert len(problems.errors) == 1
    assert f"{count} of {count} annotated areas" in str(problems.errors)


def test_a_part_in_corners_is_warned_of():
    given = boxes(40)
    areas = given[:, 2:].prod(1)
    given[:10] = MAKE[TWO_CORNERS](given[:10])
    problems = complaints(given, CORNER_AND_SIDES, areas)
    assert not problems.errors
    assert {f"box {i}" for i in range(10)} <= {c for cases in problems.warnings.values() for c in cases}


@pytest.mark.parametrize("count", [1, 3, 50])
def test_relative_numbers_are_refused(count):
    given = boxes(count) / (WIDTH + 1, HEIGHT + 1, WIDTH + 1, HEIGHT + 1)
    assert "relative numbers" in str(complaints(given, CORNER_AND_SIDES).errors)


def test_a_part_in_relative_numbers_is_warned_of():
    given = boxes(10)
    given[:3] /= (WIDTH + 1, HEIGHT + 1, WIDTH + 1, HEIGHT + 1)
    problems = complaints(given, CORNER_AND_SIDES)
    assert not problems.errors
    assert [c for kind, cases in problems.warnings.items() if "relative" in kind for c in cases] == [
        "box 0",
        "box 1",
        "box 2",
    ]


def test_numbers_that_are_none_do_not_matter():
    given = np.array([[np.nan, 0, 1, 1], [np.inf, 0, 1, 1], [1e300, 1e300, 1e300, 1e300], [5, 5, 20, 20]])
    problems = complaints(given, CORNER_AND_SIDES)
    assert not problems.errors
    assert not problems.warnings


def outlined(scale: float, count: int = 20, shift: float = 0.0) -> Problems:
    """Complaints about triangles in boxes, their corners multiplied and moved; every second object has two parts."""
    given, problems = boxes(count), Problems("here")
    low, high = given[:, :2], given[:, :2] + given[:, 2:]
    outlines = []
    for i, ((x0, y0), (x1, y1)) in enumerate(zip((low * scale + shift).tolist(), (high * scale + shift).tolist())):
        outlines.append(None if i == 1 else [[x0, y0, x1, y0, x0, y1], *[[x0, y1, x1, y1, x1, y0]] * (i % 2)])
    found = spans(outlines)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(np.delete(found, 1, 0), np.delete(np.concatenate([low, high], 1), 1, 0) * scale + shift)
    check_extents("outlines", found, given, [f"object {i}" for i in range(count)], problems)
    return problems


def test_outlines_in_their_boxes_are_left_in_peace():
    problems = outlined(1.0)
    assert not problems.errors
    assert not problems.warnings


def test_outlines_in_relative_numbers_are_refused():
    assert any("relative numbers" in kind for kind in outlined(1 / WIDTH).errors)


def test_outlines_for_another_size_are_warned_of():
    problems = outlined(4.0, shift=300.0)
    assert not problems.errors
    assert any("away from their box" in kind for kind in problems.warnings)
