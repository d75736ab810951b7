"""The metric against raw COCOeval on random data, and on the sets that usually break evaluators."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_exp.config.mistakes import METRICS, TASKS, ConfigError, refuse_unknown_metric
from detr_exp.metric import backend as protocol
from detr_exp.metric.coco import CocoMetric
from detr_exp.structures import Detections

CATEGORIES = [7, 3, 11]  # label 0 is category 7: not sorted on purpose
SIZE = 200
FIELDS = ("scores", "labels", "boxes", "masks", "keypoints")
PRECISIONS = ["mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"]
OFFICIAL_NAMES = [*PRECISIONS, "mAR_1", "mAR_10", "mAR", "mAR_small", "mAR_medium", "mAR_large"]


def random_boxes(generator: np.random.Generator, n: int) -> np.ndarray:
    """`[n, 4]` x, y, width, height of all COCO sizes."""
    sides = np.exp(generator.uniform(np.log(6), np.log(150), (n, 2)))
    corners = generator.uniform(0, 1, (n, 2)) * (SIZE - sides)
    return np.concatenate([corners, sides], axis=1)


def random_truth(generator: np.random.Generator, num_images: int, objects: int = 6) -> dict:
    annotations = []
    for image_id in range(1, num_images + 1):
        for box in random_boxes(generator, generator.integers(0, objects)).tolist():
            x, y, w, h = box
            points = np.stack([generator.uniform(x, x + w, 4), generator.uniform(y, y + h, 4), np.full(4, 2)], axis=1)
            points[1:][generator.random(3) < 0.3] = 0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(generator.choice(CATEGORIES[:2])),  # the third has no objects
                    "bbox": box,
                    "area": w * h * 0.8,
                    "iscrowd": int(generator.random() < 0.15),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": points.reshape(-1).tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
    images = [{"id": i, "height": SIZE, "width": SIZE} for i in range(1, num_images + 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": c} for c in CATEGORIES]}


def random_detections(generator: np.random.Generator, truth: dict, image_id: int, extra: int) -> Detections:
    """Shifted copies of the ground truth and noise."""
    own = [a for a in truth["annotations"] if a["image_id"] == image_id]
    near = np.array([a["bbox"] for a in own]).reshape(-1, 4) * generator.uniform(0.85, 1.15, (len(own), 4))
    boxes = np.concatenate([near, random_boxes(generator, extra)])
    labels = [CATEGORIES.index(a["category_id"]) for a in own] + generator.integers(0, 3, extra).tolist()
    points = generator.uniform(0, SIZE, (len(boxes), 4, 3))
    for i, a in enumerate(own):
        points[i] = np.array(a["keypoints"]).reshape(4, 3) + generator.normal(0, 3, (4, 3))
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(masks, boxes.astype(int)):
        mask[y : y + h + 1, x : x + w + 1] = True
    xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    scores = np.round(generator.uniform(0, np.where(np.arange(len(boxes)) < len(own), 1.0, 0.3)), 2)  # rounded: ties
    order = np.argsort(-scores, kind="stable")
    return Detections(
        scores=torch.tensor(scores)[order],
        labels=torch.tensor(labels, dtype=torch.int64)[order],
        boxes=torch.tensor(xyxy)[order],
        masks=masks[order],
        keypoints=torch.tensor(points)[order],
    )


def raw_stats(truth: dict, detections: dict[int, Detections], iou_type: str, sigmas=None) -> np.ndarray:
    """The official numbers, by way of the official result format."""
    results = []
    for image_id, found in detections.items():
        for i in range(len(found)):
            x0, y0, x1, y1 = found.boxes[i].tolist()
            result = {"image_id": image_id, "score": found.scores[i].item()}
            result["category_id"] = CATEGORIES[int(found.labels[i])]
            if iou_type == "bbox":
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            elif iou_type == "segm":
                result["segmentation"] = codec.encode(np.asfortranarray(found.masks[i].numpy().astype(np.uint8)))
            else:
                result["keypoints"] = found.keypoints[i].reshape(-1).tolist()
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "info": {}, "annotations": [dict(a) for a in truth["annotations"]]}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), iou_type)
        if sigmas is not None:
            evaluator.params.kpt_oks_sigmas = np.array(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def make_metric(truth: dict, **settings) -> CocoMetric:
    return CocoMetric(truth=truth, category_ids=CATEGORIES, classes=["a", "b", "c"], **settings)


def case(seed: int, num_images: int = 12, extra: int = 8) -> tuple[dict, dict[int, Detections]]:
    generator = np.random.default_rng(seed)
    truth = random_truth(generator, num_images)
    ids = range(1, num_images + 1)
    return truth, {i: random_detections(generator, truth, i, 0 if i == 2 else extra) for i in ids}


BACKENDS = ["pycocotools"]
with contextlib.suppress(ImportError):
    import ultrafast_pycocotools  # noqa: F401

    BACKENDS.append("fast")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_official_numbers(backend, iou_type, seed, capsys):
    truth, detections = case(seed)
    metric = make_metric(truth, iou_types=["bbox", iou_type] if iou_type == "segm" else ["bbox"], backend=backend)
    metric.update(list(detections), list(detections.values()))
    values = metric.compute()
    prefix = "segm_" if iou_type == "segm" else ""
    found = [values[prefix + name] for name in OFFICIAL_NAMES]
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(found, raw_stats(truth, detections, iou_type))
    assert 0.05 < values["mAP"] < 0.95


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_keypoint_numbers(backend):
    truth, detections = case(2)
    sigmas = [0.05, 0.1, 0.05, 0.02]
    metric = make_metric(truth, iou_types=["bbox", "keypoints"], keypoint_sigmas=[sigmas] * 3, backend=backend)
    metric.update(list(detections), list(detections.values()))
    values = metric.compute()
    stats = raw_stats(truth, detections, "keypoints", sigmas)
    names = ["mAP", "mAP50", "mAP75", "mAP_medium", "mAP_large", "mAR"]
    np.testing.assert_array_equal([values[f"keypoint_{name}"] for name in names], stats[:6])
    assert 0.05 < values["keypoint_mAP"] < 0.95


def test_classes_with_different_points_count_alike():
    truth, detections = case(3)
    sigmas = [[0.05] * 4, [0.05] * 2, []]
    metric = make_metric(truth, iou_types=["keypoints"], keypoint_sigmas=sigmas)
    for annotation in metric.truth.dataset["annotations"]:  # the class with two points
        if annotation["category_id"] == CATEGORIES[1]:
            annotation["keypoints"] = annotation["keypoints"][:6]
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    metric.update(list(detections), list(detections.values()))
    values = metric.compute()
    assert values["keypoint_AP/c"] == -1
    assert values["keypoint_mAP"] == pytest.approx((values["keypoint_AP/a"] + values["keypoint_AP/b"]) / 2)


def test_detections_beyond_the_official_limit_count_only_where_they_may():
    """120 false alarms with better scores than the only true one."""
    truth = {
        "images": [{"id": 1, "height": SIZE, "width": SIZE}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50]}],
    }
    boxes = torch.tensor([[150.0, 150, 160, 160]] * 120 + [[10.0, 10, 60, 60]])
    found = Detections(scores=torch.linspace(1, 0.1, 121), labels=torch.zeros(121, dtype=torch.int64), boxes=boxes)
    metric = make_metric(truth, eval_max_dets=500)
    metric.update([1], [found])
    values = metric.compute()
    assert values["mAP"] == values["mAR"] == 0.0
    assert values["mAP_max_dets"] == pytest.approx(1 / 121)
    assert values["mAR_max_dets"] == 1.0


def test_per_class_values_belong_to_the_right_class():
    truth, detections = case(4)
    for found in detections.values():  # label 1 is never detected
        found.labels[found.labels == 1] = 2
    metric = make_metric(truth)
    metric.update(list(detections), list(detections.values()))
    values = metric.compute()
    assert values["AP/a"] > 0.05
    assert values["AP/b"] == 0.0
    assert values["AP/c"] == -1.0
    assert values["mAP"] == pytest.approx(values["AP/a"] / 2)
    rows = metric.table()
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    assert rows[2]["objects"] == 0 < rows[1]["objects"]
    assert rows[0]["AP"] == values["AP/a"]


NOTHING = Detections(scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_at_all_is_zero(backend):
    truth, detections = case(5)
    metric = make_metric(truth, backend=backend)
    metric.update(list(detections), [NOTHING] * len(detections))
    values = metric.compute()
    assert values["mAP"] == values["mAR"] == values["F1"] == 0.0
    metric.reset()
    assert metric.compute() == values  # images that were never evaluated were not found either


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_without_objects_has_no_values(backend):
    truth, detections = case(6)
    metric = make_metric(truth | {"annotations": []}, backend=backend)
    metric.update(list(detections), list(detections.values()))
    values = metric.compute()
    assert values["mAP"] == values["mAP_small"] == values["AP/a"] == -1.0
    assert values["F1"] == 0.0


def test_the_ground_truth_as_prediction_is_perfect():
    truth, _ = case(7)
    truth["annotations"] = [a | {"iscrowd": 0, "id": a["id"] - 1} for a in truth["annotations"]]  # ids from 0
    sigmas = [[0.05] * 4] * 3
    metric = make_metric(truth, iou_types=["bbox", "segm", "keypoints"], keypoint_sigmas=sigmas)
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float64).reshape(-1, 4)
        masks = [codec.decode(codec.merge(codec.frPyObjects(a["segmentation"], SIZE, SIZE))) for a in own]
        found = Detections(
            scores=torch.ones(len(own)),
            labels=torch.tensor([CATEGORIES.index(a["category_id"]) for a in own], dtype=torch.int64),
            boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            masks=torch.tensor(np.array(masks).reshape(-1, SIZE, SIZE)).bool(),
            keypoints=torch.tensor([a["keypoints"] for a in own], dtype=torch.float64).reshape(-1, 4, 3),
        )
        metric.update([image["id"]], [found])
    values = metric.compute()
    for name in ("mAP", "segm_mAP", "keypoint_mAP", "F1", "segm_F1", "keypoint_F1", "mAP_small", "mAR"):
        assert values[name] == pytest.approx(1.0), name


def test_an_image_evaluated_twice_counts_once():
    truth, detections = case(8)
    once, twice = make_metric(truth), make_metric(truth)
    once.update(list(detections), list(detections.values()))
    twice.update(list(detections), list(detections.values()))
    twice.update([1], [detections[1]])  # as the padding of a distributed sampler does
    assert once.compute() == twice.compute()


def test_metric_names_are_legal_and_distinct():
    metric = CocoMetric(
        truth={"images": [], "annotations": []},
        category_ids=[1, 2, 3, 4, 5],
        classes=["50% off (new)", "50% off [new]", "../up", "", "größe"],
    )
    names = metric.metric_names()
    assert names == ["50_ off _new_", "50_ off _new__1", "_up", "class_3", "größe"]
    assert set(metric.compute()) >= {f"AP/{name}" for name in names}


def test_an_absent_fast_backend_is_reported_once_and_replaced(monkeypatch, caplog):
    monkeypatch.setitem(protocol.PACKAGES, "fast", ("no_such_package_here", "pycocotools"))
    protocol.load.cache_clear()
    truth, _ = case(9)
    make_metric(truth, backend="fast").compute()
    make_metric(truth, backend="fast").compute()
    protocol.load.cache_clear()
    assert [record.message.split(";")[0] for record in caplog.records] == ["no-such-package-here is not installed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_max_dets": 0}, r"metric\.eval_max_dets is 0"),
        ({"backend": "slow"}, r"metric\.backend is 'slow'"),
        ({"iou_types": ["keypoints"]}, "the data set defines none"),
        ({"iou_types": ["segm"]}, "annotation 1 of image 1 has no mask"),
    ],
)
def test_what_does_not_fit_is_named(settings, message):
    truth = {
        "images": [{"id": 1, "height": 10, "width": 10}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 5, 5]}],
    }
    with pytest.raises(ValueError, match=message):
        make_metric(truth, **settings)
    with pytest.raises(ValueError, match="image 2 is not in the ground truth of this split"):
        make_metric(truth).update([2], [NOTHING])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["scores", "boxes", "keypoints"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_that_are_not_finite_are_no_detections(backend, what, bad):
    """Values are those of the others alone, and everything that was left out is counted."""
    truth, found = case(seed=3)
    settings = {"iou_types": ("bbox", "segm", "keypoints"), "keypoint_sigmas": [[0.1] * 4] * 3, "backend": backend}
    expected, metric = make_metric(truth, **settings), make_metric(truth, **settings)
    expected.update(list(found), list(found.values()))
    for image_id, own in found.items():
        broken = random_detections(np.random.default_rng(7), truth, image_id, 3)
        getattr(broken, what).view(len(broken), -1)[:, -1] = bad
        both = {name: torch.cat([getattr(broken, name), getattr(own, name)]) for name in FIELDS}
        metric.update([image_id], [Detections(**both)])
    added = sum(len(random_detections(np.random.default_rng(7), truth, image_id, 3)) for image_id in found)
    assert metric.compute() == expected.compute() | {"nonfinite": added}
    assert added > 0 == expected.compute()["nonfinite"]


def test_what_is_measured_may_be_named_as_the_monitor():
    truth, _ = case(seed=0, num_images=2)
    metric = make_metric(truth, iou_types=("bbox", "segm", "keypoints"), keypoint_sigmas=[[0.1] * 4] * 3)
    names = set(metric.compute()) - {"nonfinite"}
    for name in names:
        refuse_unknown_metric(name)
        refuse_unknown_metric(f"val/{name}")
    assert {f"{task}{name}" for task in TASKS[:2] for name in METRICS} <= names, "nothing is promised in vain"
    for name in ("nonfinite", "map", "AP", "box_mAP"):
        with pytest.raises(ConfigError, match="no evaluation measures"):
            refuse_unknown_metric(name)
