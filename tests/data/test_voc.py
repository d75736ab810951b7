"""Pascal VOC: the kit's years and lists, folders per split, and XML that cannot be used."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from detr_exp import build
from detr_exp.data.auto import auto
from detr_exp.data.coco import coco
from detr_exp.data.voc import voc

from .conftest import data_set, write_image

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def annotation(*objects: tuple[str, tuple], difficult: int = 0) -> str:
    items = (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{BOX.format(*box)}</object>"
        for name, box in objects
    )
    return f"<annotation><size><width>1</width></size>{''.join(items)}</annotation>"


def year(root: Path, name: str, **lists: str) -> Path:
    """A year of the kit with three images a, b, c of 60 x 40, and lists of them."""
    for i, stem in enumerate("abc"):
        write_image(root / name / "JPEGImages" / f"{stem}.jpg", seed=i)
    for kind in ("Annotations", "ImageSets/Main"):
        (root / name / kind).mkdir(parents=True)
    for stem in "ab":
        text = annotation(("cat", (10, 5, 30, 15)), ("dog", (1, 1, 60, 40)))
        (root / name / "Annotations" / f"{stem}.xml").write_text(text)
    for kind, stems in lists.items():
        (root / name / "ImageSets" / "Main" / f"{kind}.txt").write_text("\n".join(stems))
    return root


def names(split) -> list[str]:
    return ["/".join(Path(split.name(i)).parts[-3::2]) for i in range(len(split))]


def test_the_annotated_test_set_validates(tmp_path):
    year(tmp_path, "VOC2007", train="a", val="b", trainval="ab", test="a")
    year(tmp_path, "VOC2012", train="a", val="b", trainval="ab", test="c")
    content = voc(str(tmp_path), {})
    assert set(content.read) == {"train", "val"}
    assert names(content.read["train"]()) == ["VOC2007/a.jpg", "VOC2007/b.jpg", "VOC2012/a.jpg", "VOC2012/b.jpg"]
    assert names(content.read["val"]()) == ["VOC2007/a.jpg"]
    assert [c.name for c in content.categories][:2] == ["aeroplane", "bicycle"]
    assert len(content.categories) == 20


def test_without_one_val_does(tmp_path):
    year(tmp_path, "VOC2012", train="a", val="b", trainval="ab", test="c")
    content = voc(str(tmp_path / "VOC2012"), {})
    assert names(content.read["train"]()) == ["VOC2012/a.jpg"]
    assert names(content.read["val"]()) == ["VOC2012/b.jpg"]


def test_lists_by_name(tmp_path):
    year(tmp_path, "VOC2007", train="a", mine="b")
    (tmp_path / "pairs.txt").write_text("VOC2007/JPEGImages/c.jpg VOC2007/Annotations/a.xml\n")
    content = voc(str(tmp_path), {"train": ["VOC2007/ImageSets/Main/mine.txt"], "val": "pairs.txt"})
    assert names(content.read["train"]()) == ["VOC2007/b.jpg"]
    assert names(content.read["val"]()) == ["VOC2007/c.jpg"]
    with pytest.raises(ValueError, match=r"data\.val: .*does not exist"):
        voc(str(tmp_path), {"val": "none.txt"})


def test_corners_counted_from_one(tmp_path):
    year(tmp_path, "VOC2007", train="a")
    boxes = [voc(str(tmp_path), {}, one_based=flag).read["train"]().objects(0).boxes_xyxy for flag in (False, True)]
    np.testing.assert_array_equal(boxes[0], [[10, 5, 30, 15], [1, 1, 60, 40]])
    np.testing.assert_array_equal(boxes[1], [[9, 4, 30, 15], [0, 0, 60, 40]])


def test_difficult_objects_are_not_counted(tmp_path):
    year(tmp_path, "VOC2007", train="ab")
    (tmp_path / "VOC2007/Annotations/a.xml").write_text(annotation(("cat", (10, 5, 30, 15)), difficult=1))
    split = voc(str(tmp_path), {}).read["train"]()
    assert len(split.objects(0)) == 0
    assert split.truth()["annotations"][0]["iscrowd"] == 1
    whole = voc(str(tmp_path), {}, use_difficult=True).read["train"]()
    assert len(whole.objects(0)) == 1
    assert whole.truth()["annotations"][0]["iscrowd"] == 0
    assert whole.fingerprint != split.fingerprint


def test_the_recipe_follows_its_source():
    told = [f"experiment=rtdetrv2_r18vd_120e_{name}" for name in ("voc", "coco")]
    assert build.compose([told[0], "data.root=x"]).data.source.use_difficult
    assert not build.compose([told[1], "data=voc", "data.root=x"]).data.source.use_difficult


def test_nothing_but_difficult_objects_is_refused_with_the_way_out(tmp_path):
    year(tmp_path, "VOC2007", train="ab")
    for stem in "ab":
        (tmp_path / f"VOC2007/Annotations/{stem}.xml").write_text(annotation(("cat", (10, 5, 30, 15)), difficult=1))
    with pytest.raises(
        ValueError, match=r"no object to train on(.|\n)*2 are marked difficult(.|\n)*use_difficult=true"
    ):
        data_set(tmp_path, voc).check(["train"])


def test_what_a_folder_leaves_out_is_named(tmp_path, caplog):
    for name in ("a.bmp", "deep/b.webp", "c.gif", "d.png"):
        write_image(tmp_path / "train" / name)
    for name in ("a.xml", "deep/b.XML", "c.xml"):
        (tmp_path / "train" / name).write_text(annotation(("cup", (10, 5, 30, 15))))
    (tmp_path / "train" / "e.heic").touch()
    with caplog.at_level(logging.WARNING):
        split = voc(str(tmp_path), {}).read["train"]()
    assert [Path(split.name(i)).name for i in range(len(split))] == ["a.bmp", "c.gif", "b.webp"]
    assert "without XML file were left out" in caplog.text
    assert "d.png" in caplog.text
    assert "e.heic" in caplog.text


def test_a_year_without_the_list_is_named(tmp_path, caplog):
    year(tmp_path, "VOC2007", train="a", val="b")
    year(tmp_path, "VOC2012", trainval="ab")
    with caplog.at_level(logging.WARNING):
        voc(str(tmp_path), {})
    assert "years without ImageSets/Main/train.txt" in caplog.text
    assert "VOC2012" in caplog.text


def test_names_with_spaces_and_lists_of_one_class(tmp_path):
    year(tmp_path, "VOC2007", train="a")
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("a -1\nmy photo 1\n")
    write_image(tmp_path / "VOC2007/JPEGImages/my photo 1.png")
    (tmp_path / "VOC2007/Annotations/my photo 1.xml").write_text(annotation(("cat", (10, 5, 30, 15))))
    assert names(voc(str(tmp_path), {}).read["train"]()) == ["VOC2007/a.jpg", "VOC2007/my photo 1.png"]


def test_a_name_that_ends_in_a_number_is_not_another_images(tmp_path):
    year(tmp_path, "VOC2007", train="a")
    write_image(tmp_path / "VOC2007/JPEGImages/a 1.jpg")
    (tmp_path / "VOC2007/Annotations/a 1.xml").write_text(annotation(("cat", (10, 5, 30, 15))))
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text("a 1\na  1\n")
    assert names(voc(str(tmp_path), {}).read["train"]()) == ["VOC2007/a 1.jpg", "VOC2007/a.jpg"]


@pytest.mark.parametrize("strange", [True, 1000.0, None])
def test_names_that_yaml_has_changed_are_refused(tmp_path, strange):
    year(tmp_path, "VOC2007", train="a")
    with pytest.raises(ValueError, match="put it in quotes"):
        voc(str(tmp_path), {}, names=["cat", strange])


def test_a_folder_per_split(tmp_path):
    for part in ("train", "valid"):
        write_image(tmp_path / part / "x.v1.png")
        (tmp_path / part / "x.v1.xml").write_text(annotation(("cup", (10, 5, 30, 15)), ("ball", (1, 1, 60, 40))))
    content = auto(str(tmp_path), {})
    assert content.layout == "voc"
    assert [c.name for c in content.categories] == ["ball", "cup"]
    assert len(content.read["val"]().objects(0)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object><name>cat</name></object></annotation>", "a.xml: object 1: its bndbox"),
        (annotation(("cat", ("x", 1, 2, 3))), "four numbers"),
        ("<annotation>", "not readable XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "entities"),
        ("", "not readable XML"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, message):
    year(tmp_path, "VOC2007", train="ab")
    (tmp_path / "VOC2007/Annotations/a.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        voc(str(tmp_path), {}).read["train"]()


def test_a_class_that_was_not_named_is_refused(tmp_path):
    year(tmp_path, "VOC2007", train="ab")
    with pytest.raises(ValueError, match=r"2 problems(.|\n)*'dog'(.|\n)*data\.source\.names"):
        voc(str(tmp_path), {}, names=["cat"]).read["train"]()
    with pytest.raises(ValueError, match="every class once"):
        voc(str(tmp_path), {}, names=["cat", "cat"])


def test_missing_files_are_named(tmp_path):
    year(tmp_path, "VOC2007", train="ac")
    with pytest.raises(ValueError, match=r"c\.xml.* does not exist"):
        voc(str(tmp_path), {})
    with pytest.raises(ValueError, match=r"data\.train="):
        voc(str(tmp_path / "VOC2007" / "JPEGImages"), {})


@pytest.mark.parametrize(
    ("folder", "split", "images"), [("train", "train", 205), ("valid", "val", 87), ("test", "test", 72)]
)
def test_bccd_as_voc_gives_the_same_targets(real_data, tmp_path, folder, split, images):
    source = real_data / "bccd_coco" / folder
    document = json.loads((source / "_annotations.coco.json").read_text())
    classes = {c["id"]: c["name"] for c in document["categories"]}
    (tmp_path / "train").mkdir()
    for image in document["images"]:
        shutil.copy(source / image["file_name"], tmp_path / "train")
        boxes = [
            (classes[a["category_id"]], a["bbox"]) for a in document["annotations"] if a["image_id"] == image["id"]
        ]
        text = annotation(*((name, (x, y, x + w, y + h)) for name, (x, y, w, h) in boxes))
        (tmp_path / "train" / image["file_name"]).with_suffix(".xml").write_text(text)
    ours = voc(str(tmp_path), {}, names=list(classes.values())).read["train"]()
    theirs = coco(str(real_data / "bccd_coco"), {}).read[split]()
    of_file = {os.path.basename(theirs.name(i)): theirs.objects(i) for i in range(len(theirs))}
    assert len(ours) == len(theirs) == images
    for i in range(len(ours)):
        expected = of_file[os.path.basename(ours.name(i))]
        np.testing.assert_allclose(ours.objects(i).boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
        assert [classes[c] for c in expected.categories] == [
            ["RBC", "WBC", "Platelets"][c] for c in ours.objects(i).categories
        ]
