"""The list `annotations` of a COCO file: read entry by entry, then related to images and categories.

In a file the list may come before those of the images and categories, so entries are checked by themselves first.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeGuard

import numpy as np

from detr_exp.data.content import Category, Outline
from detr_exp.data.fields import (
    LARGEST,
    are_numbers,
    are_points,
    int_column,
    is_int,
    is_number,
    number_column,
    points_complaint,
    segments,
)
from detr_exp.data.outlines import frames
from detr_exp.data.problems import Problems, short
from detr_exp.data.rows import Rows

_NAN = float("nan")
_UNKNOWN = -(2**60)  # no id, and no index
REFUSED = -1  # an image that was already reported; its annotations are not reported again


@dataclass
class Annotations:
    """The annotations of a file, as far as they can be understood without its images and categories.

    Attributes:
        rows: their columns; `image` and `category` are ids of the file.
        odd: by place, entries that fit in no columns; their rows are empty.
        unusable: places of annotations with a segmentation that cannot be used.
        poses: by place, keypoints that are not finite numbers x, y, visibility.
        used: the categories that occur.
        most_points: by category, the largest number of keypoints.
    """

    rows: Rows = field(default_factory=lambda: Rows("annotation {number}"))
    odd: dict[int, object] = field(default_factory=dict)
    unusable: list[int] = field(default_factory=list)
    poses: dict[int, object] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    most_points: dict[int, int] = field(default_factory=dict)

    def add(self, entries: Sequence[object]) -> None:
        """The next entries of the list: by columns where nothing is odd about any of them, which is far faster."""
        if not self._add_columns(entries):
            for entry in entries:
                self._add(entry)

    def _add_columns(self, entries: Sequence[Any]) -> bool:
        """Add entries with integers as ids, boxes of four numbers, and no keypoints; False: there are others."""
        try:
            images, categories, numbers, boxes = (
                [entry[key] for entry in entries] for key in ("image_id", "category_id", "id", "bbox")
            )
            crowd = [entry.get("iscrowd") or 0 for entry in entries]
            is_plain = {0, 1}.issuperset(crowd) and all(entry.get("keypoints") is None for entry in entries)
        except (TypeError, KeyError, AttributeError):
            return False
        if not (is_plain and {list}.issuperset(map(type, boxes)) and {4}.issuperset(map(len, boxes))):
            return False
        ids = [column for given in (images, categories, numbers) if (column := int_column(given)) is not None]
        values = number_column([*chain.from_iterable(boxes)])
        if values is None or len(ids) < 3:
            return False
        outlines: dict[int, Outline] = {}
        given = ((i, part) for i, entry in enumerate(entries) if (part := entry.get("segmentation")) is not None)
        for i, segmentation in given:
            outline, usable = segments(segmentation)
            if outline is not None:
                outlines[i] = outline
            if not usable:
                self.unusable.append(len(self.rows) + i)
        areas = [entry.get("area") for entry in entries]
        area = np.array(areas if are_numbers(areas) else [area if is_number(area) else _NAN for area in areas])
        self.used.update(categories)
        self.rows.extend(ids, values, np.array(crowd), area, outlines)
        return True

    def _add(self, entry: object) -> None:
        rows, place = self.rows, len(self.rows)
        get = entry.get if isinstance(entry, dict) else {}.get
        image, category, box, crowd = get("image_id"), get("category_id"), get("bbox"), get("iscrowd") or 0
        given = get("keypoints")
        if is_int(category):
            self.used.add(category)
            if given is not None and isinstance(given, list) and len(given) % 3 == 0:
                self.most_points[category] = max(self.most_points.get(category, 0), len(given) // 3)
        if not (is_int(category) and is_int(image) and _is_box(box) and crowd in (0, 1)):
            self.odd[place] = entry
            rows.named[place] = _name(entry, place)
            rows.add(0, 0, (0.0, 0.0, 0.0, 0.0), 0)
            return
        seen: Sequence[float] = ()
        number, area, outline = get("id"), get("area"), None
        if not is_int(number):
            number, rows.named[place] = 0, _name(entry, place)
        if (segmentation := get("segmentation")) is not None:
            outline, usable = segments(segmentation)
            if not usable:
                self.unusable.append(place)
        if given is not None and given != []:
            if are_points(given):
                seen = given
            else:
                self.poses[place] = given
        rows.add(
            image,
            category,
            box,
            number,
            crowd=bool(crowd),
            area=area if is_number(area) else _NAN,
            outline=outline,
            points=seen,
        )


def _name(entry: object, place: int) -> str:
    number = f"number {place + 1}"
    return f"annotation {short(entry.get('id', number) if isinstance(entry, dict) else number)}"


def _is_box(box: object) -> TypeGuard[list[float]]:
    return isinstance(box, list) and len(box) == 4 and are_numbers(box, finite=False)


def related(
    found: Annotations,
    index_of: Mapping[int, int],
    sizes: np.ndarray,
    categories: Sequence[Category],
    renamed: Mapping[int, int | None],
    problems: Problems,
) -> Rows:
    """The rows of annotations, with the images and the categories of training that they belong to.

    Args:
        found: the annotations.
        index_of: image id -> index, or `REFUSED`.
        sizes: `[I, 2]` (height, width) of the images.
        categories: of the training file.
        renamed: category id in this file -> in the training file; None: it does not exist there.
        problems: receives what is wrong.
    """
    rows = found.rows
    image = _looked_up(rows.image, index_of)
    category = _looked_up(rows.category, {number: to for number, to in renamed.items() if to is not None})
    is_odd = np.zeros(len(rows), bool)
    is_odd[list(found.odd)] = True
    sound = ~is_odd & (image >= 0) & (category != _UNKNOWN)
    known = ", ".join(f"{c.id} {c.name!r}" for c in categories[:12])
    strange: Counter[int] = Counter()
    for place in np.flatnonzero(~sound & (is_odd | (image != REFUSED))).tolist():
        entry = found.odd.get(place, {"image_id": rows.image[place], "category_id": rows.category[place]})
        _refuse(entry, place, rows, index_of, renamed, known, strange, problems)
    rows.image = array("q", np.where(sound, image, -1).tobytes())
    rows.category = array("q", np.where(sound, category, 0).tobytes())
    places = np.flatnonzero(sound)
    _say_ids(rows, places, problems)
    _say_segmentations(found, sound, sizes, problems)
    _say_keypoints(found, places, {c.id: len(c.keypoints) for c in categories}, problems)
    for number, count in strange.items():
        kind = "objects of classes that the training file does not have were left out"
        problems.warn(kind, f"category {number} ({count} objects)")
    rows.searched = f"{len(rows)} entries in the list 'annotations'"
    return rows


def _looked_up(ids: Sequence[int], table: Mapping[int, int]) -> np.ndarray:
    """`[n]` int64 what a table has for each id, or `_UNKNOWN`."""
    keys, values = np.array([*table], np.int64), np.array([*table.values()], np.int64)
    order = np.argsort(keys)
    keys, values = np.append(keys[order], LARGEST), np.append(values[order], _UNKNOWN)
    at = np.searchsorted(keys, np.asarray(ids))
    return np.where(keys[at] == ids, values[at], _UNKNOWN)


def _refuse(
    entry: object,
    place: int,
    rows: Rows,
    index_of: Mapping[int, int],
    renamed: Mapping[int, int | None],
    known: str,
    strange: Counter[int],
    problems: Problems,
) -> None:
    """Say why an entry is not used."""
    if not isinstance(entry, dict):
        problems.error("annotations are objects", f"annotation number {place + 1} is a {type(entry).__name__}")
        return
    where, image, category = rows[place], entry.get("image_id"), entry.get("category_id")
    if not is_int(image) or image not in index_of:
        kind = "annotations of images that the file does not list; add the image or drop the annotation"
        problems.error(kind, f"{where}: there is no image {short(image)}")
    elif index_of[image] == REFUSED:
        return
    elif not is_int(category) or category not in renamed:
        kind = f"annotations of categories that the file does not define; the training file has {known}"
        problems.error(kind, f"{where}: category {short(category)} is not one of them")
    elif renamed[category] is None:
        strange[category] += 1
    elif not _is_box(entry.get("bbox")):
        problems.error("a bbox is four numbers x, y, width, height", f"{where}: its bbox is {short(entry.get('bbox'))}")
    else:
        problems.error("iscrowd is 0 or 1", f"{where}: its iscrowd is {short(entry.get('iscrowd'))}")


def _say_ids(rows: Rows, places: np.ndarray, problems: Problems) -> None:
    unnamed = np.ones(len(rows), bool)
    unnamed[list(rows.named)] = False
    places = places[unnamed[places]]
    numbers = np.asarray(rows.number)[places]
    first = np.zeros(len(places), bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    for place in places[~first].tolist():
        problems.warn("annotation ids occur twice; each annotation is used", rows[place])


def _say_segmentations(found: Annotations, sound: np.ndarray, sizes: np.ndarray, problems: Problems) -> None:
    """Refuse segmentations that cannot be used, and run-length codes of another size than their image."""
    rows = found.rows
    given = frames(rows.outlines, rows.outline_ends)
    coded = np.flatnonzero((given[:, 0] >= 0) & sound)
    wrong = coded[(given[coded] != sizes[np.asarray(rows.image)[coded]]).any(1)]
    rows.without_outline = wrong.tolist()
    for place in sorted({*(place for place in found.unusable if sound[place]), *rows.without_outline}):
        problems.warn("segmentations that cannot be used were replaced by their box", rows[place])


def _say_keypoints(found: Annotations, places: np.ndarray, counts: Mapping[int, int], problems: Problems) -> None:
    rows, ends = found.rows, np.asarray(found.rows.point_ends)
    lengths, values = np.diff(ends, prepend=0), np.asarray(rows.points)
    wanted = 3 * _looked_up(rows.category, counts)
    suspects = (lengths > 0) & (lengths != wanted)
    suspects[np.searchsorted(ends, 3 * np.flatnonzero(~np.isin(values[2::3], (0, 1, 2))), side="right")] = True
    suspects[list(found.poses)] = True
    for place in places[suspects[places]].tolist():
        start = ends[place] - lengths[place]
        given = found.poses.get(place, values[start : ends[place]].tolist())
        values[start : ends[place]] = 0  # the pose is not used
        complaint = points_complaint(given, counts[rows.category[place]])
        kind = "keypoints are x, y and visibility (0, 1 or 2) of every keypoint of the category"
        problems.error(kind, f"{rows[place]}: {complaint}")
