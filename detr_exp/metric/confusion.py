"""A confusion matrix for detections.

Detections count from their class's best-F1 threshold on. Per image, best score first, each one is matched with the
object of its own class that it overlaps most, at IoU 0.5 or more; the remaining ones are then matched with remaining
objects of other classes. So an object is "confused" only if no detection of its own class matches it. Detections that
lie mostly in a crowd region are ignored, as in the COCO protocol.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from detr_exp.metric.backend import CocoEvaluation
from detr_exp.values import Values

LEAST_IOU = 0.5


def confusion(metric: CocoEvaluation) -> np.ndarray:
    """Numbers of objects by true and detected class, from box detections; valid after `metric.compute()`.

    Returns:
        `[K + 1, K + 1]` int64: rows are true classes, columns detected ones. The last column counts missed objects,
        the last row detections without an object.
    """
    label_of = {category: label for label, category in enumerate(metric.category_ids)}
    thresholds = np.array([row["threshold"] for row in metric.table("bbox")])
    objects: dict[int, list[Values]] = defaultdict(list)
    for annotation in metric.truth.dataset["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    nothing = len(metric.category_ids)
    matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
    for image_id, found in metric.images.items():
        crowds = _boxes([a for a in objects[image_id] if a["iscrowd"]])
        there = [a for a in objects[image_id] if not a["iscrowd"]]
        truth = np.array([label_of[a["category_id"]] for a in there], np.int64)
        ranked = np.argsort(-found.scores, kind="stable")
        ranked = ranked[found.scores[ranked] >= thresholds[found.labels[ranked]]]
        labels, boxes = found.labels[ranked], found.boxes[ranked]
        taken_for = _assigned(iou(boxes, _boxes(there)), labels[:, None] == truth)
        ignored = (shared(boxes, crowds) > LEAST_IOU * boxes[:, 2:].prod(1)[:, None]).any(1) & (taken_for < 0)
        hit = taken_for >= 0
        np.add.at(matrix, (truth[taken_for[hit]], labels[hit]), 1)
        np.add.at(matrix[nothing], labels[~hit & ~ignored], 1)
        np.add.at(matrix[:, nothing], np.delete(truth, taken_for[hit]), 1)
    return matrix


def _assigned(overlap: np.ndarray, same: np.ndarray) -> np.ndarray:
    """`[n]` the object of each detection, or -1; detections in the order of matching."""
    result = np.full(len(overlap), -1)
    if not overlap.size:
        return result
    for allowed in (same, ~same):
        free = np.where(allowed & (overlap >= LEAST_IOU), overlap, 0)
        free[:, result[result >= 0]] = 0
        for i in np.flatnonzero((result < 0) & free.any(1)):
            best = int(free[i].argmax())
            if free[i, best] > 0:
                result[i] = best
                free[:, best] = 0
    return result


def _boxes(annotations: list[Values]) -> np.ndarray:
    return np.array([annotation["bbox"] for annotation in annotations], float).reshape(-1, 4)


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[n, m]` intersection areas of boxes x, y, width, height."""
    start = np.maximum(a[:, None, :2], b[:, :2])
    end = np.minimum(a[:, None, :2] + a[:, None, 2:], b[:, :2] + b[:, 2:])
    return (end - start).clip(0).prod(-1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[n, m]` IoU of boxes x, y, width, height."""
    common = shared(a, b)
    return common / np.maximum(a[:, 2:].prod(1)[:, None] + b[:, 2:].prod(1) - common, 1e-12)
