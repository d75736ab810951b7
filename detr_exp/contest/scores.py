"""What a result file is worth, by pycocotools, and on resamples of the images.

Legend: B resamples of the images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from detr_exp.metric import backend as protocol
from detr_exp.metric.bootstrap import average_precision, draws, matched
from detr_exp.metric.coco import CocoMetric
from detr_exp.structures import Detections
from detr_exp.values import Values

DIGITS = 6  # of stored numbers


def scored(truth: Values, detections: Sequence[Values], resamples: int) -> Values:
    """The numbers of one result file.

    Args:
        truth: a COCO file.
        detections: COCO results.
        resamples: B, the same for everybody.

    Returns:
        `mAP`, `AP50`, `classes` (AP by name), and `drawn`: `[B]` mAP of each resample.

    Raises:
        ValueError: a detection is of no image or class of the set, or not finite.
    """
    _refuse_strange(truth, detections)
    coco, cocoeval = protocol.load("pycocotools")
    index = protocol.index("pycocotools", {**truth, "annotations": [dict(one) for one in truth["annotations"]]})
    found = _loaded(index, detections)
    with protocol.quiet(coco), protocol.quiet(cocoeval):
        evaluator = cocoeval.COCOeval(index, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, 2]  # of all sizes, 100 detections an image
    classes = {}
    for place, category in enumerate(sorted(truth["categories"], key=lambda one: one["id"])):
        known = precision[:, :, place]
        if (known > -1).any():
            classes[category["name"]] = round(float(known[known > -1].mean()), DIGITS)
    drawn = _drawn(truth, detections, draws(len(truth["images"]), resamples))
    mean_ap = float(evaluator.stats[0])
    if not math.isclose(mean_ap, drawn[0], abs_tol=1e-3):
        raise RuntimeError(f"pycocotools gives mAP {mean_ap}, and the resampling {drawn[0]} for the same images")
    return {
        "mAP": round(mean_ap, DIGITS),
        "AP50": round(float(evaluator.stats[1]), DIGITS),
        "classes": classes,
        "images": len(truth["images"]),
        "drawn": [round(value, DIGITS) for value in drawn[1:].tolist()],
    }


def draws_mark(images: int, resamples: int) -> str:
    """A hash of the resamples: results of other ones cannot be compared image by image."""
    return hashlib.sha256(np.ascontiguousarray(draws(images, resamples), "<i8").tobytes()).hexdigest()[:12]


def _refuse_strange(truth: Values, detections: Sequence[Values]) -> None:
    images, classes = ({one["id"] for one in truth[name]} for name in ("images", "categories"))
    for one in detections:
        if one["image_id"] not in images or one["category_id"] not in classes:
            raise ValueError(
                f"a detection is of image {one['image_id']} and category {one['category_id']}; there are images "
                f"{min(images)} to {max(images)} and categories {sorted(classes)}"
            )
        if not all(map(math.isfinite, (*one["bbox"], one["score"]))):
            raise ValueError(f"a detection of image {one['image_id']} is not finite: {one['bbox']}, {one['score']}")


def _loaded(index: protocol.Indexed, detections: Sequence[Values]) -> protocol.Indexed:
    rows = [[one["image_id"], *one["bbox"], one["score"], one["category_id"]] for one in detections]
    return protocol.index_boxes("pycocotools", index, np.array(rows, dtype=float).reshape(-1, 7))


def _drawn(truth: Values, detections: Sequence[Values], times: np.ndarray) -> np.ndarray:
    """`[1 + B]` mAP of all images, and of each resample."""
    categories = truth["categories"]
    ids = [category["id"] for category in categories]
    metric = CocoMetric(truth=truth, category_ids=ids, classes=[category["name"] for category in categories])
    by_image: dict[int, list[Values]] = {image["id"]: [] for image in truth["images"]}
    for one in detections:
        by_image[one["image_id"]].append(one)
    metric.update(list(by_image), [_detections(found, ids) for found in by_image.values()])
    both = np.concatenate([np.ones((1, times.shape[1]), dtype=int), times])
    ap = np.array([average_precision(found, both) for found in matched(metric, "bbox", ids)])
    present = ~np.isnan(ap[:, 0])
    return np.nanmean(ap[present], axis=0)


def _detections(found: Sequence[Values], ids: Sequence[int]) -> Detections:
    boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([ids.index(one["category_id"]) for one in found], dtype=torch.int64)
    return Detections(torch.tensor([one["score"] for one in found], dtype=torch.float64), labels, boxes)
