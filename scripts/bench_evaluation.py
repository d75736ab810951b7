"""COCO evaluation of a set as large as val2017 beside faster-coco-eval, and its bits beside pycocotools.

python scripts/bench_evaluation.py [--rounds 3] [--dry]
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from measure import Row, Section, interleaved, ratio, run

from detr_exp.metric.coco import CocoMetric
from detr_exp.structures import Detections

IMAGES, FOUND, CLASSES, SIDE = 5000, 100, 80, 640
TEXT = f"""
{IMAGES:,} images with about seven objects of {CLASSES} classes each, {IMAGES * FOUND:,} detections: shifted copies of
the objects and noise. Ours is `metric=fast` from the detections of each image to all numbers, also those that others
do not compute (limits above 100 detections, best thresholds, AP of each class). faster-coco-eval gets the detections as
one array; its `summarize` is included. The truth is indexed beforehand for both. pycocotools (`metric=pycocotools`)
evaluates the same once: precision, recall and every number have to be the same to the bit.
"""


def truth_and_detections() -> tuple[dict[str, Any], list[Detections]]:
    """A set whose images hold 0 to 20 objects, some of them crowds, and detections of decreasing score."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    detections = []
    for image in range(1, IMAGES + 1):
        count = min(int(rng.poisson(6.6)), 20)
        sides = np.exp(rng.uniform(np.log(8), np.log(320), (count, 2)))
        corners = rng.random((count, 2)) * (SIDE - sides)
        labels, crowd = rng.integers(0, CLASSES, count), rng.random(count) < 0.01
        for (x, y), (w, h), label, is_crowd in zip(corners.tolist(), sides.tolist(), labels.tolist(), crowd.tolist()):
            box = {"bbox": [x, y, w, h], "area": w * h * 0.7, "iscrowd": int(is_crowd)}
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": label + 1, **box})
        noise = FOUND - count
        near = np.concatenate([corners, corners + sides], 1) + rng.normal(0, 6, (count, 4))
        start = rng.random((noise, 2)) * (SIDE - 80)
        away = np.concatenate([start, start + 8 + rng.random((noise, 2)) * 70], 1)
        scores = np.sort(rng.random(FOUND) * np.where(np.arange(FOUND) < count, 1.0, 0.5))[::-1].copy()
        order = rng.permutation(FOUND) if image % 2 else np.arange(FOUND)
        detections.append(
            Detections(
                torch.from_numpy(scores.astype(np.float32)),
                torch.from_numpy(np.concatenate([labels, rng.integers(0, CLASSES, noise)])[order]),
                torch.from_numpy(np.concatenate([near, away]).astype(np.float32)[order]),
            )
        )
    images = [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, IMAGES + 1)]
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, detections


def as_rows(detections: list[Detections]) -> np.ndarray:
    """`[N, 7]` image id, x, y, width, height, score, category id."""
    parts = []
    for image, found in enumerate(detections, start=1):
        boxes = found.boxes.numpy().astype(float)
        columns = (boxes[:, :2], boxes[:, 2:] - boxes[:, :2], found.scores.numpy(), found.labels.numpy() + 1)
        parts.append(np.column_stack([np.full(FOUND, image), *columns]))
    return np.concatenate(parts)


def bench(rounds: int) -> Section:
    truth, detections = truth_and_detections()
    ids = list(range(1, IMAGES + 1))
    names = [f"class {i}" for i in range(CLASSES)]

    def metric(backend: str) -> CocoMetric:
        return CocoMetric(
            truth=truth, category_ids=list(range(1, CLASSES + 1)), classes=names, iou_types=["bbox"], backend=backend
        )

    fast = metric("fast")
    with contextlib.redirect_stdout(io.StringIO()):
        indexed = COCO(truth)
    rows = as_rows(detections)

    def ours() -> dict[str, float]:
        fast.reset()
        fast.update(ids, detections)
        return fast.compute()

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval_faster(indexed, indexed.loadRes(rows.copy()), "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()

    times = interleaved({"ours": ours, "faster-coco-eval": theirs}, rounds, warmup=0)
    plain = metric("pycocotools")
    plain.update(ids, detections)
    found: dict[str, dict[str, float]] = {}
    [reference] = interleaved({"plain": lambda: found.update(plain=plain.compute())}, 1, warmup=0)["plain"]
    same = ours() == found["plain"] and all(
        np.array_equal(getattr(fast.curves["bbox"], name), getattr(plain.curves["bbox"], name))
        for name in ("precision", "recall")
    )
    own, peer = (float(np.median(times[name])) for name in ("ours", "faster-coco-eval"))
    fault = "" if same else "other numbers than pycocotools"
    part = f"{IMAGES:,} images, {IMAGES * FOUND:,} detections"
    detail = f"{own:.2f} / {peer:.2f} s"
    return Section(
        "COCO evaluation",
        [
            Row(part, ratio(times, peer="faster-coco-eval"), "faster-coco-eval", 0.10, detail, fault=fault),
            Row("the same", own / reference, "pycocotools", None, f"{own:.2f} / {reference:.1f} s"),
        ],
        TEXT,
        packages=("ultrafast-pycocotools", "faster-coco-eval", "pycocotools", "numpy"),
    )


if __name__ == "__main__":
    sys.exit(run("evaluation", bench, __doc__, rounds=3))
