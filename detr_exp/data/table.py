"""A split that was read from annotation files, stored as flat arrays.

Arrays instead of an object per annotation: COCO's 860 000 annotations use a tenth of the memory, and loader processes
share them (reading a Python object writes its reference count and copies its memory page).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from detr_exp.data.content import Category, Objects, Outline, Split
from detr_exp.data.image import read_image
from detr_exp.data.outlines import unpacked
from detr_exp.values import Values


@dataclass
class Flat:
    """The objects of all images of a split.

    Attributes:
        sizes: `[I, 2]` (height, width) of the images.
        counts: `[I]` their numbers of objects.
        categories: `[n]` of the objects, image after image.
        boxes_xyxy: `[n, 4]` of the objects, in pixels.
    """

    sizes: np.ndarray
    counts: np.ndarray
    categories: np.ndarray
    boxes_xyxy: np.ndarray

    @property
    def owner(self) -> np.ndarray:
        """`[n]` the image of each object."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


@runtime_checkable
class Flattened(Protocol):
    """A split that gives the objects of all images at once."""

    def flat(self) -> Flat: ...


def flat(split: Split, indices: Sequence[int] | None = None) -> Flat:
    """The objects of any split, or of some of its images."""
    if isinstance(split, Flattened) and indices is None:
        return split.flat()
    indices = range(len(split)) if indices is None else indices
    found = [split.objects(index) for index in indices]
    return Flat(
        np.array([split.size(index) for index in indices]).reshape(-1, 2),
        np.array([len(objects) for objects in found], np.int64),
        np.concatenate([np.zeros(0, np.int64), *(objects.categories for objects in found)]),
        np.concatenate([np.zeros((0, 4)), *(objects.boxes_xyxy for objects in found)]),
    )


@dataclass
class Texts:
    """A sequence of paths in one array.

    Attributes:
        data: `[b]` uint8, one after another.
        ends: `[n]` int64 the end of each.
    """

    data: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        parts = [os.fsencode(text) for text in texts]
        return cls(np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])[1:])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        end = self.ends[index]
        start = self.ends[index - 1] if index % len(self) else 0
        return os.fsdecode(self.data[start:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        data, start = self.data.tobytes(), 0
        for end in self.ends.tolist():
            yield os.fsdecode(data[start:end])
            start = end


class TableSplit:
    """Images on disk with their annotations; see `content.Split` and `rows.tabulated`.

    Args:
        paths: of the images, in the order of the split.
        columns: of the I images `ids` `[I]`, `sizes` `[I, 2]` (height, width), and `starts` `[I + 1]`: image `i` has
            the objects `starts[i]` to `starts[i + 1]`. Of the n objects `boxes_xywh` `[n, 4]` float64, `category`
            `[n]`, `number` `[n]` (unique; that of the annotation in its file, where these are), `crowd` `[n]` bool,
            `area` `[n]` float64. Where there are any, `keypoints` `[n, K, 3]` float32, and `outlines` `[b]` uint8 (see
            `outlines.packed`) with `outline_starts` and `outline_lengths` `[n]`.
        categories: of the training split.
        fingerprint: a hash of the annotations.
        account: numbers of images and annotations and what was searched, for the message without objects to train on.
    """

    def __init__(
        self,
        paths: Texts,
        columns: Mapping[str, np.ndarray],
        categories: list[Category],
        fingerprint: str,
        account: str,
    ) -> None:
        self.paths, self.columns, self.categories = paths, columns, categories
        self.fingerprint, self.account = fingerprint, account
        self.channels = 3
        self.sizes, self.starts, self.crowd = columns["sizes"], columns["starts"], columns["crowd"]
        self.boxes_xywh, self.category, self.area = columns["boxes_xywh"], columns["category"], columns["area"]
        self.keypoints = columns.get("keypoints")
        self.has_keypoints, self.has_masks = self.keypoints is not None, "outlines" in columns

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_ids(self) -> Sequence[int]:
        return self.columns["ids"].data  # of numbers as Python has them

    @cached_property
    def counts(self) -> np.ndarray:
        """`[I]` int64 the number of objects of each image to train on."""
        before = np.append(0, np.cumsum(~self.crowd))
        return before[self.starts[1:]] - before[self.starts[:-1]]

    @property
    def most_objects(self) -> int:
        return int(self.counts.max(initial=0))

    def flat(self) -> Flat:
        """What `objects` returns of every image, without outlines and keypoints, in one."""
        rows = np.flatnonzero(~self.crowd)
        limits = self.sizes[:, [1, 0, 1, 0]].repeat(self.counts, 0)
        return Flat(self.sizes, self.counts, self.category[rows], np.clip(corners(self.boxes_xywh[rows]), 0, limits))

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
            boxes_xyxy=np.clip(corners(self.boxes_xywh[rows]), 0, (width, height, width, height)),
            segments=[*map(self._segment, rows.tolist())] if self.has_masks else None,
            keypoints=None if self.keypoints is None else self.keypoints[rows],
        )

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        return read_image(Path(self.paths[index]), self.size(index), smallest, channels=self.channels)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def truth(self) -> Values:
        counts = {category.id: len(category.keypoints) for category in self.categories}
        annotations = []
        for index, image_id in enumerate(self.image_ids):
            for i in range(self.starts[index], self.starts[index + 1]):
                x, y, w, h = self.boxes_xywh[i].tolist()
                annotation: Values = {
                    "id": int(self.columns["number"][i]),
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
        start = self.columns["outline_starts"][i]
        return unpacked(self.columns["outlines"][start : start + self.columns["outline_lengths"][i]])


def category_entry(category: Category) -> Values:
    """A category as in COCO files (whose skeletons count from 1)."""
    entry: Values = {"id": category.id, "name": category.name}
    if category.keypoints:
        entry["keypoints"] = category.keypoints
        entry["skeleton"] = [[a + 1, b + 1] for a, b in category.skeleton]
    return entry


def corners(boxes_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1)
