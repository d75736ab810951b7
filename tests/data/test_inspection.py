"""The findings of an inspection."""

from __future__ import annotations

from functools import partial

import pytest
from PIL import Image

from detr_exp.data.augment import Augment
from detr_exp.data.auto import auto
from detr_exp.data.inspection import inspect

from .conftest import CATEGORIES, data_set, document, write_image


def kinds(root, level: str = "warning", num_queries: int = 300, **settings) -> dict[str, list[str]]:
    found, _ = inspect(partial(data_set, root, **settings), image_size=(64, 96), num_queries=num_queries)
    return {finding.kind: finding.cases for finding in found.findings if finding.level == level}


def only(found: dict[str, list[str]], words: str) -> list[str]:
    (cases,) = (cases for kind, cases in found.items() if words in kind)
    return cases


def test_numbers_of_splits_and_classes(roboflow):
    root = roboflow(train=document(), valid=document(annotations=document()["annotations"][:1]))
    found, _ = inspect(partial(data_set, root), image_size=(64, 96), num_queries=300)
    train = found.splits["train"]
    assert (train["images"], train["empty"], train["objects"]) == (2, 1, 2)
    assert train["per_image"] == {"min": 0, "median": 1, "mean": 1, "p99": 1.98, "max": 2}
    assert (train["small"], train["medium"], train["large"]) == (2, 0, 0)
    assert train["object_side"]["max"] == pytest.approx(200**0.5, abs=1e-3)
    ball, cup = found.classes
    assert (cup["id"], cup["label"], cup["name"]) == (7, 1, "cup")
    assert cup["val"] == {"objects": 1, "images": 1, "median_side": 14.1}
    assert ball["val"] == {"objects": 0, "images": 0, "median_side": None}


def test_sound_data_have_no_warnings(roboflow):
    assert kinds(roboflow(train=document(), valid=document())).keys() == {
        "images of one split are in another too: metrics on them are not on unseen images"
    }


def test_leakage_is_found_by_content(roboflow):
    root = roboflow(train=document(), valid=document())
    for split, name, seed in (("train", "a.png", 1), ("train", "b.png", 2), ("valid", "a.png", 3)):
        write_image(root / split / name, seed=seed)
    Image.open(root / "train" / "b.png").save(root / "valid" / "b.png", compress_level=0)  # other bytes, same pixels
    (case,) = only(kinds(root), "in another too")
    assert case == f"train {root}/train/b.png = val {root}/valid/b.png"
    write_image(root / "train" / "b.png", seed=1)
    assert only(kinds(root), "more than once") == [f"train {root}/train/a.png = train {root}/train/b.png"]


def test_images_are_decoded(roboflow):
    root = roboflow(train=document())
    (root / "train" / "b.png").write_bytes((root / "train" / "b.png").read_bytes()[:600])
    Image.open(root / "train" / "a.png").save(root / "train" / "a.png", "JPEG")
    assert "b.png cannot be decoded" in only(kinds(root, "error"), "cannot be read")[0]
    assert only(kinds(root), "whose name says PNG are JPEG") == [str(root / "train" / "a.png")]


def test_turned_images_are_named(roboflow):
    root = roboflow(train=document())
    for name, orientation, size in (("a.png", 6, (60, 40)), ("b.png", 3, (60, 40))):
        tags = Image.Exif()
        tags[0x0112] = orientation
        Image.new("RGB", size).save(root / "train" / name, "JPEG", exif=tags)
    found = kinds(root)
    assert only(found, "EXIF tags were ignored") == [str(root / "train" / "a.png")]
    assert only(found, "cannot be told from the size") == [str(root / "train" / "b.png")]


def test_objects_that_are_odd(roboflow):
    annotations = document()["annotations"]
    annotations += [{**annotations[0], "id": 3}, {**annotations[0], "id": 4, "bbox": [1, 1, 2, 30]}]
    found = kinds(roboflow(train=document(annotations=annotations)), num_queries=3)
    assert "2 times" in only(found, "annotated twice")[0]
    assert only(found, "more objects than the 3 queries")[0].endswith("a.png: 4 objects")
    assert only(found, "under 4 pixels")[0].endswith("a.png: 2x30")


def test_classes_without_objects(roboflow):
    categories = [*CATEGORIES, {"id": 9, "name": "pen"}]
    root = roboflow(train=document(categories=categories), valid=document(annotations=[]))
    found = kinds(root)
    assert only(found, "never learned") == ["9 'pen'"]
    assert len(only(found, "not measured here")) == 3


@pytest.mark.parametrize("name", ["turn_left", "RightArrow", "hand-L", "left"])
def test_names_of_directions_are_pointed_out_under_flips(roboflow, name):
    root = roboflow(train=document(categories=[{"id": 7, "name": name}, {"id": 3, "name": "leftover"}]))
    assert only(kinds(root, augment=Augment(flip=0.5)), "name a direction") == [repr(name)]
    assert not any("direction" in kind for kind in kinds(root))


def test_keypoints_under_flips(roboflow):
    def found(names: list[str]) -> dict[str, list[str]]:
        categories = [{"id": 7, "name": "cup", "keypoints": names}, CATEGORIES[1]]
        return kinds(roboflow(train=document(categories=categories)), augment=Augment(flip=0.5))

    assert only(found(["rim", "foot"]), "mirror pairs are not known") == ["'cup': rim, foot"]
    assert only(found(["left eye", "right eye", "left ear"]), "are in no mirror pair") == ["'cup': 'left ear'"]
    assert not any("keypoint" in kind for kind in found(["left eye", "right eye", "nose"]))


def test_what_cannot_be_read_is_a_finding(roboflow, tmp_path):
    root = roboflow(train=document(), valid="{")
    assert "not readable JSON" in only(kinds(root, "error"), "cannot be read")[0]
    assert only(kinds(root, "note"), "does not have") == ["test"]
    found, data = inspect(partial(data_set, tmp_path / "nowhere", auto), image_size=(64, 96), num_queries=300)
    assert data is None
    assert "which is not a folder" in found.findings[0].cases[0]


def test_bccd_is_known_by_its_two_boxes(real_data):
    found, _ = inspect(partial(data_set, real_data / "bccd_coco", auto), image_size=(640, 640), num_queries=300)
    boxes = [finding for finding in found.findings if "without area" in finding.kind]
    assert [finding.source.split("/")[-2] for finding in boxes] == ["train", "valid"]
    assert [finding.cases[0].split(":")[0] for finding in boxes] == ["annotation 2288", "annotation 887"]
    assert {name: facts["objects"] for name, facts in found.splits.items()} == {"train": 2804, "val": 1137, "test": 945}


def test_images_that_no_split_lists_are_named(roboflow):
    root = roboflow(train=document(), valid=document())
    write_image(root / "train" / "c.gif")
    assert only(kinds(root, "note"), "no split lists") == [str(root / "train" / "c.gif")]


@pytest.mark.parametrize("pair", [("Car", "car"), ("traffic light", "traffic_light"), ("caf\u00e9", "cafe\u0301")])
def test_names_that_are_easily_confused_are_reported_by_both(roboflow, pair, caplog):
    categories = [{"id": 7, "name": pair[0]}, {"id": 3, "name": pair[1]}]
    root = roboflow(train=document(categories=categories), valid=document(categories=categories))
    assert only(kinds(root), "only in spelling") == [" and ".join(map(repr, pair[::-1]))]
    data_set(root).check()
    assert "differ only in spelling (1)" in caplog.text
