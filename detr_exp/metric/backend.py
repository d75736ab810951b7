"""The COCO protocol on arrays in memory, by pycocotools or a faster package with the same interface.

Legend: T IoU thresholds 0.50, 0.55 ... 0.95, R 101 recall levels, K categories, A area ranges, M limits on the
number of detections.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from detr_exp.protocols import ImageFindings
from detr_exp.values import Values

PACKAGES = {"pycocotools": ("pycocotools",), "fast": ("ultrafast_pycocotools", "pycocotools")}
Indexed = Any  # a `COCO` object, of either package: neither has types


@dataclass
class Curves:
    """The result of one evaluation; -1 where a category has no object (of that size).

    Attributes:
        precision: `[T, R, K, A, M]`.
        recall: `[T, K, A, M]`.
        matches: per category the detections at IoU 0.5 that are not ignored, best first: `scores [n]`, `hits [n]` bool.
        objects: `[K]` objects per category that are not ignored.
    """

    precision: np.ndarray
    recall: np.ndarray
    matches: list[tuple[np.ndarray, np.ndarray]]
    objects: np.ndarray


@runtime_checkable
class CocoEvaluation(Protocol):
    """The members that charts, confusion matrices and comparisons read of a metric after `compute`.

    Attributes:
        iou_types: `bbox`, `segm`, `keypoints`, as far as they are compared.
        category_ids, classes: of every label.
        sigmas: see `coco.CocoMetric`.
        image_info: of every annotated image, by id.
        truth: the annotations, indexed by the backend.
        images: `coco.ImageDetections` by image id.
        curves: of each of `iou_types`.
        limits: detections per image and category that the last axis of the curves stands for.
    """

    iou_types: tuple[str, ...]
    category_ids: list[int]
    classes: list[str]
    sigmas: Sequence[Sequence[float]] | None
    image_info: dict[int, Values]
    truth: Indexed
    curves: dict[str, Curves]

    @property
    def images(self) -> Mapping[int, ImageFindings]: ...

    @property
    def limits(self) -> list[int]: ...

    def table(self, iou_type: str = "bbox") -> list[Values]: ...

    def metric_names(self) -> list[str]:
        """Of every label what stands for it in `AP/<class>`."""

    def detections(self, iou_type: str) -> Indexed:
        """The detections since `reset`, indexed by the backend."""


@lru_cache
def load(backend: str) -> tuple[ModuleType, ModuleType]:
    """The `coco` and `cocoeval` modules of a backend; warns once if another one is used since it is not installed.

    Raises:
        ValueError: for an unknown backend.
    """
    if backend not in PACKAGES:
        raise ValueError(f"metric.backend is {backend!r}; use {' or '.join(PACKAGES)}: metric=pycocotools")
    for package in PACKAGES[backend]:
        try:
            modules = importlib.import_module(f"{package}.coco"), importlib.import_module(f"{package}.cocoeval")
        except ImportError:
            continue
        if package != PACKAGES[backend][0]:
            logging.getLogger(__name__).warning(
                "%s is not installed; evaluating with %s, which gives the same numbers more slowly "
                "(pip install 'detr_exp[fast]')",
                PACKAGES[backend][0].replace("_", "-"),
                package,
            )
        return modules
    raise ValueError("pycocotools is not installed, and evaluation needs it: pip install pycocotools")


def index(backend: str, dataset: Values) -> Indexed:
    """A `COCO` object of a data set in memory."""
    coco, _ = load(backend)
    with quiet(coco):
        indexed = coco.COCO()
        indexed.dataset = dataset
        indexed.createIndex()
    return indexed


def index_boxes(backend: str, truth: Indexed, rows: np.ndarray) -> Indexed:
    """A `COCO` object of box detections.

    Args:
        backend: `pycocotools` or `fast`.
        truth: from `index`.
        rows: `[N, 7]` float64: image id, x, y, width, height in pixels, score, category id.
    """
    coco, _ = load(backend)
    if coco.__name__.startswith("ultrafast") and len(rows):  # reads the array itself, without a dictionary per box
        with quiet(coco):
            return truth.loadRes(rows)
    annotations = [
        {
            "id": i,
            "image_id": int(image),
            "category_id": int(category),
            "bbox": [x, y, width, height],
            "area": width * height,
            "score": score,
            "iscrowd": 0,
        }
        for i, (image, x, y, width, height, score, category) in enumerate(rows.tolist(), start=1)
    ]
    return index(backend, {**truth.dataset, "annotations": annotations})


def evaluate(
    backend: str,
    truth: Indexed,
    detections: Indexed,
    iou_type: str,
    category_ids: Sequence[int],
    max_detections: Sequence[int],
    sigmas: Sequence[float] | None = None,
) -> Curves:
    """Match detections with the ground truth and accumulate precision and recall.

    Args:
        backend: `pycocotools` or `fast`.
        truth: from `index`.
        detections: from `index`, with a `score` per annotation.
        iou_type: `bbox`, `segm` or `keypoints`.
        category_ids: the K categories, ascending.
        max_detections: the M limits per image and category, ascending.
        sigmas: with `keypoints`, the standard deviation of every point relative to the object's scale.
    """
    coco, cocoeval = load(backend)
    evaluator = cocoeval.COCOeval(truth, detections, iou_type)
    evaluator.print_function = _silence
    parameters = evaluator.params
    parameters.catIds = list(category_ids)
    parameters.maxDets = list(max_detections)
    if sigmas is not None:
        parameters.kpt_oks_sigmas = np.asarray(sigmas, dtype=float)
    with quiet(coco), quiet(cocoeval):
        evaluator.evaluate()
        evaluator.accumulate()
    verdicts = _columns if hasattr(evaluator, "per_instance") else _records
    return Curves(evaluator.eval["precision"], evaluator.eval["recall"], *verdicts(evaluator))


def _columns(evaluator: Any) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """`matches` and `objects` of `Curves` from the fast package, which returns columns sorted by category."""
    found, truth = evaluator.per_instance(iou_thr=evaluator.params.iouThrs[0])
    counted = ~found["ignore"]
    category, scores, hits = (found[name][counted] for name in ("category_id", "score", "gt_id"))
    ends = np.searchsorted(category, evaluator.params.catIds, side="right")[:-1]
    matches = [_ranked(*each) for each in zip(np.split(scores, ends), np.split(hits >= 0, ends))]
    owners = truth["category_id"][~truth["ignore"]]
    return matches, np.diff(np.searchsorted(owners, evaluator.params.catIds, side="right"), prepend=0)


def _records(evaluator: Any) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """The same from the results of pycocotools per image, which are sorted by category, area range and image."""
    num_images, num_areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    matches, objects = [], []
    for k in range(len(evaluator.params.catIds)):
        start = k * num_areas * num_images  # the first area range is "all"
        images = [image for image in evaluator.evalImgs[start : start + num_images] if image is not None]
        objects.append(sum(np.count_nonzero(np.asarray(image["gtIgnore"]) == 0) for image in images))
        scores, hits, ignored = (
            np.concatenate([np.zeros(0), *(part(image) for image in images)])
            for part in (
                lambda image: image["dtScores"],
                lambda image: image["dtMatches"][0],
                lambda image: image["dtIgnore"][0],
            )
        )
        matches.append(_ranked(scores[ignored == 0], hits[ignored == 0] > 0))
    return matches, np.array(objects, dtype=int)


def _ranked(scores: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    return scores[order], hits[order]


@contextmanager
def quiet(module: ModuleType) -> Iterator[None]:
    """Keep one module from printing; redirecting stdout would also drop the output of other threads."""
    module.print = _silence  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del module.print


def _silence(*_: object, **__: object) -> None:
    pass
