"""Fields of an annotation, checked before anything is computed from them.

Outlines are checked for errors that would use much memory or read past a buffer when they are rasterised: an outlying
vertex, runs that do not fill their image, a compressed string that ends in the middle of a number.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeGuard

import numpy as np

from detr_exp.data.content import Outline

_NUMBERS = {int, float}
LARGEST = 2**53  # integers are smaller: floats are exact up to here


def is_int(value: object) -> TypeGuard[int]:
    return type(value) is int and -LARGEST < value < LARGEST


def is_number(value: object, finite: bool = True) -> TypeGuard[float]:
    return is_int(value) or (isinstance(value, float) and (not finite or math.isfinite(value)))


def int_column(values: Sequence[object]) -> np.ndarray | None:
    """`[n]` int64, if all of them are integers as `is_int` wants them."""
    if not {int}.issuperset(map(type, values)):
        return None
    with suppress(OverflowError):
        column = np.array(values, np.int64)
        if not len(column) or (column.min() > -LARGEST and column.max() < LARGEST):
            return column
    return None


def number_column(values: Sequence[object]) -> np.ndarray | None:
    """`[n]` float64, if all of them are numbers as `is_number` wants them, infinite or not."""
    if not _NUMBERS.issuperset(map(type, values)):
        return None
    with suppress(OverflowError):
        column = np.array(values, np.float64)
        if (np.abs(column) < LARGEST).all() or are_numbers(values, finite=False):
            return column
    return None


def are_numbers(values: Sequence[object], finite: bool = True) -> TypeGuard[Sequence[float]]:
    """Whether all of them are; as `is_number`, and faster for many."""
    if not _NUMBERS.issuperset(map(type, values)):
        return False
    if values and min(values) > -LARGEST and max(values) < LARGEST:  # type: ignore[type-var, operator]
        return not finite or not any(map(math.isnan, values))  # type: ignore[arg-type]
    return all(is_number(v, finite) for v in values)


def segments(given: object) -> tuple[Outline | None, bool]:
    """A `segmentation`: (polygons of at least three points, an RLE dict, or None; whether it was usable or absent).

    Args:
        given: the value in the file; an RLE must fill the (height, width) it states.
    """
    if isinstance(given, dict):
        counts, size = given.get("counts"), given.get("size")
        lengths = runs(counts) if isinstance(counts, str) else counts
        sound = isinstance(lengths, list) and all(is_int(v) and v >= 0 for v in lengths)
        sound &= isinstance(size, list) and len(size) == 2 and all(is_number(v) and v == int(v) >= 0 for v in size)
        if sound and sum(lengths or ()) == math.prod(size or ()):
            return {"size": [int(v) for v in size or ()], "counts": counts}, True
    elif isinstance(given, list):
        polygons = [_polygon(part) for part in given]
        if None not in polygons:
            kept = [polygon for polygon in polygons if polygon and len(polygon) >= 6 and len(polygon) % 2 == 0]
            if kept or not given:
                return kept or None, True
    return None, given is None


def runs(compressed: str) -> list[int] | None:
    """The run lengths of COCO's compressed RLE; None if it is not one.

    Each number is a series of characters, five bits each from the lowest, with `0x20` on all but the last; from the
    third on they are differences to the number two before.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in compressed:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths if shift == 0 else None


def are_points(given: object) -> TypeGuard[list[float]]:
    """Whether this is a list of finite numbers, three for each keypoint."""
    return isinstance(given, list) and len(given) % 3 == 0 and are_numbers(given)


def points_complaint(given: object, count: int) -> str | None:
    """What is wrong with the `keypoints` of an annotation whose category has `count`."""
    if not are_points(given):
        return "its keypoints are not finite numbers x, y, visibility"
    if len(given) != 3 * count:
        return f"it has {len(given) // 3} keypoints, its category {count}"
    if wrong := [v for v in given[2::3] if v not in (0, 1, 2)]:
        return f"visibility {wrong[0]:g} of a keypoint; it is 0, 1 or 2"
    return None


def _polygon(given: object) -> list[float] | None:
    """A list of coordinates as numbers, all finite; None if it is anything else."""
    try:
        plain = isinstance(given, list) and _NUMBERS.issuperset(map(type, given))
        values = array("d", given) if plain else np.array(given, np.float64)  # type: ignore[call-overload]
    except (ValueError, TypeError, OverflowError):
        return None
    if isinstance(values, array):
        return values.tolist() if math.isfinite(sum(values)) or all(map(math.isfinite, values)) else None
    return values.tolist() if values.ndim == 1 and np.isfinite(values).all() else None
