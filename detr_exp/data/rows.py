"""Annotations on their way from a file to a `TableSplit`: columns, what is odd about them, and which are kept."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from detr_exp.data.content import Category, Outline
from detr_exp.data.conventions import CORNER_AND_SIDES, check_convention, check_extents, spans
from detr_exp.data.outlines import packed, reaches, unpacked
from detr_exp.data.problems import Problems
from detr_exp.data.table import TableSplit, Texts, corners

_TELLING = 10_000  # largest number of objects whose outlines and keypoints are compared with their boxes
_ODD = 0x9E3779B97F4A7C15  # hash multiplier: its powers spread the bits of a number over 64


@dataclass
class Images:
    """The images of a split: path, id, and (height, width) each."""

    paths: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Rows:
    """Annotations as they are in the files, a column per field; `add` appends one.

    Attributes:
        image: index into the images; -1: the annotation is not used.
        category: original category id.
        box_xywh: corner and sides in pixels, four numbers each, unchecked.
        crowd: a region with an unknown number of objects; never trained on.
        area: as annotated, in square pixels; NaN: that of the box.
        outlines: all of them, packed.
        outline_ends: the end of each.
        points: x, y, visibility of the keypoints of all.
        point_ends: the end of each.
        file: index into `files`.
        number: of the annotation in its file.
        files: the annotation files.
        names: what messages call an annotation, of file and number.
        named: what they call others, by their place.
        without_outline: places of annotations whose outline is not used.
        convention: in which the four numbers of a box were read.
        searched: where annotations were searched, for the message when there are none.
    """

    names: str
    convention: str = CORNER_AND_SIDES
    searched: str = ""
    files: list[str] = field(default_factory=list)
    named: dict[int, str] = field(default_factory=dict)
    without_outline: list[int] = field(default_factory=list)
    image: array[int] = field(default_factory=lambda: array("q"))
    category: array[int] = field(default_factory=lambda: array("q"))
    box_xywh: array[float] = field(default_factory=lambda: array("d"))
    crowd: array[int] = field(default_factory=lambda: array("b"))
    area: array[float] = field(default_factory=lambda: array("d"))
    outlines: bytearray = field(default_factory=bytearray)
    outline_ends: array[int] = field(default_factory=lambda: array("q"))
    points: array[float] = field(default_factory=lambda: array("d"))
    point_ends: array[int] = field(default_factory=lambda: array("q"))
    file: array[int] = field(default_factory=lambda: array("q"))
    number: array[int] = field(default_factory=lambda: array("q"))

    def add(
        self,
        image: int,
        category: int,
        box_xywh: Sequence[float],
        number: int,
        *,
        crowd: bool = False,
        area: float = float("nan"),
        outline: Outline | None = None,
        points: Sequence[float] = (),
    ) -> None:
        """Append an annotation of the last of `files`."""
        self.image.append(image)
        self.category.append(category)
        self.box_xywh.extend(box_xywh)
        self.crowd.append(crowd)
        self.area.append(area)
        if outline is not None:
            self.outlines += packed(outline)
        self.outline_ends.append(len(self.outlines))
        if points:
            self.points.extend(points)
        self.point_ends.append(len(self.points))
        if self.files:
            self.file.append(len(self.files) - 1)
        self.number.append(number)

    def extend(
        self,
        ids: Sequence[np.ndarray],
        boxes: np.ndarray,
        crowd: np.ndarray,
        areas: np.ndarray,
        outlines: Mapping[int, Outline],
    ) -> None:
        """As `add` for n without keypoints.

        Args:
            ids: `[n]` of the images, categories and annotations.
            boxes: `[4 n]`.
            crowd: `[n]`, as are `areas`.
            outlines: of some of them.
        """
        columns: tuple[array[int] | array[float], ...] = (self.image, self.category, self.number)
        columns += (self.box_xywh, self.crowd, self.area)
        count = len(areas)
        for column, more in zip(columns, (*ids, boxes, crowd, areas)):
            column.frombytes(more.astype(column.typecode).tobytes())
        done = 0
        for place in sorted(outlines):
            self.outline_ends.extend([len(self.outlines)] * (place - done))
            self.outlines += packed(outlines[place])
            done = place
        self.outline_ends.extend([len(self.outlines)] * (count - done))
        self.point_ends.extend([len(self.points)] * count)
        if self.files:
            self.file.extend([len(self.files) - 1] * count)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, place: int) -> str:
        """What messages call the annotation at this place."""
        if place in self.named:
            return self.named[place]
        file = self.files[self.file[place]] if self.files else ""
        return self.names.format(file=file, number=self.number[place])


class _Some:
    """What messages call some annotations.

    Args:
        rows: all of them.
        places: `[n]` of these.
    """

    def __init__(self, rows: Rows, places: np.ndarray) -> None:
        self.rows, self.places = rows, places

    def __getitem__(self, index: int) -> str:
        return self.rows[int(self.places[index])]


def tabulated(
    images: Images, rows: Rows, categories: list[Category], fingerprint: str, problems: Problems
) -> TableSplit:
    """Annotations as a split, without those that cannot be used.

    Boxes that are not finite, have no area, or lie outside their image are dropped with a warning, from training and
    from the ground truth. Boxes are clipped to the image for training; the ground truth has them as annotated.
    Keypoints outside their image are part of the ground truth, but not trained on. Duplicates count, with a warning.

    Args:
        images: in the order of the split.
        rows: their annotations, in any order.
        categories: of the training split.
        fingerprint: a hash of the annotations.
        problems: receives the warnings, and an error where boxes are in another convention.
    """
    sizes = np.array(images.sizes, np.int64).reshape(-1, 2)
    owner, boxes, areas = np.asarray(rows.image), np.asarray(rows.box_xywh).reshape(-1, 4), np.asarray(rows.area)
    places = np.flatnonzero(owner >= 0)
    if len(places) < len(rows):
        owner, boxes, areas = owner[places], boxes[places], areas[places]
    category = np.asarray(rows.category)[places]
    where = _Some(rows, places)
    check_convention(boxes, sizes[owner], areas, rows.convention, where, problems)
    keep = _sound(images, owner, boxes, sizes, where, problems)
    _say_twice(images.paths, owner, category, boxes, where, problems)
    total = len(places)
    keep = keep[np.argsort(owner[keep], kind="stable")]
    places, owner, boxes, areas, category = places[keep], owner[keep], boxes[keep], areas[keep], category[keep]
    where = _Some(rows, places)
    crowd, number = np.asarray(rows.crowd)[places] > 0, np.asarray(rows.number)[places]
    columns = {
        "ids": np.array(images.ids, np.int64),
        "sizes": sizes,
        "starts": np.searchsorted(owner, np.arange(len(sizes) + 1)),
        "boxes_xywh": boxes,
        "category": category,
        "number": number if len(np.unique(number)) == len(number) else np.arange(1, len(number) + 1),
        "crowd": crowd,
        "area": np.where(np.isfinite(areas) & (areas > 0), areas, boxes[:, 2:].prod(1)),
    }
    outlines = _outlines(rows, places, boxes, sizes[owner], where, problems)
    if (outlines["outline_lengths"][~crowd] > 0).any():
        columns |= outlines
    if most := max((len(category.keypoints) for category in categories), default=0):
        columns["keypoints"] = _keypoints(rows, places, boxes, sizes[owner], most, where, problems)
    account = (
        f"{len(sizes)} images, {total} annotations: {total - len(keep)} dropped, {crowd.sum()} crowd or ignored, "
        f"{(~crowd).sum()} to train on" + f"; {rows.searched}" * bool(rows.searched)
    )
    return TableSplit(Texts.of(images.paths), columns, categories, fingerprint, account)


def _sound(
    images: Images, owner: np.ndarray, given: np.ndarray, sizes: np.ndarray, where: _Some, problems: Problems
) -> np.ndarray:
    """`[n]` indices of the rows whose box can be used."""
    boxes = corners(given)
    finite = np.asarray(np.isfinite(boxes).all(1))
    inside = np.clip(np.where(finite[:, None], boxes, 0), 0, sizes[owner][:, [1, 0, 1, 0]])
    sound = finite & ((inside[:, 2:] - inside[:, :2]).clip(0).prod(1) > 0)
    for i in np.flatnonzero(~sound).tolist():
        x, y, w, h = given[i].tolist()
        if not finite[i]:
            kind = "boxes that are not finite were dropped"
        elif max(w, 0) * max(h, 0) > 0:
            kind = "boxes outside their image were dropped"
        else:
            kind = "boxes without area were dropped"
        size = f"{w:g}x{h:g} at ({x:g}, {y:g})"
        problems.warn(kind, f"{where[i]}: {size} in {os.path.basename(images.paths[owner[i]])!r}")
    return np.flatnonzero(sound)


def _say_twice(
    paths: Sequence[str],
    owner: np.ndarray,
    category: np.ndarray,
    boxes: np.ndarray,
    where: _Some,
    problems: Problems,
) -> None:
    """Warn of images that are listed, and of objects that are annotated, more than once."""
    if len(set(paths)) < len(paths):
        for path, times in Counter(paths).items():
            if times > 1:
                kind = "images that are listed more than once; each entry is used, with its own annotations"
                problems.warn(kind, f"{path}: {times} times")
    hashed = np.zeros(len(owner), np.uint64)
    with np.errstate(over="ignore"):  # one number per row sorts ten times faster than six
        for power, column in enumerate((owner, category, *boxes.T), start=1):
            value = column.astype(np.float64) + 0.0  # -0.0 is 0.0
            hashed += value.view(np.uint64) * np.uint64(_ODD) ** np.uint64(power)
    common, counts = np.unique(hashed, return_counts=True)
    if len(common) == len(hashed):
        return
    groups: dict[tuple[float, ...], list[int]] = {}
    for i in np.flatnonzero(np.isin(hashed, common[counts > 1])).tolist():
        groups.setdefault((int(owner[i]), int(category[i]), *boxes[i].tolist()), []).append(i)
    for alike in groups.values():
        if len(alike) > 1:
            kind = "objects that are annotated twice, with the same class and box; all of them are used"
            problems.warn(kind, f"{paths[owner[alike[0]]]}: {where[alike[0]]}, {len(alike)} times")


def _outlines(
    rows: Rows, places: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, where: _Some, problems: Problems
) -> dict[str, np.ndarray]:
    """The outlines of some annotations, and where each is; compares a sample that is large enough with its boxes.

    Outlying vertices are clamped to one image width from the image: rasterising uses memory in proportion to the
    distance between vertices.
    """
    ends = np.asarray(rows.outline_ends)
    lengths = np.diff(ends, prepend=0)
    lengths[rows.without_outline] = 0
    starts, lengths, data = (ends - np.diff(ends, prepend=0))[places], lengths[places], rows.outlines

    def outline(i: int) -> Outline | None:
        return unpacked(np.frombuffer(data, np.uint8)[starts[i] : starts[i] + lengths[i]])

    some = _sample(len(places))
    check_extents(
        "outlines",
        spans([found if isinstance(found := outline(i), list) else None for i in some]),
        boxes[some],
        _Some(rows, places[some]),
        problems,
    )
    most = 2 * sizes.max(1, initial=0)
    far = np.flatnonzero(reaches(np.frombuffer(data, np.uint8), starts, lengths) > most).tolist()
    near = [packed([[min(max(v, -most[i]), most[i]) for v in polygon] for polygon in outline(i) or ()]) for i in far]
    for i, part in zip(far, near):
        starts[i], lengths[i] = len(data), len(part)
        data += part
    return {"outlines": np.frombuffer(data, np.uint8), "outline_starts": starts, "outline_lengths": lengths}


def _keypoints(
    rows: Rows, places: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, most: int, where: _Some, problems: Problems
) -> np.ndarray:
    """`[n, most, 3]` float32; unlabelled points are zero. Compares a sample that is large enough with its boxes."""
    ends, values = np.asarray(rows.point_ends), np.asarray(rows.points)
    lengths = np.diff(ends, prepend=0)[places]
    starts = ends[places] - lengths
    table = np.zeros((len(places), most, 3), np.float32)
    for length in np.unique(lengths[lengths > 0]).tolist():
        own = np.flatnonzero(lengths == length)
        points = values[starts[own, None] + np.arange(length)].reshape(len(own), -1, 3)[:, :most]
        table[own, : points.shape[1]] = points
    table[table[..., 2] <= 0] = 0
    away = ((table[..., :2] < 0) | (table[..., :2] > sizes[:, None, ::-1])).any((1, 2))
    for i in np.flatnonzero(away).tolist():
        problems.warn("keypoints outside their image are not trained on", where[i])
    some = _sample(len(places))
    seen = np.where(table[some][..., 2:] > 0, table[some][..., :2], np.nan)
    extents = np.concatenate([np.fmin.reduce(seen, 1), np.fmax.reduce(seen, 1)], 1)
    check_extents("keypoints", extents, boxes[some], _Some(rows, places[some]), problems)
    return table


def _sample(count: int) -> np.ndarray:
    return np.arange(0, count, max(1, count // _TELLING))
