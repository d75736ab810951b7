"""The common result of all data layouts: categories, splits and the objects of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from detr_exp.values import Values

SPLITS = ("train", "val", "test")
TARGET_FIELDS = ("labels", "boxes", "masks", "keypoints", "annotated")  # of `structures.Target`, and no names of others


@dataclass
class Category:
    """One class as the annotations name it.

    Attributes:
        id: the id in the annotations, which all output files use as well.
        name: unique within a data set.
        keypoints: names of its keypoints, in order; empty where it has none.
        skeleton: 0-based pairs of keypoints joined by a line.
        flip_pairs: 0-based pairs of keypoints that are swapped when mirrored; None: derived from the names.
        sigmas: OKS scale per keypoint; None: COCO's for its 17 points, else 0.05.
    """

    id: int
    name: str
    keypoints: list[str] = field(default_factory=list)
    skeleton: list[tuple[int, int]] = field(default_factory=list)
    flip_pairs: list[tuple[int, int]] | None = None
    sigmas: list[float] | None = None


Outline = list[list[float]] | Values  # polygons x0, y0, x1, y1, ...; an RLE
Segment = Outline | np.ndarray  # ...; `[H, W]` bool


@dataclass
class Objects:
    """The objects of one image that are trained on, in its pixels.

    Attributes:
        categories: `[n]` int64 original category ids.
        boxes_xyxy: `[n, 4]` float64 inside the image, at least one of them.
        segments: per object a list of polygons `[x0, y0, x1, y1, ...]`, an RLE dict, an `[H, W]` bool array, or None
            where only the box is known; None where the split has no masks at all.
        keypoints: `[n, K, 3]` float32 x, y, visibility 0/1/2; None where the split has none.
        extra: `[n, ...]` numbers, by name: further data of each object. They stay with their object through
            augmentation and are passed to the loss terms. Every image of a split has the same names.
        image_extra: `[...]` numbers, by name, of the whole image; likewise, but such images make no mosaics and mixes.
        annotated: `[c]` int64 category ids that are annotated in this image: objects of others may be there, so that
            they are not background; None: all.

    Raises:
        ValueError: `extra` has not one row for each object, is not of numbers, or bears the name of another field.
    """

    categories: np.ndarray
    boxes_xyxy: np.ndarray
    segments: list[Segment | None] | None = None
    keypoints: np.ndarray | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    image_extra: dict[str, np.ndarray] = field(default_factory=dict)
    annotated: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, values in (*self.extra.items(), *self.image_extra.items()):
            if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
                raise ValueError(f"an image has {name!r} that is no array of numbers: give it as one, np.asarray(...)")
            if name in TARGET_FIELDS or (name in self.extra and name in self.image_extra):
                raise ValueError(f"an image has a second field {name!r}; give it another name, my_{name}")
        for name, values in self.extra.items():
            if values.ndim == 0 or len(values) != len(self):
                raise ValueError(
                    f"an image has {len(self)} objects, but {name!r} of the shape {list(values.shape)}; give it one "
                    f"row for each object, or put what belongs to the whole image into image_extra"
                )

    def __len__(self) -> int:
        return len(self.categories)


class Split(Protocol):
    """One part of a data set. Implementations are picklable: loader workers hold one each."""

    has_masks: bool
    has_keypoints: bool
    fingerprint: str

    @property
    def image_ids(self) -> Sequence[int]: ...

    @property
    def most_objects(self) -> int:
        """Largest number of objects in an image."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of the image in messages: its path."""

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, without decoding."""

    def objects(self, index: int) -> Objects: ...

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        """`[H, W, 3]` uint8 RGB; may be smaller than `size`, but not below `smallest` (height, width)."""

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        """`[H, W, 3]` uint8 RGB at full size, and the objects."""

    def truth(self) -> Values:
        """COCO-style dict (`images`, `annotations`, `categories`) with original ids, crowd regions included.

        An image may have `annotated`, the category ids that are annotated in it.
        """


@runtime_checkable
class Afar(Protocol):
    """A split whose images are no files of this machine, or one that passes on what another split knows of them."""

    def ahead(self, indices: Sequence[int]) -> None:
        """Begin to read the images that are used next."""

    def identity(self, index: int) -> str | None:
        """What tells an image and its content from all others, without reading it; None: a file tells it."""


def identity_of(split: Split, index: int) -> str | None:
    """See `Afar.identity`."""
    return split.identity(index) if isinstance(split, Afar) else None


def read_ahead(split: Split, indices: Sequence[int]) -> None:
    """See `Afar.ahead`."""
    if isinstance(split, Afar):
        split.ahead(indices)


@dataclass
class Content:
    """A data set as read from its layout.

    Attributes:
        layout: its name, for messages.
        origin: what defines the classes, for messages: the training annotation file.
        categories: in the order of their ids, from the training split.
        read: split name -> function that reads it, called at most once; splits that do not exist are absent.
    """

    layout: str
    origin: str
    categories: list[Category]
    read: Mapping[str, Callable[[], Split]]


class Source(Protocol):
    """Reads one layout, or generates images: from `data.root` and the values of `data.train`, `val`, `test`."""

    def __call__(self, root: str | None, places: Values, /) -> Content: ...
