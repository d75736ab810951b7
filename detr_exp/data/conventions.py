"""Recognise boxes that are written in another convention than that of their layout.

A file does not state what its four numbers mean. Read with the wrong convention, boxes extend beyond their images, have
negative sides or another area than annotated; read with the right one, all of them fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from detr_exp.data.problems import Names, Problems

CORNER_AND_SIDES = "the upper left corner, width and height"
TWO_CORNERS = "two corners"
CENTRE_AND_SIDES = "the centre, width and height"
# four numbers to the two corners
_READ: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    CORNER_AND_SIDES: lambda n: np.concatenate([n[:, :2], n[:, :2] + n[:, 2:]], 1),
    TWO_CORNERS: lambda n: n,
    CENTRE_AND_SIDES: lambda n: np.concatenate([n[:, :2] - n[:, 2:] / 2, n[:, :2] + n[:, 2:] / 2], 1),
}
# the upper left corner and the sides back to the numbers they were made from
_WRITTEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    CORNER_AND_SIDES: lambda b: b,
    TWO_CORNERS: lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1),
    CENTRE_AND_SIDES: lambda b: np.concatenate([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1),
}
_SLACK = 0.01  # tolerance for boxes beyond the image border, in parts of its side; at least a pixel
_SURE, _LIKELY = (10, 0.5), (4, 0.1)  # number of distinct boxes, and the part of them that does not fit
_SAME = 1e-3  # relative difference of two areas that are the same
_SMALLEST = 8  # pixels: in smaller images, boxes within one pixel are plausible


def check_convention(
    boxes_xywh: np.ndarray,
    sizes: np.ndarray,
    areas: np.ndarray,
    convention: str,
    where: Names,
    problems: Problems,
) -> None:
    """Report boxes that fit better in another convention.

    Args:
        boxes_xywh: `[n, 4]` upper left corner and sides in pixels, as read; rows that are not finite are ignored.
        sizes: `[n, 2]` (height, width) of their images.
        areas: `[n]` as annotated, NaN where there is none.
        convention: in which they were read.
        where: per box its name in messages.
        problems: receives an error where the evidence is certain, a warning where it is likely.
    """
    rows = np.flatnonzero(np.isfinite(boxes_xywh).all(1) & (np.abs(boxes_xywh) < 1e9).all(1))
    if not len(rows):
        return
    boxes, sizes, areas = boxes_xywh[rows], sizes[rows], areas[rows]
    if _relative(boxes, sizes, rows, where, problems):
        return
    numbers = _WRITTEN[convention](boxes)
    misfits = ~_fits(numbers, sizes, convention)
    for other in _READ:
        if other == convention:
            continue
        corners = _READ[other](numbers)
        agree = _same(areas, (corners[:, 2:] - corners[:, :2]).prod(1)) & (corners[:, 2:] > corners[:, :2]).all(1)
        agree &= ~_same(areas, boxes[:, 2:].prod(1))
        annotated, part = int(np.isfinite(areas).sum()), float(misfits.mean())
        fits = (part > 0 or agree.any()) and bool(_fits(numbers, sizes, other).all())
        distinct = len(np.unique(numbers, axis=0)) if fits else 0
        sure = fits and ((distinct >= _SURE[0] and part >= _SURE[1]) or (1 < annotated == agree.sum()))
        likely = (fits and distinct >= _LIKELY[0] and part >= _LIKELY[1]) or agree.sum() > _LIKELY[1] * annotated
        if not sure and not likely:
            continue
        evidence = misfits | agree
        kind = f"boxes whose four numbers look like {other}, but are read as {convention}"
        cases = [where[i] for i in rows[evidence].tolist()]
        counted = f"{misfits.sum()} of {len(rows)} boxes do not fit into their image in this convention"
        counted += ", and all fit in the other convention" if fits else ""
        counted += f"; {agree.sum()} of {annotated} annotated areas fit the other convention" if agree.any() else ""
        if sure:
            problems.error(f"{kind}; convert them", f"{counted}: {cases[0]} and others")
        else:
            for case in (counted, *cases):
                problems.warn(f"{kind}; if so, convert them", case)
        return


def check_extents(what: str, extents: np.ndarray, boxes_xywh: np.ndarray, where: Names, problems: Problems) -> None:
    """Report outlines or keypoints that are written in another unit or scale than their boxes.

    Args:
        what: `outlines` or `keypoints`, for messages.
        extents: `[n, 4]` two corners of the bounding box of each, in pixels as read; NaN where there is none.
        boxes_xywh: `[n, 4]` upper left corner and sides in pixels.
        where: per box its name in messages.
        problems: receives an error where all are relative numbers, a warning where many lie away from their box.
    """
    rows = np.flatnonzero(np.isfinite(extents).all(1))
    if not len(rows):
        return
    spans, boxes = extents[rows], _READ[CORNER_AND_SIDES](boxes_xywh[rows])
    relative = (spans > -_SLACK).all(1) & (spans < 1 + _SLACK).all(1) & (spans != np.round(spans)).any(1)
    relative &= (boxes[:, 2:] > _SMALLEST).all(1)
    away = relative | (spans[:, 2:] < boxes[:, :2] - 1).any(1) | (spans[:, :2] > boxes[:, 2:] + 1).any(1)
    if relative.all():
        kind = f"{what} within the first pixel of their image, unlike their boxes: relative numbers (0..1)"
        problems.error(f"{kind}; multiply them by width and height", f"all {len(rows)}: {where[rows[0]]} and others")
    elif away.mean() > _LIKELY[1]:
        for i in rows[away].tolist():
            problems.warn(f"{what} that lie away from their box: in another unit, or for another image size?", where[i])


def spans(outlines: Sequence[Sequence[Sequence[float]] | None]) -> np.ndarray:
    """`[n, 4]` two corners of the bounding box of each object's polygons; NaN where there are none."""
    found = np.full((len(outlines), 4), np.nan)
    rows = [i for i, outline in enumerate(outlines) if outline]
    if rows:
        parts = [[len(polygon) for polygon in outlines[i] or ()] for i in rows]
        points = np.fromiter((v for i in rows for polygon in outlines[i] or () for v in polygon), float).reshape(-1, 2)
        starts = np.cumsum([0, *(sum(part) // 2 for part in parts[:-1])])
        found[rows, :2] = np.minimum.reduceat(points, starts)
        found[rows, 2:] = np.maximum.reduceat(points, starts)
    return found


def _relative(boxes: np.ndarray, sizes: np.ndarray, rows: np.ndarray, where: Names, problems: Problems) -> bool:
    """Report boxes that are relative to the image where pixels are expected; True if they are."""
    within = (boxes[:, :2] > -_SLACK).all(1) & (boxes[:, :2] + boxes[:, 2:] < 1 + _SLACK).all(1)
    within &= (boxes[:, 2:] > 0).all(1) & (sizes.min(1) >= _SMALLEST)
    broken = (boxes != np.round(boxes)).any(1) & within
    usable = (boxes[:, 2:] > 0).all(1)
    kind = "boxes within the first pixel of their image: relative numbers (0..1) where pixels are expected"
    if broken.any() and within.sum() == usable.sum():
        first = where[int(rows[broken][0])]
        problems.error(f"{kind}; multiply them by width and height", f"{within.sum()} of {len(boxes)} boxes: {first}")
        return True
    for i in rows[within].tolist():
        problems.warn(f"{kind}?", where[i])
    return False


def _fits(numbers: np.ndarray, sizes: np.ndarray, convention: str) -> np.ndarray:
    """`[n]` whether a box has sides that are not negative and lies in its image."""
    corners = _READ[convention](numbers)
    extent = sizes[:, ::-1]
    slack = np.maximum(1, extent * _SLACK)
    inside = (corners[:, :2] >= -slack).all(1) & (corners[:, 2:] <= extent + slack).all(1)
    return np.asarray(inside & (corners[:, 2:] >= corners[:, :2]).all(1))


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`[n]` whether two areas agree; false where one is not known."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(one - other) <= _SAME * np.abs(other))
