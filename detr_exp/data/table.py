"""A split that was read from annotation files, stored as flat arrays.

Arrays instead of an object per annotation: COCO's 860 000 annotations use a tenth of the memory, and loader processes
share them (reading a Python object writes its reference count and copies its memory page).
"""

from __future__ import annotations

import marshal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detr_exp.data.content import Category, Objects, Outline
from detr_exp.data.conventions import CORNER_AND_SIDES, check_convention, check_extents, spans
from detr_exp.data.image import read_image
from detr_exp.data.problems import Problems
from detr_exp.values import Values

_TELLING = 10_000  # largest number of objects whose outlines and keypoints are compared with their boxes
_ODD = 0x9E3779B97F4A7C15  # hash multiplier: its powers spread the bits of a number over 64


@dataclass
class Images:
    """The images of a split: path, id, and (height, width) each."""

    paths: list[Path] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Rows:
    """Annotations as they are in the file, one list per field.

    Attributes:
        where: name of the annotation in messages.
        image: index into the images.
        category: original category id.
        box_xywh: corner and sides in pixels, unchecked.
        crowd: a region with an unknown number of objects; never trained on.
        area: as annotated, in square pixels; None: that of the box.
        segments: polygons or RLE; None where there is only a box.
        keypoints: flat x, y, visibility; None where there are none.
        convention: in which the four numbers of a box were read.
        searched: where annotations were searched, for the message when there are none.
    """

    where: list[str] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    box_xywh: list[tuple[float, float, float, float]] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float | None] = field(default_factory=list)
    segments: list[Outline | None] = field(default_factory=list)
    keypoints: list[Sequence[float] | None] = field(default_factory=list)
    convention: str = CORNER_AND_SIDES
    searched: str = ""


class TableSplit:
    """Images on disk with their annotations; see `content.Split`.

    Boxes that are not finite, have no area, or lie outside their image are dropped with a warning, from training and
    from the ground truth. Boxes are clipped to the image for training; the ground truth has them as annotated.
    Keypoints outside their image are part of the ground truth, but not trained on. Duplicates count, with a warning.

    Args:
        images: in the order of the split.
        rows: their annotations, in any order.
        categories: of the training split.
        fingerprint: a hash of the annotations.
        problems: receives the warnings, and an error where boxes are in another convention.

    Attributes:
        account: numbers of images and annotations and what was searched, for the message without objects to train on.
    """

    def __init__(
        self, images: Images, rows: Rows, categories: list[Category], fingerprint: str, problems: Problems
    ) -> None:
        self.paths = [str(path) for path in images.paths]
        self.image_ids = images.ids
        self.sizes = np.array(images.sizes, np.int64).reshape(-1, 2)
        self.categories = categories
        self.fingerprint = fingerprint
        _refuse_convention(rows, self.sizes, problems)
        keep = _sound(images, rows, self.sizes, problems)
        _say_twice(self.paths, rows, problems)
        keep = keep[np.argsort(np.array(rows.image, np.int64)[keep], kind="stable")]
        owner = np.array(rows.image, np.int64)[keep]
        self.starts = np.searchsorted(owner, np.arange(len(self.paths) + 1))
        self.boxes_xywh = np.array(rows.box_xywh, np.float64).reshape(-1, 4)[keep]
        self.category = np.array(rows.category, np.int64)[keep]
        self.crowd = np.array(rows.crowd, bool)[keep]
        self.most_objects = int(np.bincount(owner[~self.crowd]).max(initial=0))
        self.account = (
            f"{len(self.paths)} images, {len(rows.where)} annotations: {len(rows.where) - len(keep)} dropped, "
            f"{self.crowd.sum()} crowd or ignored, {(~self.crowd).sum()} to train on"
            + f"; {rows.searched}"
            * bool(rows.searched)
        )
        given = np.array([np.nan if area is None else area for area in rows.area], np.float64)[keep]
        self.area = np.where(np.isfinite(given) & (given > 0), given, self.boxes_xywh[:, 2:].prod(1))
        self.has_masks = any(rows.segments[i] is not None and not rows.crowd[i] for i in keep.tolist())
        segments = [_near(rows.segments[i], images.sizes[rows.image[i]]) for i in keep.tolist()]
        self._blob, self._at = _packed(segments if self.has_masks else [])
        self.keypoints = _keypoints(
            rows, keep, self.sizes[owner], problems, max((len(c.keypoints) for c in categories), default=0)
        )
        self.has_keypoints = self.keypoints is not None
        self._refuse_units([rows.segments[i] for i in keep.tolist()], [rows.where[i] for i in keep.tolist()], problems)

    def _refuse_units(self, segments: list[Outline | None], where: list[str], problems: Problems) -> None:
        """Compare outlines and keypoints with their boxes, of a sample of the objects that is large enough."""
        rows = range(0, len(where), max(1, len(where) // _TELLING))
        boxes, names = self.boxes_xywh[rows], [where[i] for i in rows]
        outlines = [outline if isinstance(outline, list) else None for outline in (segments[i] for i in rows)]
        check_extents("outlines", spans(outlines), boxes, names, problems)
        if self.keypoints is not None:
            points = np.where(self.keypoints[rows][..., 2:] > 0, self.keypoints[rows][..., :2], np.nan)
            low, high = np.fmin.reduce(points, 1), np.fmax.reduce(points, 1)
            check_extents("keypoints", np.concatenate([low, high], 1), boxes, names, problems)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index].tolist()
        return height, width

    def objects(self, index: int) -> Objects:
        height, width = self.size(index)
        start, end = self.starts[index], self.starts[index + 1]
        rows = start + np.flatnonzero(~self.crowd[start:end])
        return Objects(
            categories=self.category[rows],
            boxes_xyxy=np.clip(_corners(self.boxes_xywh[rows]), 0, (width, height, width, height)),
            segments=[*map(self._segment, rows.tolist())] if self.has_masks else None,
            keypoints=None if self.keypoints is None else self.keypoints[rows],
        )

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        return read_image(Path(self.paths[index]), self.size(index), smallest)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def truth(self) -> Values:
        counts = {category.id: len(category.keypoints) for category in self.categories}
        annotations = []
        for index, image_id in enumerate(self.image_ids):
            for i in range(self.starts[index], self.starts[index + 1]):
                x, y, w, h = self.boxes_xywh[i].tolist()
                annotation: Values = {
                    "id": i + 1,
                    "image_id": image_id,
                    "category_id": int(self.category[i]),
                    "bbox": [x, y, w, h],
                    "area": float(self.area[i]),
                    "iscrowd": int(self.crowd[i]),
                }
                if self.has_masks:
                    annotation["segmentation"] = self._segment(i) or [[x, y, x + w, y, x + w, y + h, x, y + h]]
                if self.keypoints is not None:
                    points = self.keypoints[i][: counts[int(self.category[i])]]
                    annotation["keypoints"] = points.reshape(-1).tolist()
                    annotation["num_keypoints"] = int((points[:, 2] > 0).sum())
                annotations.append(annotation)
        images = [
            {"id": image_id, "file_name": path, "height": height, "width": width}
            for image_id, path, (height, width) in zip(self.image_ids, self.paths, self.sizes.tolist())
        ]
        categories = [category_entry(category) for category in self.categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _segment(self, i: int) -> Outline | None:
        return marshal.loads(self._blob[self._at[i] : self._at[i + 1]])


def category_entry(category: Category) -> Values:
    """A category as in COCO files (whose skeletons count from 1)."""
    entry: Values = {"id": category.id, "name": category.name}
    if category.keypoints:
        entry["keypoints"] = category.keypoints
        entry["skeleton"] = [[a + 1, b + 1] for a, b in category.skeleton]
    return entry


def _sound(images: Images, rows: Rows, sizes: np.ndarray, problems: Problems) -> np.ndarray:
    """`[n]` indices of the rows whose box can be used."""
    given = np.array(rows.box_xywh, np.float64).reshape(-1, 4)
    boxes = _corners(given)
    heights, widths = sizes[np.array(rows.image, np.int64)].reshape(-1, 2).T
    finite = np.asarray(np.isfinite(boxes).all(1))
    inside = np.clip(np.where(finite[:, None], boxes, 0), 0, np.stack([widths, heights, widths, heights], 1))
    area = (inside[:, 2:] - inside[:, :2]).clip(0).prod(1)
    whole = given[:, 2:].clip(0).prod(1)
    for i in np.flatnonzero(~(finite & (area > 0))).tolist():
        x, y, w, h = rows.box_xywh[i]
        if not finite[i]:
            kind = "boxes that are not finite were dropped"
        elif whole[i] > 0:
            kind = "boxes outside their image were dropped"
        else:
            kind = "boxes without area were dropped"
        size = f"{w:g}x{h:g} at ({x:g}, {y:g})"
        problems.warn(kind, f"{rows.where[i]}: {size} in {images.paths[rows.image[i]].name!r}")
    return np.flatnonzero(finite & (area > 0))


def _refuse_convention(rows: Rows, sizes: np.ndarray, problems: Problems) -> None:
    areas = np.array([np.nan if area is None else area for area in rows.area], np.float64)
    boxes = np.array(rows.box_xywh, np.float64).reshape(-1, 4)
    owner = np.array(rows.image, np.int64)
    check_convention(boxes, sizes[owner], areas, rows.convention, rows.where, problems)


def _say_twice(paths: Sequence[str], rows: Rows, problems: Problems) -> None:
    """Warn of images that are listed, and of objects that are annotated, more than once."""
    for path, times in Counter(paths).items():
        if times > 1:
            kind = "images that are listed more than once; each entry is used, with its own annotations"
            problems.warn(kind, f"{path}: {times} times")
    if not rows.where:
        return
    table = np.column_stack([rows.image, rows.category, rows.box_xywh]).astype(np.float64) + 0.0  # -0.0 is 0.0
    with np.errstate(over="ignore"):  # one number per row sorts ten times faster than six
        hashed = (table.view(np.uint64) * np.uint64(_ODD) ** np.arange(1, 7, dtype=np.uint64)).sum(1)
    common, counts = np.unique(hashed, return_counts=True)
    suspects = np.flatnonzero(np.isin(hashed, common[counts > 1]))
    groups: dict[tuple[float, ...], list[int]] = {}
    for i in suspects.tolist():
        groups.setdefault(tuple(table[i].tolist()), []).append(i)
    for alike in groups.values():
        if len(alike) > 1:
            kind = "objects that are annotated twice, with the same class and box; all of them are used"
            problems.warn(kind, f"{paths[rows.image[alike[0]]]}: {rows.where[alike[0]]}, {len(alike)} times")


def _near(segment: Outline | None, size: tuple[int, int]) -> Outline | None:
    """Clamp outlying vertices of polygons to one image width from the image: rasterising uses memory in proportion to
    the distance between vertices."""
    reach = 2 * max(size)
    if isinstance(segment, list) and any(min(polygon) < -reach or max(polygon) > reach for polygon in segment):
        return [[min(max(v, -reach), reach) for v in polygon] for polygon in segment]
    return segment


def _packed(items: list[Outline | None]) -> tuple[bytes, np.ndarray]:
    parts = [marshal.dumps(item) for item in items]
    return b"".join(parts), np.cumsum([0, *map(len, parts)])


def _keypoints(rows: Rows, keep: np.ndarray, sizes: np.ndarray, problems: Problems, most: int) -> np.ndarray | None:
    """`[n, most, 3]` float32; unlabelled points are zero."""
    if most == 0:
        return None
    table = np.zeros((len(keep), most, 3), np.float32)
    for row, i in enumerate(keep.tolist()):
        given = rows.keypoints[i]
        if given is not None:
            points = np.array(given, np.float32).reshape(-1, 3)[:most]
            table[row, : len(points)] = points
    table[table[..., 2] <= 0] = 0
    away = ((table[..., :2] < 0) | (table[..., :2] > sizes[:, None, ::-1])).any((1, 2))
    for row in np.flatnonzero(away).tolist():
        problems.warn("keypoints outside their image are not trained on", rows.where[keep[row]])
    return table


def _corners(boxes_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1)
