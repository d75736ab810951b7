"""How sure a difference of mAP is: the same images drawn again and again, both sides evaluated on each draw.

Objects and detections of an image are matched once; a draw only counts images 0, 1, 2 ... times, which gives the same
AP as evaluating the drawn images anew (but for the order of equal scores within an image). Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 8 and 13.

Legend: I images, K categories, T IoU thresholds 0.50, 0.55 ... 0.95, n detections of a category, best score first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detr_exp.metric import backend as protocol
from detr_exp.metric.backend import CocoEvaluation
from detr_exp.metric.coco import OFFICIAL, OFFICIAL_KEYPOINTS
from detr_exp.values import Values

RECALLS = np.linspace(0, 1, 101)
LARGEST = 2_000_000  # numbers held at once
NAMED = re.compile(r"(segm_|keypoint_|)(?:mAP(50|75|_small|_medium|_large|)|AP/(.+))")
IOU_TYPES = {"": "bbox", "segm_": "segm", "keypoint_": "keypoints"}
THRESHOLDS = {"50": slice(0, 1), "75": slice(5, 6)}


class Kind(NamedTuple):
    """Which average precision a name means.

    Attributes:
        iou_type: `bbox`, `segm` or `keypoints`.
        area: of the objects: `all`, `small`, `medium` or `large`.
        thresholds: those of the ten IoU thresholds that it is the mean of.
        label: the class, as metrics name it; empty: the mean over all classes.
    """

    iou_type: str
    area: str
    thresholds: slice
    label: str = ""


def kind_of(name: str) -> Kind | None:
    """What `mAP50`, `segm_mAP_small` or `AP/<class>` means; None for what is no mean of average precisions."""
    told = NAMED.fullmatch(name)
    if told is None:
        return None
    task, which, label = told.groups(default="")
    area = which.removeprefix("_") if which.startswith("_") else "all"
    return (
        None
        if (task, area) == ("keypoint_", "small")
        else Kind(IOU_TYPES[task], area, THRESHOLDS.get(which, slice(10)), label)
    )


class Category(NamedTuple):
    """The detections of one category in all images.

    Attributes:
        images: `[n]` place of the detection's image.
        hits: `[T, n]` whether it found an object.
        counted: `[T, n]` False where it is ignored (it found a crowd, or an object that is not to be found).
        objects: `[I]` objects to be found in each image.
    """

    images: np.ndarray
    hits: np.ndarray
    counted: np.ndarray
    objects: np.ndarray

    def at(self, thresholds: slice) -> Category:
        """The same at some of the IoU thresholds alone."""
        return self._replace(hits=self.hits[thresholds], counted=self.counted[thresholds])


def matched(metric: CocoEvaluation, iou_type: str, category_ids: Sequence[int], area: str = "all") -> list[Category]:
    """Match what a metric was given to its truth, for each of the categories.

    Args:
        metric: with backend `pycocotools`, after its `update`s.
        iou_type: `bbox`, `segm` or `keypoints`.
        category_ids: the K categories.
        area: of the objects that are to be found; others, and what finds them or is of another size, do not count.
    """
    _, cocoeval = protocol.load("pycocotools")
    found = metric.detections(iou_type)
    indexed = sys.modules[type(found).__module__]  # the faster package makes its index, and says so, when it is asked
    places = {image: place for place, image in enumerate(sorted(metric.image_info))}
    sigmas = dict(zip(metric.category_ids, metric.sigmas or ()))
    categories = []
    for category in category_ids:
        if iou_type == "keypoints" and not sigmas[category]:  # a class without points
            categories.append(_category([], places))
            continue
        evaluator = cocoeval.COCOeval(metric.truth, found, iou_type)
        evaluator.params.catIds = [category]
        place = evaluator.params.areaRngLbl.index(area)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [evaluator.params.areaRng[place]], [area]
        evaluator.params.maxDets = [OFFICIAL_KEYPOINTS if iou_type == "keypoints" else OFFICIAL]
        if iou_type == "keypoints":
            evaluator.params.kpt_oks_sigmas = np.asarray(sigmas[category], dtype=float)
        with protocol.quiet(cocoeval), protocol.quiet(indexed):
            evaluator.evaluate()
        categories.append(_category([image for image in evaluator.evalImgs if image is not None], places))
    return categories


def _category(images: list[Values], places: dict[int, int]) -> Category:
    objects = np.zeros(len(places))
    scores, owners = [np.zeros(0)], [np.zeros(0, dtype=int)]
    hits, counted = [np.zeros((10, 0), dtype=bool)], [np.zeros((10, 0), dtype=bool)]
    for image in images:
        place = places[image["image_id"]]
        objects[place] = np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)
        scores.append(np.asarray(image["dtScores"], dtype=float))
        owners.append(np.full(len(image["dtScores"]), place))
        ignored = np.asarray(image["dtIgnore"], dtype=bool).reshape(10, -1)
        hits.append((np.asarray(image["dtMatches"]).reshape(10, -1) > 0) & ~ignored)
        counted.append(~ignored)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Category(
        np.concatenate(owners)[order],
        np.concatenate(hits, axis=1)[:, order],
        np.concatenate(counted, axis=1)[:, order],
        objects,
    )


def average_precision(category: Category, times: np.ndarray) -> np.ndarray:
    """AP of one category for several draws; NaN where a draw holds no object of it.

    Args:
        category: from `matched`, or with some of its thresholds alone.
        times: `[B, I]` how often each draw holds each image.

    Returns:
        `[B]`
    """
    rows = max(1, LARGEST // max(1, len(category.images)))
    parts = [_average_precision(category, times[start : start + rows]) for start in range(0, len(times), rows)]
    return np.concatenate(parts)


def _average_precision(category: Category, times: np.ndarray) -> np.ndarray:
    total = times @ category.objects
    weights = times[:, category.images]
    seen_of_all = np.cumsum(weights, axis=1)
    needed = _needed(total)
    apart = np.arange(len(times))[:, None] * (total.max(initial=0) + 2)  # keeps the draws' counts in one sorted row
    ap = np.zeros(len(times))
    for hits, counted in zip(category.hits, category.counted):
        at = np.flatnonzero(hits)  # precision is highest where recall rises
        true = np.cumsum(weights[:, at], axis=1)
        seen = seen_of_all if counted.all() else np.cumsum(weights * counted, axis=1)
        precision = true / np.maximum(seen[:, at], 1)
        best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted((true + apart).ravel(), (needed + apart).ravel()).reshape(needed.shape)
        reached -= np.arange(len(times))[:, None] * len(at)
        padded = np.pad(best_from_here, ((0, 0), (0, 1)))
        ap += np.take_along_axis(padded, reached, axis=1).mean(axis=1)
    return np.where(total > 0, ap / len(category.hits), np.nan)


def _needed(total: np.ndarray) -> np.ndarray:
    """The fewest objects that make up each recall level: `[B, 101]`."""
    objects = np.maximum(total, 1)[:, None]
    needed = np.ceil(RECALLS * objects).astype(int)
    return needed - ((needed - 1) / objects >= RECALLS)  # where rounding has made it one too many


def draws(num_images: int, count: int, seed: int = 0) -> np.ndarray:
    """How often each image is drawn: `[count, I]`, each row `I` draws with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=count)
