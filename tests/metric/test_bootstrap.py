"""Draws of images against an evaluation of the drawn images themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_exp.metric.bootstrap import Kind, average_precision, draws, kind_of, matched
from detr_exp.metric.coco import CocoMetric
from detr_exp.structures import Detections
from tests.metric.test_coco import CATEGORIES, case, make_metric

IDS = [3, 7]


def scene(seed: int, num_images: int = 12) -> tuple[dict, list[Detections]]:
    """Some images with objects of two classes, one of them a crowd, and detections near and beside them."""
    generator = np.random.default_rng(seed)
    truth: dict = {"images": [], "annotations": [], "categories": [{"id": c, "name": str(c)} for c in IDS]}
    found = []
    for image in range(num_images):
        truth["images"].append({"id": image + 10, "width": 100, "height": 100})
        boxes = generator.uniform(0, 60, (generator.integers(0, 5), 2))
        boxes = np.concatenate([boxes, generator.uniform(10, 40, boxes.shape)], axis=1)
        labels = generator.integers(2, size=len(boxes))
        for box, label in zip(boxes, labels):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image + 10,
                    "category_id": IDS[label],
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(generator.random() < 0.1),
                }
            )
        seen = np.repeat(boxes, 2, axis=0) + generator.normal(0, 3, (2 * len(boxes), 4))
        seen = np.concatenate([seen, generator.uniform(5, 50, (3, 4))])
        found.append(
            Detections(
                scores=torch.from_numpy(generator.permutation(40)[: len(seen)] / 40),
                labels=torch.from_numpy(np.concatenate([np.repeat(labels, 2), generator.integers(2, size=3)])),
                boxes=torch.from_numpy(np.concatenate([seen[:, :2], seen[:, :2] + abs(seen[:, 2:]) + 1], axis=1)),
            )
        )
    return truth, found


def metric_of(truth: dict, found: list[Detections]) -> CocoMetric:
    metric = CocoMetric(truth=truth, category_ids=IDS, classes=["a", "b"])
    metric.update([image["id"] for image in truth["images"]], found)
    return metric


def repeated(truth: dict, found: list[Detections], times: np.ndarray) -> CocoMetric:
    """The metric of a set that holds every image as often as it was drawn."""
    copy: dict = {"images": [], "annotations": [], "categories": truth["categories"]}
    drawn = []
    for image, detections, count in zip(truth["images"], found, times):
        for _ in range(count):
            new = len(copy["images"]) + 1
            copy["images"].append({**image, "id": new})
            copy["annotations"] += [
                {**a, "image_id": new} for a in truth["annotations"] if a["image_id"] == image["id"]
            ]
            drawn.append(detections)
    return metric_of(copy, drawn)


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_gives_the_ap_of_the_drawn_images(seed: int) -> None:
    truth, found = scene(seed)
    times = np.concatenate([np.ones((1, 12), dtype=int), draws(12, 6, seed)])
    ap = [average_precision(category, times) for category in matched(metric_of(truth, found), "bbox", IDS)]
    for row, count in enumerate(times):
        metric = repeated(truth, found, count)
        metric.compute()
        wanted = [line["AP"] if line["AP"] >= 0 else np.nan for line in metric.table()]
        assert [values[row] for values in ap] == pytest.approx(wanted, abs=1e-12, nan_ok=True)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    category = matched(metric_of(*scene(0)), "bbox", [3])[0]
    times = draws(12, 50)
    whole = average_precision(category, times)
    monkeypatch.setattr("detr_exp.metric.bootstrap.LARGEST", 100)
    assert np.array_equal(average_precision(category, times), whole, equal_nan=True)


def test_no_detections_and_no_objects() -> None:
    truth, found = scene(1)
    nothing = [one.above(2.0) for one in found]
    assert average_precision(matched(metric_of(truth, nothing), "bbox", [3])[0], draws(12, 3)).tolist() == [0.0] * 3
    truth["annotations"] = []
    assert np.isnan(average_precision(matched(metric_of(truth, found), "bbox", [3])[0], draws(12, 3))).all()


def test_draws_hold_as_many_images_as_there_are() -> None:
    times = draws(40, 500)
    assert (times.sum(axis=1) == 40).all()
    assert times.mean(axis=0) == pytest.approx(1.0, abs=0.25)
    assert np.array_equal(times, draws(40, 500)), "the same images for both sides"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mAP50", ("bbox", "all", slice(0, 1))),
        ("segm_mAP_small", ("segm", "small", slice(10))),
        ("keypoint_mAP", ("keypoints", "all", slice(10))),
        ("keypoint_mAP_small", None),
        ("mAR", None),
        ("AP/mAP", ("bbox", "all", slice(10), "mAP")),
        ("keypoint_AP/a/b", ("keypoints", "all", slice(10), "a/b")),
    ],
)
def test_which_precision_a_name_means(name: str, wanted: tuple | None) -> None:
    assert kind_of(name) == (None if wanted is None else Kind(*wanted))


@pytest.mark.parametrize("name", ["mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"])
def test_every_summary_of_the_official_tool_is_the_mean_of_what_is_drawn(name: str) -> None:
    truth, found = scene(3, 20)
    for area, annotation in zip(np.geomspace(100, 20_000, len(truth["annotations"])), truth["annotations"]):
        annotation["area"] = area
    metric, kind = metric_of(truth, found), kind_of(name)
    once = np.ones((1, 20), dtype=int)
    ap = [average_precision(one.at(kind.thresholds), once) for one in matched(metric, "bbox", IDS, kind.area)]
    assert np.nanmean(ap) == pytest.approx(metric.compute()[name], abs=1e-12)


@pytest.mark.parametrize("iou_type", ["segm", "keypoints"])
def test_masks_and_keypoints_are_drawn_as_the_official_tool_compares_them(iou_type: str) -> None:
    """All their summaries and every class by its name; the last class has no points."""
    truth, found = case(3, 20)
    metric = make_metric(truth, iou_types=["bbox", iou_type], keypoint_sigmas=[[0.05] * 4, [0.1] * 4, []])
    metric.update(list(found), list(found.values()))
    values, once = metric.compute(), np.ones((1, 20), dtype=int)
    prefix = {"segm": "segm_", "keypoints": "keypoint_"}[iou_type]
    kinds = {name: kind for name in values if name.startswith(prefix) and (kind := kind_of(name)) is not None}
    assert len(kinds) == {"segm": 6, "keypoints": 5}[iou_type] + 3
    with np.errstate(invalid="raise", divide="raise"):
        for name, kind in kinds.items():
            wanted = [CATEGORIES[metric.classes.index(kind.label)]] if kind.label else CATEGORIES
            drawn = matched(metric, kind.iou_type, wanted, kind.area)
            ap = np.array([average_precision(one.at(kind.thresholds), once)[0] for one in drawn])
            expected = np.nan if values[name] == -1 else values[name]
            seen = ap[~np.isnan(ap)]
            assert (seen.mean() if len(seen) else np.nan) == pytest.approx(expected, abs=1e-12, nan_ok=True), name


def test_matching_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}]
    truth = {"images": [{"id": 1, "width": 10, "height": 10}], "annotations": annotations, "categories": []}
    metric = CocoMetric(truth=truth, category_ids=[1], classes=["a"], backend="fast")
    metric.update([1], [Detections(torch.tensor([0.9]), torch.tensor([0]), torch.tensor([[1.0, 1, 5, 5]]))])
    assert matched(metric, "bbox", [1])[0].hits.all()
    assert not capfd.readouterr().out
