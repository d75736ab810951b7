"""Fields of an annotation, checked before anything is computed from them.

Outlines are checked for errors that would use much memory or read past a buffer when they are rasterised: an outlying
vertex, runs that do not fill their image, a compressed string that ends in the middle of a number.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import numpy as np

from detr_exp.data.content import Outline


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def is_number(value: object, finite: bool = True) -> TypeGuard[float]:
    return is_int(value) or (isinstance(value, float) and (not finite or math.isfinite(value)))


def segments(given: object, size: tuple[int, int]) -> tuple[Outline | None, bool]:
    """A `segmentation`: (polygons of at least three points, an RLE dict, or None; whether it was usable or absent).

    Args:
        given: the value in the file.
        size: (height, width) of the image; an RLE must have it.
    """
    if isinstance(given, dict):
        counts = given.get("counts")
        lengths = runs(counts) if isinstance(counts, str) else counts
        sound = isinstance(lengths, list) and all(is_int(v) and v >= 0 for v in lengths)
        if sound and given.get("size") == list(size) and sum(lengths or ()) == math.prod(size):
            return {"size": list(size), "counts": counts}, True
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


def points(given: object, count: int) -> tuple[list[float] | None, str | None]:
    """The `keypoints` of an annotation: (x, y, visibility one after another, or None; what is wrong with them)."""
    if given is None or given == []:
        return None, None
    if not isinstance(given, list) or not all(is_number(v) for v in given) or len(given) % 3:
        return None, "its keypoints are not finite numbers x, y, visibility"
    if len(given) != 3 * count:
        return None, f"it has {len(given) // 3} keypoints, its category {count}"
    if wrong := [v for v in given[2::3] if v not in (0, 1, 2)]:
        return None, f"visibility {wrong[0]:g} of a keypoint; it is 0, 1 or 2"
    return given, None


def _polygon(given: object) -> list[float] | None:
    """A list of coordinates as an array, all finite; None if it is anything else. NumPy is faster than a loop here."""
    try:
        values = np.array(given, np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return values.tolist() if values.ndim == 1 and np.isfinite(values).all() else None
