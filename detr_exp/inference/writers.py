"""Detections as files: COCO's JSON, YOLO's text, or a table."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detr_exp.metric.coco import encode
from detr_exp.ops.polygons import polygons_of_mask
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from detr_exp.data.classes import KnownLabels
    from detr_exp.inference.detector import Detector
    from detr_exp.structures import Detections

Numbers = float | list["Numbers"] | None  # nested; null where one is not finite
COLUMNS = ("image", "class", "score", "x0", "y0", "x1", "y1")
SEEN = 0.5  # a keypoint with a higher confidence is visible in YOLO's text
SHARE = 20  # after a write, results are not written for so many times its duration
DIGITS = 4  # digits after the point of scores and pixels


class Coco:
    """`detections.json`: COCO's `images`, `categories` and `annotations`, these with a `score` as in COCO's results.

    Masks are run-length codes in `segmentation` and outlines in `polygons`; `keypoints` are x, y and confidence, and
    `keypoint_covariance` is in squared pixels.
    """

    def __init__(self, folder: Path, detector: Detector) -> None:
        self.file = Growing(claimed(folder / "detections.json"))
        self.detector, self.result = detector, coco_of(detector)

    def add(self, name: str, stem: str, size: tuple[int, int], detections: Detections) -> None:
        add_to_coco(self.result, self.detector, name, size, detections)
        self.file.offer(self._text)

    def close(self) -> Path:
        return self.file.save(self._text)

    def _text(self) -> str:
        return json.dumps(self.result, ensure_ascii=False) + "\n"


def coco_of(labels: Detector | KnownLabels) -> Values:
    """COCO's format without images; see `Coco`."""
    categories = [{"id": number, "name": name} for number, name in zip(labels.category_ids, labels.classes)]
    return {"images": [], "categories": categories, "annotations": []}


def add_to_coco(
    result: Values, labels: Detector | KnownLabels, name: str, size: tuple[int, int], detections: Detections
) -> None:
    """Add an image of size (height, width) and its detections to a mapping in COCO's format."""
    image_id = len(result["images"]) + 1
    result["images"].append({"id": image_id, "file_name": name, "width": size[1], "height": size[0]})
    codes = None if detections.masks is None else encode(detections.masks)
    for i, (score, label, box) in enumerate(
        zip(detections.scores.tolist(), detections.labels.tolist(), detections.boxes.tolist())
    ):
        entry = {
            "id": len(result["annotations"]) + 1,
            "image_id": image_id,
            "category_id": labels.category_ids[label],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        if codes is not None and detections.masks is not None:
            entry["segmentation"] = codes[i] | {"counts": codes[i]["counts"].decode()}
            entry["polygons"] = polygons_of_mask(detections.masks[i].numpy())
        points, covariance = _keypoints(detections, i, label, labels)
        if points is not None and covariance is not None:
            entry["keypoints"] = points.flatten().tolist()
            entry["keypoint_covariance"] = _finite(covariance.tolist())
        result["annotations"].append(entry)


class Yolo:
    """`labels/<image>.txt`, as `data=yolo` reads it, and `classes.txt`; without scores. Boxes are cut to the image.

    A row has the class and a box in 0..1 of the image; with masks instead of the box the outline of the largest part,
    with keypoints also x, y and 2 (visible) or 0 (not).
    """

    def __init__(self, folder: Path, detector: Detector) -> None:
        self.folder, self.detector = claimed(folder / "labels", Path.mkdir), detector
        write(claimed(folder / "classes.txt"), encoded("\n".join(detector.classes) + "\n"))

    def add(self, name: str, stem: str, size: tuple[int, int], detections: Detections) -> None:
        sides = np.array(size[::-1])
        rows = []
        for i, (label, box) in enumerate(zip(detections.labels.tolist(), detections.boxes.numpy())):
            low, high = (box.reshape(2, 2) / sides).clip(0, 1)
            numbers = [*((low + high) / 2), *(high - low)]
            if (high <= low).any():
                continue  # outside of the image
            if detections.masks is not None:
                outlines = polygons_of_mask(detections.masks[i].numpy())
                if not outlines:
                    continue
                numbers = list((np.reshape(max(outlines, key=_area), (-1, 2)) / sides).clip(0, 1).flatten())
            points, _ = _keypoints(detections, i, label, self.detector)
            if points is not None:
                visible = points[:, 2:] > SEEN
                numbers += list((np.concatenate([points[:, :2] / sides, visible * 2], axis=1) * visible).flatten())
            rows.append(" ".join([str(label), *(f"{number:.6g}" for number in numbers)]))
        path = self.folder / f"{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, "".join(f"{row}\n" for row in rows))

    def close(self) -> Path:
        return self.folder


class Table:
    """`detections.csv`: a row for every object; boxes in pixels."""

    def __init__(self, folder: Path, detector: Detector) -> None:
        self.file, self.detector = Growing(claimed(folder / "detections.csv")), detector
        self.rows: list[tuple[object, ...]] = [COLUMNS]

    def add(self, name: str, stem: str, size: tuple[int, int], detections: Detections) -> None:
        for label, numbers in rows_of(self.detector, detections):
            self.rows.append((name, label, *(round(number, DIGITS) for number in numbers)))
        self.file.offer(self._text)

    def close(self) -> Path:
        return self.file.save(self._text)

    def _text(self) -> str:
        text = io.StringIO()
        csv.writer(text).writerows(self.rows)
        return text.getvalue()


def rows_of(labels: Detector | KnownLabels, detections: Detections) -> Iterator[tuple[str, list[float]]]:
    """Of every object its class, and score and box, as in `COLUMNS`."""
    for score, label, box in zip(detections.scores.tolist(), detections.labels.tolist(), detections.boxes.tolist()):
        yield labels.classes[label], [score, *box]


class Growing:
    """A file of results, rewritten as they grow, and always complete.

    Writing uses a small share of the time, so that a failure loses little and long predictions are not slowed down.

    Args:
        path: an empty file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = 0.0

    def offer(self, text: Callable[[], str]) -> None:
        """Write, unless the last write was too recent."""
        if time.monotonic() >= self.next:
            self.save(text)

    def save(self, text: Callable[[], str]) -> Path:
        """Write; if that fails, the previous content stays."""
        start = time.monotonic()
        write(self.path, encoded(text()))
        self.next = time.monotonic() + SHARE * (time.monotonic() - start)
        return self.path


OUTPUTS: dict[str, Callable[[Path, Detector], Coco | Yolo | Table]] = {"coco": Coco, "yolo": Yolo, "csv": Table}


def claimed(path: Path, make: Callable[[Path], object] = lambda path: path.touch(exist_ok=False)) -> Path:
    """`path`, created as a file or by `make`, with a number after its name where it exists already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        tried = free(path)
        try:
            make(tried)
        except FileExistsError:
            continue  # another process was faster
        return tried


def free(path: Path) -> Path:
    """`path`, or with a number after its name where it exists already."""
    number = 1
    tried = path
    while os.path.lexists(tried):
        number += 1
        tried = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return tried


def encoded(text: str) -> bytes:
    """UTF-8; bytes of a file name that are not UTF-8 are written as in JSON, `\\udce9`."""
    return text.encode("utf-8", "backslashreplace")


def _keypoints(
    detections: Detections, i: int, label: int, labels: Detector | KnownLabels
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Points `[k, 3]` and covariances `[k, 2, 2]` of the k keypoints that the object's class has."""
    if detections.keypoints is None or detections.keypoint_covariance is None:
        return None, None
    count = len(detections.keypoints[i]) if labels.keypoints is None else labels.keypoints.counts[label]
    return detections.keypoints[i, :count].numpy(), detections.keypoint_covariance[i, :count].numpy()


def _finite(value: Numbers) -> Numbers:
    """Nested lists with null for numbers that JSON cannot express."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if value is not None and math.isfinite(value) else None


def _area(outline: list[float]) -> float:
    x, y = outline[::2], outline[1::2]
    return abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
