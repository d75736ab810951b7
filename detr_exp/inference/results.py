"""What a detector found in images, for other libraries: supervision, pandas, COCO's tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
from torch import Tensor

from detr_exp.data.classes import KnownLabels
from detr_exp.inference.writers import COLUMNS, add_to_coco, coco_of, rows_of
from detr_exp.structures import Detections
from detr_exp.terminal import counted
from detr_exp.values import Values

if TYPE_CHECKING:
    import pandas as pd
    import supervision as sv


@dataclass(frozen=True)
class Result:
    """The objects in one image, highest score first.

    Attributes:
        name: the path of the image, of a frame `path#number`; of an image in memory its place among those given.
        size: height and width in pixels.
        detections: the objects, boxes in pixels of this image.
        known: names and category ids of the labels, and their keypoints.
    """

    name: str
    size: tuple[int, int]
    detections: Detections
    known: KnownLabels

    def __len__(self) -> int:
        return len(self.detections)

    @property
    def scores(self) -> Tensor:
        """`[n]` in 0..1."""
        return self.detections.scores

    @property
    def labels(self) -> Tensor:
        """`[n]` int64, indices of the detector's `classes`."""
        return self.detections.labels

    @property
    def boxes(self) -> Tensor:
        """`[n, 4]` x0, y0, x1, y1 in pixels."""
        return self.detections.boxes

    @property
    def masks(self) -> Tensor | None:
        """`[n, height, width]` bool, of networks with masks."""
        return self.detections.masks

    @property
    def keypoints(self) -> Tensor | None:
        """`[n, K, 3]` x, y in pixels and confidence, of networks with keypoints."""
        return self.detections.keypoints

    @property
    def classes(self) -> list[str]:
        """The name of every object's class."""
        return [self.known.classes[label] for label in self.labels.tolist()]

    def to_supervision(self) -> sv.Detections:
        """`supervision.Detections`, with `class_name` and, where there are, `keypoints` in its `data`.

        The same fields whether or not there are objects, so that results can be merged and filtered.

        Raises:
            ValueError: supervision is not installed.
        """
        try:
            import supervision as sv
        except ImportError:
            raise ValueError(
                "to_supervision() needs supervision, which is not installed: pip install supervision"
            ) from None
        data: dict[str, np.ndarray | list[object]] = {"class_name": np.array(self.classes, dtype=str)}
        if self.keypoints is not None:
            data["keypoints"] = self.keypoints.numpy()
        return sv.Detections(
            xyxy=self.boxes.numpy().astype(np.float32),
            mask=None if self.masks is None else self.masks.numpy(),
            confidence=self.scores.numpy().astype(np.float32),
            class_id=self.labels.numpy().astype(int),
            data=data,
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row per object; see `Results.to_pandas`."""
        return Results([self], self.known).to_pandas()

    def to_coco(self) -> Values:
        """COCO's format; see `Results.to_coco`."""
        return Results([self], self.known).to_coco()


class Results(Sequence[Result]):
    """What was found in several images, in their order.

    Args:
        results: one per image.
        known: the labels of the detector, which also images without objects have.
        skipped: names of images that could not be read.
    """

    def __init__(self, results: Sequence[Result], known: KnownLabels, skipped: Sequence[str] = ()) -> None:
        self.results, self.known, self.skipped = list(results), known, list(skipped)

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> Results: ...
    def __getitem__(self, index: int | slice) -> Result | Results:
        if isinstance(index, slice):
            return Results(self.results[index], self.known, self.skipped)
        return self.results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __repr__(self) -> str:
        objects = counted(sum(map(len, self.results)), "object")
        return f"Results({objects} in {counted(len(self.results), 'image')})"

    def to_supervision(self) -> list[sv.Detections]:
        """One `supervision.Detections` per image; see `Result.to_supervision`."""
        return [result.to_supervision() for result in self.results]

    def to_pandas(self) -> pd.DataFrame:
        """A row per object with the columns of `detections.csv`; the same columns and types without objects."""
        import pandas as pd

        rows = [
            (one.name, label, *numbers)
            for one in self.results
            for label, numbers in rows_of(self.known, one.detections)
        ]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        return frame.astype({name: "str" if name in COLUMNS[:2] else float for name in COLUMNS})

    def to_coco(self) -> Values:
        """`images`, `categories` and `annotations` with scores, as in `detections.json`; ids of images count from 1."""
        made = coco_of(self.known)
        for one in self.results:
            add_to_coco(made, self.known, one.name, one.size, one.detections)
        return made
