"""Detections as files that other tools read."""

from __future__ import annotations

import csv
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as codec
from pycocotools.coco import COCO

from detr_exp.data.yolo import yolo
from detr_exp.inference.writers import Coco, Table, Yolo, claimed, free
from detr_exp.structures import Detections

SIZE = (48, 64)  # height, width


@pytest.fixture
def detector() -> SimpleNamespace:
    return SimpleNamespace(classes=["ape", "bee"], category_ids=[3, 7], keypoints=SimpleNamespace(counts=[3, 0]))


def detections(*, masks: bool = False, keypoints: bool = False) -> Detections:
    """An ape and a bee."""
    filled = torch.zeros(2, *SIZE, dtype=torch.bool)
    filled[0, 4:20, 8:40], filled[1, 30:40, 50:60] = True, True
    points = torch.tensor([[10.0, 6, 0.9], [30, 12, 0.8], [20, 18, 0.1]])
    return Detections(
        scores=torch.tensor([0.75, 0.5]),
        labels=torch.tensor([0, 1]),
        boxes=torch.tensor([[8.0, 4, 40, 20], [50, 30, 60, 40]]),
        masks=filled if masks else None,
        keypoints=torch.stack([points, torch.zeros(3, 3)]) if keypoints else None,
        keypoint_covariance=torch.stack([torch.eye(2).expand(3, 2, 2), torch.full((3, 2, 2), torch.nan)])
        if keypoints
        else None,
    )


def test_coco_reads_the_json(detector: SimpleNamespace, tmp_path: Path) -> None:
    output = Coco(tmp_path, detector)
    output.add("a.jpg", "a", SIZE, detections(masks=True, keypoints=True))
    read = COCO(str(output.close()))
    ape, bee = read.loadAnns([1, 2])
    assert (ape["category_id"], bee["category_id"]) == (3, 7)
    assert ape["bbox"] == [8, 4, 32, 16]
    assert np.array_equal(read.annToMask(bee), detections(masks=True).masks[1].numpy())
    outline = codec.decode(codec.merge(codec.frPyObjects(ape["polygons"], *SIZE)))
    assert np.array_equal(outline, detections(masks=True).masks[0].numpy())
    assert ape["keypoints"] == pytest.approx([10, 6, 0.9, 30, 12, 0.8, 20, 18, 0.1])
    assert ape["keypoint_covariance"] == [[[1, 0], [0, 1]]] * 3
    assert bee["keypoints"] == bee["keypoint_covariance"] == []


@pytest.mark.parametrize("task", ["boxes", "masks", "keypoints"])
def test_a_training_reads_the_text(detector: SimpleNamespace, tmp_path: Path, task: str) -> None:
    if task == "keypoints":
        detector.keypoints.counts = [3, 3]
    output = Yolo(tmp_path, detector)
    objects = detections(masks=task == "masks", keypoints=task == "keypoints")
    output.add("a.jpg", "a", SIZE, objects)
    output.close()
    (tmp_path / "images").mkdir()
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "a.jpg")
    described = {"path": str(tmp_path), "train": "images", "val": "images", "names": detector.classes}
    described |= {"kpt_shape": [3, 3]} if task == "keypoints" else {}
    (tmp_path / "data.yaml").write_text(json.dumps(described))
    read = yolo(str(tmp_path), {"train": None, "val": None, "test": None}).read["train"]().objects(0)
    assert len(read) == 2
    assert read.boxes_xyxy == pytest.approx(objects.boxes.numpy(), abs=1e-3)
    if task == "keypoints":
        assert read.keypoints[0] == pytest.approx(np.array([[10, 6, 2], [30, 12, 2], [0, 0, 0]]), abs=1e-3)
    if task == "masks":
        again = codec.decode(codec.merge(codec.frPyObjects(read.segments[0], *SIZE)))
        assert np.array_equal(again, objects.masks[0].numpy())


def test_a_table(detector: SimpleNamespace, tmp_path: Path) -> None:
    output = Table(tmp_path, detector)
    output.add("a, b.jpg", "a", SIZE, detections())
    with open(output.close(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "image": "a, b.jpg",
        "class": "ape",
        "score": "0.75",
        "x0": "8.0",
        "y0": "4.0",
        "x1": "40.0",
        "y1": "20.0",
    }
    assert len(rows) == 2


def test_a_free_name(tmp_path: Path) -> None:
    assert free(tmp_path / "a.txt") == tmp_path / "a.txt"
    for name in ("a.txt", "a_2.txt"):
        (tmp_path / name).touch()
    assert free(tmp_path / "a.txt") == tmp_path / "a_3.txt"


def test_names_of_any_bytes_lose_nothing(detector: SimpleNamespace, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    for make in (Coco, Table):
        output = make(tmp_path, detector)
        output.add(name, "a", SIZE, detections())
        output.add("ok.jpg", "ok", SIZE, detections())
        text = output.close().read_bytes().decode()  # UTF-8, for every reader
        assert "ok.jpg" in text
        if make is Coco:
            assert os.fsencode(json.loads(text)["images"][0]["file_name"]) == b"caf\xe9.jpg"
        else:
            assert text.splitlines()[1].startswith("caf\\udce9.jpg,")


def test_detections_are_on_disk_before_the_end(detector: SimpleNamespace, tmp_path: Path) -> None:
    for make in (Coco, Table, Yolo):
        make(tmp_path, detector).add("a.jpg", "below/a", SIZE, detections())
    assert len(json.loads((tmp_path / "detections.json").read_text())["annotations"]) == 2
    assert len((tmp_path / "detections.csv").read_text().splitlines()) == 3
    assert len((tmp_path / "labels/below/a.txt").read_text().splitlines()) == 2


def test_a_full_disk_leaves_what_was_written(
    detector: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Coco(tmp_path, detector)
    output.add("a.jpg", "a", SIZE, detections())

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    output.add("b.jpg", "b", SIZE, detections())
    with pytest.raises(ValueError, match="could not be written"):
        output.close()
    assert [image["file_name"] for image in json.loads((tmp_path / "detections.json").read_text())["images"]] == [
        "a.jpg"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["detections.json"]


def test_boxes_of_the_text_stay_in_the_image(detector: SimpleNamespace, tmp_path: Path) -> None:
    boxes = torch.tensor([[-8.0, -4, 64, 52], [70, 5, 90, 9]])
    output = Yolo(tmp_path, detector)
    output.add("a.jpg", "a", SIZE, Detections(torch.ones(2), torch.tensor([1, 0]), boxes))
    assert (output.close() / "a.txt").read_text() == "1 0.5 0.5 1 1\n"


def test_two_writers_never_share_a_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: claimed(tmp_path / "a.json"), range(40)))
    assert len(set(made)) == 40
