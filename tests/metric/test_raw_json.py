"""From annotation file to numbers, beside COCOeval reading the same file and a file of results."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_exp import build
from detr_exp.protocols import TASKS
from detr_exp.structures import Detections

HEIGHT, WIDTH = 160, 200
IMAGES = [4, 9, 2, 30, 17, 11, 8]
WITHOUT_OBJECTS, WITHOUT_DETECTIONS, CROWDED = 2, 17, 9
NAMES = {5: "ball", 3: "cup", 8: "lamp"}  # no lamp is ever annotated
POINTS = ["rim", "left_ear", "right_ear", "foot"]
SIGMAS = [0.05, 0.1, 0.05, 0.02]
BOX_STATS = ["mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"]
BOX_STATS += ["mAR_1", "mAR_10", "mAR", "mAR_small", "mAR_medium", "mAR_large"]
KEYPOINT_STATS = ["mAP", "mAP50", "mAP75", "mAP_medium", "mAP_large", "mAR"]


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """`[count, 4]` x, y, width, height of all of COCO's sizes."""
    sides = np.exp(rng.uniform(np.log(8), np.log(140), (count, 2)))
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides), sides], 1).round(2)


def annotation(rng: np.random.Generator, number: int, image: int, box: np.ndarray, crowd: bool) -> dict[str, Any]:
    x, y, w, h = box.tolist()
    points = np.stack([rng.uniform(x, x + w, 4).round(), rng.uniform(y, y + h, 4).round(), rng.integers(1, 3, 4)], 1)
    points[rng.random(4) < (1.0 if crowd or rng.random() < 0.2 else 0.3)] = 0  # some objects have none at all
    corners = [x, y, x + w, y, x + 0.8 * w, y + h, x, y + 0.9 * h]
    found = {"id": number, "image_id": image, "category_id": int(rng.choice([5, 3])), "bbox": [x, y, w, h]}
    found |= {"area": 0.7 * w * h, "iscrowd": int(crowd), "segmentation": [corners]}
    if crowd:  # as in COCO: runs that are not compressed
        pixels = codec.decode(codec.merge(codec.frPyObjects([corners], HEIGHT, WIDTH))).ravel("F")
        turns = np.flatnonzero(np.diff(pixels, prepend=0, append=1 - pixels[-1]))
        found["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": np.diff(turns, prepend=0).tolist()}
    return found | {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for image in IMAGES:
        count = {WITHOUT_OBJECTS: 0, CROWDED: 20}.get(image, 6)
        for i, box in enumerate(random_boxes(rng, count)):
            annotations.append(annotation(rng, len(annotations) + 1, image, box, crowd=i % 5 == 4))
    document = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in IMAGES],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "keypoints": POINTS, "skeleton": []} for i, name in NAMES.items()],
    }
    for split in ("train", "valid"):
        (folder / split).mkdir()
        (folder / split / "_annotations.coco.json").write_text(json.dumps(document))
        for image in IMAGES:
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / split / f"{image}.png")
    return folder


def detections(root: Path, labels: dict[int, int]) -> dict[int, Detections]:
    """Shifted ground truth among false positives; in one image more of a class than the protocol counts."""
    rng = np.random.default_rng(1)
    truth = json.loads((root / "valid/_annotations.coco.json").read_text())["annotations"]
    found = {}
    for image in IMAGES:
        own = [a for a in truth if a["image_id"] == image]
        extra = {WITHOUT_DETECTIONS: 0, CROWDED: 330}.get(image, 10)
        own = [] if image == WITHOUT_DETECTIONS else own
        near = np.array([a["bbox"] for a in own]).reshape(-1, 4) * rng.uniform(0.9, 1.1, (len(own), 4))
        boxes = np.concatenate([near, random_boxes(rng, extra)])
        points = rng.uniform(0, WIDTH, (len(boxes), 4, 3))
        for i, a in enumerate(own):
            points[i] = np.array(a["keypoints"]).reshape(4, 3) + rng.normal(0, 1.5, (4, 3))
        masks = np.zeros((len(boxes), HEIGHT, WIDTH), bool)
        for mask, (x, y, w, h) in zip(masks, boxes.astype(int)):
            mask[y : y + h + 1, x : x + w] = True
        chosen = [labels[a["category_id"]] for a in own] + rng.integers(0, 3, extra).tolist()
        found[image] = Detections(
            scores=torch.tensor(rng.uniform(0, np.where(np.arange(len(boxes)) < len(own), 1.0, 0.4)).round(2)),
            labels=torch.tensor(chosen, dtype=torch.int64),
            boxes=torch.tensor(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).reshape(-1, 4)),
            masks=torch.tensor(masks),
            keypoints=torch.tensor(points),
        )
    return found


def official(
    annotations: Path, results: Path, found: dict[int, Detections], category_ids: list[int], iou_type: str, sigmas=None
) -> list[float]:
    """COCOeval's own numbers, of the annotation file and a file in COCO's form of results."""
    rows = []
    for image, one in found.items():
        codes = [codec.encode(np.asfortranarray(mask, np.uint8)) for mask in one.masks.numpy()]
        for i, (x0, y0, x1, y1) in enumerate(one.boxes.tolist()):
            row = {"image_id": image, "category_id": category_ids[one.labels[i]], "score": one.scores[i].item()}
            rows.append(
                row
                | {
                    "bbox": {"bbox": [x0, y0, x1 - x0, y1 - y0]},
                    "segm": {"segmentation": codes[i] | {"counts": codes[i]["counts"].decode()}},
                    "keypoints": {"keypoints": one.keypoints[i].flatten().tolist()},
                }[iou_type]
            )
    results.write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluator = COCOeval(coco, coco.loadRes(str(results)), iou_type)
        if sigmas is not None:
            evaluator.params.kpt_oks_sigmas = np.array(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


@pytest.mark.parametrize("backend", ["pycocotools", "fast"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_our_numbers_are_those_of_coco(root: Path, tmp_path: Path, iou_type: str, backend: str) -> None:
    if backend == "fast":
        pytest.importorskip("ultrafast_pycocotools")
    cfg = build.compose(["data=auto", f"data.root={root}", f"data.keypoint_sigmas={SIGMAS}", f"metric={backend}"])
    data = build.data(cfg)
    found = detections(root, {number: label for label, number in enumerate(data.category_ids)})
    network = SimpleNamespace(tasks=("boxes", {"segm": "masks"}.get(iou_type, iou_type)), keypoint_counts=())
    metric = build.metric(cfg, data, network)("val")
    metric.update(list(found), list(found.values()))
    values = metric.compute()
    file, sigmas = root / "valid/_annotations.coco.json", SIGMAS if iou_type == "keypoints" else None
    expected = official(file, tmp_path / "results.json", found, data.category_ids, iou_type, sigmas)
    prefix, names = {"bbox": ("", BOX_STATS), "segm": ("segm_", BOX_STATS)}.get(iou_type, ("keypoint_", KEYPOINT_STATS))
    np.testing.assert_array_equal([values[prefix + name] for name in names], expected[: len(names)])
    assert 0.05 < expected[0] < 0.9


def test_the_case_has_what_is_easily_done_wrong(root: Path) -> None:
    truth = json.loads((root / "valid/_annotations.coco.json").read_text())["annotations"]
    found = detections(root, {5: 0, 3: 1})
    assert sum(a["iscrowd"] for a in truth) >= 5
    assert sum(a["num_keypoints"] == 0 and not a["iscrowd"] for a in truth) >= 2
    assert WITHOUT_OBJECTS not in {a["image_id"] for a in truth}
    assert len(found[WITHOUT_OBJECTS]) > 0
    assert len(found[WITHOUT_DETECTIONS]) == 0
    assert found[CROWDED].labels.bincount().min() > 100
    assert {a["category_id"] for a in truth} == {5, 3}


@pytest.mark.parametrize("inside", [False, True])
def test_objects_without_points_are_ignored_where_their_points_lie_in_them(
    real_data: Path, tmp_path: Path, inside: bool
) -> None:
    """The annotations are a perfect prediction, except people of whom no point is labelled: they are ignored,
    and so is a prediction within their box; zeros, as their annotation has, are a false alarm."""
    root, file = real_data / "coco_person", "person_keypoints.json"
    words = [f"data.{split}.annotations={file}" for split in ("train", "val")]
    cfg = build.compose(["data=coco", f"data.root={root}", *words])
    network = SimpleNamespace(tasks=TASKS, keypoint_counts=())
    metric = build.metric(cfg, build.data(cfg), network)("val")
    truth = json.loads((root / file).read_text())
    found = {}
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in own])
        points = np.array([a["keypoints"] for a in own], float).reshape(-1, 17, 3)
        for box, person in zip(boxes, points):
            if inside and not person.any():
                person[:, :2] = box[:2] + box[2:] / 2
        size = image["height"], image["width"]
        masks = [codec.decode(codec.merge(codec.frPyObjects(a["segmentation"], *size))) for a in own]
        found[image["id"]] = Detections(
            scores=torch.ones(len(own)),
            labels=torch.zeros(len(own), dtype=torch.int64),
            boxes=torch.tensor(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)),
            masks=torch.tensor(np.array(masks)).bool(),
            keypoints=torch.tensor(points),
        )
    metric.update(list(found), list(found.values()))
    values = metric.compute()
    assert values["mAP"] == pytest.approx(1.0)
    assert values["segm_mAP"] == pytest.approx(1.0)
    assert values["keypoint_mAP"] == official(root / file, tmp_path / "results.json", found, [1], "keypoints")[0]
    assert values["keypoint_mAP"] == (pytest.approx(1.0) if inside else pytest.approx(0.894, abs=0.001))
