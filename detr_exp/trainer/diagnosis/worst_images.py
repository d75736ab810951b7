"""The pictures a network does worst on, and a table of its classes: what to look at after an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from detr_exp.data.content import Objects
from detr_exp.data.dataset import DataSet
from detr_exp.ops.boxes import box_iou
from detr_exp.ops.draw import draw_objects, sheet
from detr_exp.protocols import ImageFindings, Metric, PerClass, PerImage
from detr_exp.trainer.state import Run
from detr_exp.writing import write

MIN_IOU = 0.5
DEFAULT_THRESHOLD = 0.5  # where no threshold finds anything


class Errors(NamedTuple):
    """Attributes: `missed` objects and `false` alarms of the picture at a `place` of its split."""

    missed: int
    false: int
    place: int


def save_details(run: Run, split: str, metric: Metric, found: dict[str, float], step: int, count: int) -> None:
    """Write `classes.json`, a row per class, and `worst/step_<step>.jpg`, truth left and predictions right.

    A metric that keeps nothing of classes or images is left without the one or the other.

    Args:
        run: whose folder takes them, and whose views.
        split: that was evaluated.
        metric: after `compute`.
        found: what it computed.
        step: of the training.
        count: most pictures on the sheet; 0: no sheet.
    """
    if isinstance(metric, PerClass):
        tables = {iou_type: metric.table(iou_type) for iou_type in metric.iou_types}
        path = run.output_dir / "classes.json"
        write(path, json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
        run.tracker.artifact(path, step)
    if not isinstance(metric, PerImage):
        return
    threshold = found["F1_threshold"] if found.get("F1", 0) > 0 else DEFAULT_THRESHOLD
    errors = images_with_errors(run.data, split, metric.images, threshold)[:count]
    if errors:
        path = run.output_dir / "worst" / f"step_{step:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        drawn = error_sheet(run.data, split, metric.images, threshold, errors)
        write(path, lambda file: drawn.save(file, "JPEG", quality=85))
        run.tracker.image(path, "worst", step)


def images_with_errors(
    data: DataSet, split: str, images: Mapping[int, ImageFindings], threshold: float
) -> list[Errors]:
    """The pictures with errors, most of them first.

    Detections above `threshold` are matched to objects of their class at IoU 0.5, best score first.

    Args:
        data: the data set.
        split: its part that was evaluated.
        images: what was found, by image id.
        threshold: lowest score that counts.
    """
    label_of = {number: label for label, number in enumerate(data.category_ids)}
    errors = []
    for index, image_id in enumerate(data.split(split).image_ids):
        if image_id not in images:
            continue
        objects, boxes, labels, _ = _shown(data, split, images, index, threshold)
        wanted = np.array([label_of[number] for number in objects.categories.tolist()], dtype=int)
        iou = box_iou(torch.from_numpy(boxes)[:, None], torch.from_numpy(objects.boxes_xyxy)[None]).numpy()
        iou[labels[:, None] != wanted[None]] = 0
        hits = 0
        for row in iou:  # best score first
            if row.size and row.max() >= MIN_IOU:
                iou[:, row.argmax()] = 0
                hits += 1
        errors.append(Errors(len(wanted) - hits, len(labels) - hits, index))
    return sorted((e for e in errors if e.missed + e.false), key=lambda e: (-e.missed - e.false, e.place))


def error_sheet(
    data: DataSet, split: str, images: Mapping[int, ImageFindings], threshold: float, errors: list[Errors]
) -> Image.Image:
    """A sheet of pictures: truth left, predictions right."""
    label_of = {number: label for label, number in enumerate(data.category_ids)}
    pairs = []
    for _, _, index in errors:
        objects, boxes, labels, scores = _shown(data, split, images, index, threshold)
        pixels, _ = data.split(split).load(index)
        wanted = [label_of[number] for number in objects.categories.tolist()]
        for ink in (
            {"boxes_xyxy_px": objects.boxes_xyxy, "labels": wanted},
            {"boxes_xyxy_px": boxes, "labels": labels.tolist(), "scores": scores.tolist()},
        ):
            pairs.append(draw_objects(pixels, names=data.classes, **ink))
    return sheet(pairs, columns=4)


def _shown(
    data: DataSet, split: str, images: Mapping[int, ImageFindings], index: int, threshold: float
) -> tuple[Objects, np.ndarray, np.ndarray, np.ndarray]:
    """Objects of a picture, and boxes `[n, 4]` xyxy, labels `[n]` and scores `[n]` of its detections, best first."""
    part = data.split(split)
    found = images[part.image_ids[index]]
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= threshold]
    x, y, width, height = found.boxes[order].T
    return part.objects(index), np.stack([x, y, x + width, y + height], 1), found.labels[order], found.scores[order]
