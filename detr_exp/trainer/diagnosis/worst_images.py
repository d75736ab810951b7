"""The images with the most errors, and a table of the classes, written after an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from detr_exp.data.content import Objects
from detr_exp.data.dataset import DataSet
from detr_exp.ops.boxes import box_iou
from detr_exp.ops.draw import draw_objects, sheet
from detr_exp.protocols import ImageFindings, Metric, PerClass, PerImage
from detr_exp.runs.past import CLASSES
from detr_exp.trainer.state import Run
from detr_exp.writing import write

MIN_IOU = 0.5
DEFAULT_THRESHOLD = 0.5  # if no threshold gives true positives


class Errors(NamedTuple):
    """Attributes: `missed` objects and `false` positives of the image at `position` in its split."""

    missed: int
    false: int
    position: int


def save_details(run: Run, split: str, metric: Metric, found: dict[str, float], step: int, count: int) -> None:
    """Write `classes.json`, a row per class, and `worst/step_<step>.jpg`, ground truth left and predictions right.

    Without per-class or per-image results of the metric, the table or the figure is not written.

    Args:
        run: its folder and its tracker receive the files.
        split: name of the evaluated split.
        metric: after `compute`.
        found: the values of the metric.
        step: of the training.
        count: largest number of images in the figure; 0: no figure.
    """
    if isinstance(metric, PerClass):
        tables = {iou_type: metric.table(iou_type) for iou_type in metric.iou_types}
        path = run.output_dir / CLASSES
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
    """The images with errors, those with most errors first.

    Detections above `threshold` are matched to objects of their class at IoU 0.5, highest score first.

    Args:
        data: the data set.
        split: name of the evaluated split.
        images: detections by image id.
        threshold: lowest score of detections to count.
    """
    label_of = {number: label for label, number in enumerate(data.category_ids)}
    errors = []
    for index, image_id in enumerate(data.split(split).image_ids):
        if image_id not in images:
            continue
        objects, boxes, labels, _ = _shown(data, split, images, index, threshold)
        expected = np.array([label_of[number] for number in objects.categories.tolist()], dtype=int)
        iou = box_iou(torch.from_numpy(boxes)[:, None], torch.from_numpy(objects.boxes_xyxy)[None]).numpy()
        iou[labels[:, None] != expected[None]] = 0
        hits = 0
        for row in iou:  # highest score first
            if row.size and row.max() >= MIN_IOU:
                iou[:, row.argmax()] = 0
                hits += 1
        errors.append(Errors(len(expected) - hits, len(labels) - hits, index))
    return sorted((e for e in errors if e.missed + e.false), key=lambda e: (-e.missed - e.false, e.position))


def error_sheet(
    data: DataSet, split: str, images: Mapping[int, ImageFindings], threshold: float, errors: list[Errors]
) -> Image.Image:
    """A figure of images: ground truth left, predictions right."""
    label_of = {number: label for label, number in enumerate(data.category_ids)}
    pairs, texts = [], []
    for missed, false, index in errors:
        objects, boxes, labels, scores = _shown(data, split, images, index, threshold)
        pixels, _ = data.split(split).load(index)
        expected = [label_of[number] for number in objects.categories.tolist()]
        name = Path(data.split(split).name(index)).name
        texts += [f"{name}: {missed} missed", f"{false} false, scores from {threshold:.2f}"]
        for ink in (
            {"boxes_xyxy_px": objects.boxes_xyxy, "labels": expected},
            {"boxes_xyxy_px": boxes, "labels": labels.tolist(), "scores": scores.tolist()},
        ):
            pairs.append(draw_objects(pixels, names=data.classes, **ink))
    return sheet(pairs, texts, columns=4)


def _shown(
    data: DataSet, split: str, images: Mapping[int, ImageFindings], index: int, threshold: float
) -> tuple[Objects, np.ndarray, np.ndarray, np.ndarray]:
    """Objects of an image, and boxes `[n, 4]` xyxy, labels `[n]` and scores `[n]` of its detections, best first."""
    part = data.split(split)
    found = images[part.image_ids[index]]
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= threshold]
    x, y, width, height = found.boxes[order].T
    return part.objects(index), np.stack([x, y, x + width, y + height], 1), found.labels[order], found.scores[order]
