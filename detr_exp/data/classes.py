"""Category ids of the annotations to the labels of the network, and back."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from detr_exp.data.content import Category
from detr_exp.data.keypoints import KeypointSchema, split_words

MODES = ("contiguous", "raw")


class ClassMap:
    """The mapping between category ids and labels.

    `contiguous`: labels are 0 .. n - 1 in the order of the category ids. `raw`: the label is the category id itself, as
    the published RF-DETR weights have it: `num_classes` is the largest id + 1, and ids without a category get a class
    that no object has.

    Args:
        categories: of the training split.
        mode: `contiguous` or `raw`.
        num_classes: classes of the network; None: as many as the data need.
        origin: where the categories were read, for messages.

    Attributes:
        classes: a name per label; control characters in it are escaped, for it is shown on terminals and pages.
        category_ids: the original id per label.
        num_classes: as above, never None.

    Raises:
        ValueError: unknown mode, no categories, or a number of classes that does not fit.
    """

    def __init__(self, categories: Sequence[Category], mode: str, num_classes: int | None, origin: str) -> None:
        if mode not in MODES:
            raise ValueError(f"data.category_ids is {mode!r}; use data.category_ids=contiguous or raw")
        if not categories:
            raise ValueError(f"{origin} defines no categories; a data set needs at least one class")
        ordered = sorted(categories, key=lambda category: category.id)
        largest = ordered[-1].id
        if mode == "raw" and ordered[0].id < 0:
            raise ValueError(f"{origin} has category id {ordered[0].id}; use data.category_ids=contiguous")
        needed = largest + 1 if mode == "raw" else len(ordered)
        if num_classes is not None and (num_classes < needed or (mode == "contiguous" and num_classes != needed)):
            what = f"has category ids up to {largest}" if mode == "raw" else f"defines {needed} categories"
            raise ValueError(
                f"data.num_classes is {num_classes} but {origin} {what}; drop data.num_classes "
                "to take them from the file"
            )
        self.num_classes = needed if num_classes is None else num_classes
        self.origin = origin
        if mode == "contiguous":
            self.category_ids = [category.id for category in ordered]
            self.by_label: list[Category | None] = list(ordered)
        else:
            self.category_ids = list(range(self.num_classes))
            known = {category.id: category for category in ordered}
            self.by_label = [known.get(i) for i in self.category_ids]
        self.classes = [_printable(c.name) if c else f"unused_{i}" for i, c in enumerate(self.by_label)]
        self._label_of = {i: label for label, i in enumerate(self.category_ids)}

    def labels(self, categories: np.ndarray) -> np.ndarray:
        """`[n]` int64 original ids to `[n]` int64 labels."""
        return np.array([self._label_of[i] for i in categories.tolist()], np.int64)

    def mask(self, categories: np.ndarray) -> np.ndarray:
        """`[num_classes]` bool: the labels of some original ids."""
        mask = np.zeros(self.num_classes, bool)
        mask[self.labels(categories)] = True
        return mask

    def __str__(self) -> str:
        pairs = [f"{c.id} -> {label} {c.name!r}" for label, c in enumerate(self.by_label) if c is not None]
        return ", ".join(pairs[:12]) + (f", ... ({len(pairs)} in all)" if len(pairs) > 12 else "")


@dataclass
class KnownLabels:
    """Labels without their data; see `protocols.Labels`.

    Attributes:
        classes: a name per label; empty where they are not known.
        category_ids: of the annotations, per label; empty likewise.
        num_classes: number of labels.
        keypoints: of each label, or None.
    """

    num_classes: int
    classes: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    keypoints: KeypointSchema | None = None


def confusable(names: Sequence[str]) -> list[str]:
    """Groups of names that differ only in case, spaces, punctuation or Unicode encoding."""
    alike: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        alike.setdefault(" ".join(split_words(plain)) or plain, []).append(repr(name))
    return [" and ".join(group) for group in alike.values() if len(group) > 1]


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
