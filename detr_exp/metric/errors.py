"""Which kind of error each detection is, and what each kind costs: TIDE.

Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors", sections 2.2 and 2.3. Kinds and
costs are theirs; AP50 is COCO's, with 100 detections per image and class, where their program has 100 per image.

Legend: n detections of an image, m objects of it that are no crowds. Boxes are x, y, width, height in pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detr_exp.metric.backend import CocoEvaluation
from detr_exp.metric.bootstrap import Category, average_precision
from detr_exp.metric.coco import OFFICIAL
from detr_exp.metric.confusion import iou, shared
from detr_exp.values import Values

LEAST_IOU, BACKGROUND_IOU = 0.5, 0.1
KINDS = ("hit", "class", "box", "both", "twice", "background", "ignored")
HIT, CLASS, BOX, BOTH, TWICE, BACKGROUND, IGNORED = range(len(KINDS))
MISSED = "missed"  # of objects, not of detections
ERRORS = ("class", "box", "both", "twice", "background", MISSED)


@dataclass
class Judged:
    """The detections of an image, best first, and what is right and wrong with them.

    Attributes:
        scores: `[n]`.
        labels: `[n]`.
        boxes: `[n, 4]`.
        kinds: `[n]` places in `KINDS`. hit: finds an object; class: IoU >= 0.5 with an object of another class; box:
            IoU of 0.1 to 0.5 with one of its class; both: neither class nor place is right; twice: its object is
            found by a better one; background: IoU below 0.1 with all objects; ignored: lies in a crowd.
        objects: `[n]` the object that a detection finds, or would find without its error; -1: none.
        truth_labels: `[m]`.
        truth_boxes: `[m, 4]`.
        order: `[n]` places among all detections of the image that there are.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    kinds: np.ndarray
    objects: np.ndarray
    truth_labels: np.ndarray
    truth_boxes: np.ndarray
    order: np.ndarray

    def is_found(self, *kinds: int) -> np.ndarray:
        """`[m]` bool: whether an object belongs to a detection of one of these kinds."""
        of = np.zeros(len(self.truth_labels), bool)
        of[self.objects[np.isin(self.kinds, kinds)]] = True
        return of

    @property
    def missed(self) -> np.ndarray:
        """`[m]` bool: objects that no detection finds, nor would find without an error of its class or its box."""
        return ~self.is_found(HIT, CLASS, BOX)


def judged(metric: CocoEvaluation) -> dict[int, Judged]:
    """The box detections of every image that a metric was given, by image id."""
    label_of = {category: label for label, category in enumerate(metric.category_ids)}
    truth = [annotations_of(metric, crowd) for crowd in (0, 1)]
    result = {}
    for image_id, found in metric.images.items():
        rows = [
            (
                np.array([label_of[one["category_id"]] for one in of[image_id]], np.int64),
                np.array([one["bbox"] for one in of[image_id]], float).reshape(-1, 4),
            )
            for of in truth
        ]
        order = _counted(found.scores, found.labels)
        one = judge(found.scores[order], found.labels[order], found.boxes[order], *rows)
        result[image_id] = replace(one, order=order)
    return result


def annotations_of(metric: CocoEvaluation, crowd: int = 0) -> dict[int, list[Values]]:
    """By image id its annotations, in the order of `Judged.truth_labels`; or its crowd regions."""
    found: dict[int, list[Values]] = defaultdict(list)
    for annotation in metric.truth.dataset["annotations"]:
        if annotation["iscrowd"] == crowd:
            found[annotation["image_id"]].append(annotation)
    return found


def _counted(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The detections that COCO counts, best first: a hundred of each class."""
    order = np.argsort(-scores, kind="stable")
    place = np.zeros(len(order), int)
    for label in np.unique(labels):
        of_class = labels[order] == label
        place[of_class] = np.arange(of_class.sum())
    return order[place < OFFICIAL]


def judge(
    scores: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    objects: tuple[np.ndarray, np.ndarray],
    crowds: tuple[np.ndarray, np.ndarray],
) -> Judged:
    """Match the detections of an image and find out what is wrong with the others.

    Args:
        scores: `[n]`, best first.
        labels: `[n]`.
        boxes: `[n, 4]`.
        objects: labels `[m]` and boxes `[m, 4]`.
        crowds: the same of crowd regions.
    """
    truth, truth_boxes = objects
    kinds, targets = np.full(len(scores), BACKGROUND), np.full(len(scores), -1)
    in_crowd = shared(boxes, crowds[1]) > LEAST_IOU * boxes[:, 2:].prod(1)[:, None]
    kinds[(in_crowd & (labels[:, None] == crowds[0])).any(1)] = IGNORED
    if len(truth) and len(scores):
        overlap = iou(boxes, truth_boxes)
        same = labels[:, None] == truth
        own, other = np.where(same, overlap, 0), np.where(same, 0, overlap)
        free = own.copy()
        for i in np.flatnonzero(own.max(1) >= LEAST_IOU):
            best = int(free[i].argmax())
            if free[i, best] >= LEAST_IOU:
                kinds[i], targets[i] = HIT, best
                free[:, best] = 0
        cases = (  # the first that holds
            (BOX, own, (own.max(1) >= BACKGROUND_IOU) & (own.max(1) < LEAST_IOU)),
            (CLASS, other, other.max(1) >= LEAST_IOU),
            (TWICE, own, own.max(1) >= LEAST_IOU),
            (BOTH, overlap, overlap.max(1) >= BACKGROUND_IOU),
        )
        is_open = kinds == BACKGROUND
        for kind, by, holds in cases:
            chosen = is_open & holds
            kinds[chosen], targets[chosen] = kind, by.argmax(1)[chosen]
            is_open &= ~holds
    return Judged(scores, labels, boxes, kinds, targets, truth, truth_boxes, np.arange(len(scores)))


def costs(images: Sequence[Judged], num_labels: int) -> tuple[float, dict[str, float]]:
    """AP50, and by how much it rises when all errors of one kind are mended.

    A detection of the wrong class or place becomes a hit if its object has no better one, else it is left out, as those
    of the other kinds are. Missed objects are left out. A class without objects does not count; one of which all
    objects were missed counts as found once they are left out.

    Args:
        images: all of a split.
        num_labels: K.

    Returns:
        AP50 (NaN without objects), and the rise for each of `ERRORS`.
    """
    starts = np.cumsum([0, *(len(one.truth_labels) for one in images)])
    scores, labels, kinds = (_joined([getattr(one, name) for one in images]) for name in ("scores", "labels", "kinds"))
    owners = _joined([np.where(one.objects < 0, -1, one.objects + start) for one, start in zip(images, starts)])
    truth = _joined([one.truth_labels for one in images])
    missed = _joined([one.missed for one in images]).astype(bool)
    is_hit = kinds == HIT
    found = np.zeros(len(truth), bool)
    found[owners[is_hit]] = True
    would_hit = _best_of_each(scores, owners, np.isin(kinds, (CLASS, BOX)) & ~np.append(found, True)[owners])
    counted = kinds != IGNORED
    total = np.bincount(truth, minlength=num_labels)

    def mean(labels: np.ndarray, hits: np.ndarray, kept: np.ndarray, left: np.ndarray) -> float:
        values = []
        for label in np.flatnonzero(total):
            of_class = np.flatnonzero(kept & (labels == label))
            values.append(_ap50(scores[of_class], hits[of_class], int(left[label])))
        return float(np.mean(values)) if values else float("nan")

    base = mean(labels, is_hit, counted, total)
    mended = {}
    for kind in ERRORS:
        if kind == MISSED:
            value = mean(labels, is_hit, counted, total - np.bincount(truth[missed], minlength=num_labels))
        else:
            of_kind = kinds == KINDS.index(kind)
            right = np.where(of_kind & would_hit, np.append(truth, 0)[owners], labels)
            value = mean(right, is_hit | (of_kind & would_hit), counted & (~of_kind | would_hit), total)
        mended[kind] = max(0.0, value - base) if total.any() else 0.0  # rounding of recalls can lower it a little
    return base, mended


def _ap50(scores: np.ndarray, hits: np.ndarray, objects: int) -> float:
    if not objects:
        return 1.0
    order = np.argsort(-scores, kind="stable")
    alone = np.zeros(len(order), int)  # all in one draw
    category = Category(alone, hits[order][None], np.ones((1, len(order)), bool), np.array([float(objects)]))
    return float(average_precision(category, np.ones((1, 1)))[0])


def _best_of_each(scores: np.ndarray, owners: np.ndarray, among: np.ndarray) -> np.ndarray:
    """`[N]` bool: of the detections `among` that belong to one object, the best."""
    best = np.zeros(len(scores), bool)
    order = np.argsort(-scores, kind="stable")
    order = order[among[order]]
    best[order[np.unique(owners[order], return_index=True)[1]]] = True
    return best


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
