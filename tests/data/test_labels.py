"""Label files where tools put them, and label files or images without a counterpart."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp.data.inspection import inspect
from detr_exp.data.yolo import yolo

from .conftest import data_set, write_image

ROW = "0 .5 .5 .2 .4\n"


def write(root: Path, files: list[str], train: str = "train/images") -> Path:
    """Images, label files of one row, and a data.yaml."""
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(f"names: [a, b]\ntrain: {train}\n")
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".txt"):
            (root / name).write_text(ROW)
        else:
            write_image(root / name, seed=i)
    return root


def counts(root: Path, **settings) -> list[int]:
    split = yolo(str(root), {}, **settings).read["train"]()
    return [len(split.objects(i)) for i in range(len(split))]


def said(root: Path, words: str, level: str = "warning") -> list[str]:
    found, _ = inspect(lambda: data_set(root, yolo), image_size=(64, 96), num_queries=300)
    return [
        case for finding in found.findings if finding.level == level and words in finding.kind for case in finding.cases
    ]


@pytest.mark.parametrize(
    ("train", "image", "label"),
    [
        ("train/images", "train/images/p.png", "train/labels/p.txt"),  # Roboflow
        ("images/train", "images/train/p.png", "labels/train/p.txt"),  # ultralytics, CVAT
        ("images", "images/p.png", "labels/p.txt"),  # Label Studio
        ("images/train", "images/train/day/1/p.png", "labels/train/day/1/p.txt"),
        ("a/images/b/images", "a/images/b/images/p.png", "a/images/b/labels/p.txt"),
        ("a/images/b/images", "a/images/b/images/p.png", "a/labels/b/images/p.txt"),
        ("Images/train", "Images/train/p.png", "Labels/train/p.txt"),
        ("IMAGES/Train", "IMAGES/Train/p.png", "labels/train/p.txt"),
        ("obj_train_data", "obj_train_data/p.png", "obj_train_data/p.txt"),  # Darknet, CVAT
        ("train", "train/p.png", "labels/train/p.txt"),
        ("train", "train/p.png", "train/labels/p.txt"),
        ("train/images", "train/images/p.png", "labels/train/p.txt"),
        ("images/train", "images/train/p.png", "train/labels/p.txt"),
        ("train/images", "train/images/p.png", "train/p.txt"),
        ("train/images", "train/images/p.v1.jpg.rf.0.png", "train/labels/p.v1.jpg.rf.0.TXT"),
        ("train/images", "train/images/p.png", "train/labels/p.Txt"),
        ("train/images", "train/images/p.png", "train/labels/p.png.txt"),
        (".", "p.png", "p.txt"),
    ],
)
def test_a_label_file_is_found_where_tools_put_it(tmp_path, train, image, label):
    root = write(tmp_path / "images", [image, label], train)  # the folder's own name is nobody's business
    assert counts(root) == [1]


@pytest.mark.parametrize("suffix", ["jfif", "gif", "bmp", "ppm", "JPG", "webp", "tga", "jp2", "avif"])
def test_every_format_that_is_read_counts_as_an_image(tmp_path, suffix):
    root = write(tmp_path, [f"train/images/p.{suffix}", "train/labels/p.txt"])
    assert counts(root) == [1]


def test_label_files_without_image_are_named(tmp_path):
    root = write(
        tmp_path,
        [
            "train/images/p.png",
            "train/labels/p.txt",
            "train/images/far/q.png",
            "train/labels/q.txt",
            "train/labels/deep/r.txt",
            "train/labels/classes.txt",
            "train/images/notes.txt",
        ],
    )
    (root / "train/labels/classes.txt").write_text("a\nb\n")
    (root / "train/images/notes.txt").write_text("taken on the first day of the year\n")
    assert counts(root) == [0, 1]
    named = said(root, "label files without image")
    assert [os.path.relpath(path, root) for path in named] == ["train/labels/q.txt", "train/labels/deep/r.txt"]
    assert said(root, "folders in which no image has")[0].startswith(f"{root}/train/images/far: 1 images")


def test_labels_of_another_split_have_their_image(tmp_path):
    root = write(
        tmp_path, ["images/p.png", "images/q.png", "images/r.png", "labels/p.txt", "labels/q.txt"], "train.txt"
    )
    (root / "data.yaml").write_text("names: [a, b]\ntrain: train.txt\nval: val.txt\n")
    (root / "train.txt").write_text("images/p.png\nimages/r.png\n")
    (root / "val.txt").write_text("./images/q.png\n")
    assert counts(root) == [1, 0]
    assert not said(root, "label files")
    assert said(root, "without label file", "note") == [str(root / "images/r.png")]


def test_two_label_files_of_one_image_and_one_of_two(tmp_path):
    root = write(tmp_path, ["train/images/p.png", "train/images/p.bmp", "train/labels/p.txt", "train/images/p.txt"])
    (root / "train/images/p.txt").write_text("1 .5 .5 .2 .4\n")
    assert counts(root) == [1, 1]
    assert len(said(root, "share a label file")) == 1
    assert said(root, "only the first label file")[0].startswith(f"{root}/train/images/p.txt")


def test_what_is_left_out_of_a_folder_is_named(tmp_path):
    files = ["p.png", "p.txt", "deep/q.png", "deep/q.txt"]
    root = write(
        tmp_path, [f"train/{kind}/{name}" for name in files for kind in ["labels" if "txt" in name else "images"]]
    )
    for name in ("photo.heic", "raw.cr2", "._p.png", ".DS_Store", "Thumbs.db"):
        (root / "train/images" / name).touch()
    write_image(root / "train/mask.png")
    (root / "data.yaml").write_text("names: [a]\ntrain: train\n")
    assert counts(root) == [1, 1]
    assert [Path(name).name for name in said(root, "not read as images")] == ["photo.heic", "raw.cr2"]
    assert said(root, "images outside") == [str(root / "train/mask.png")]


def test_linked_folders_are_followed_once(tmp_path):
    root = write(
        tmp_path / "set", ["train/images/p.png", "train/labels/p.txt", "more/images/q.png", "more/labels/q.txt"]
    )
    (root / "train/images/more").symlink_to("../../more/images")
    (root / "train/images/again").symlink_to(root / "more/images")
    (root / "train/images/up").symlink_to("..")
    (root / "train/images/round").symlink_to(".")
    assert counts(root) == [1, 1]  # q has its label where it really is
    assert {case.split()[0].rsplit("/", 1)[1] for case in said(root, "folders were left out")} == {
        "more",
        "round",
        "up",
    }
    (root / "train/labels/again").symlink_to("../../more/labels")
    (root / "more/labels/q.txt").write_text(ROW + "1 .3 .3 .1 .1\n")
    assert counts(root) == [2, 1]
    write_image(tmp_path / "else" / "x.png")
    (root / "train/images/out").symlink_to(tmp_path / "else")
    with pytest.raises(ValueError, match=r"point outside the data set(.|\n)*extra_roots"):
        counts(root)
    assert counts(root, extra_roots=[str(tmp_path / "else")]) == [2, 0, 1]


def test_a_linked_folder_with_labels_of_its_own_uses_them(tmp_path):
    root = write(tmp_path, ["pool/images/p.png", "pool/labels/p.txt", "task/labels/other.txt"], "task/images")
    (root / "task/images").symlink_to("../pool/images")
    assert counts(root) == [0]
    (root / "task/labels/p.txt").write_text(ROW + ROW)
    assert counts(root) == [2]


def test_no_labels_at_all_lists_the_searched_folders(tmp_path):
    root = write(tmp_path, ["train/photos/p.png", "train/labels/p.txt"], "train/photos")
    with pytest.raises(ValueError, match=r"no object to train on(.|\n)*0 of 1 images(.|\n)*train/photos/p\.txt"):
        data_set(root, yolo).check(["train"])


def test_a_folder_of_a_list_without_images_is_refused(tmp_path):
    root = write(
        tmp_path, ["train/images/p.png", "train/labels/p.txt", "more/images/q.txt"], "[train/images, more/images]"
    )
    with pytest.raises(ValueError, match=r"no images in folders or lists that are named(.|\n)*more/images"):
        counts(root)


@pytest.mark.parametrize("closed", ["train/images/far", "train/labels"])
def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(tmp_path, monkeypatch, closed):
    root = write(tmp_path, ["train/images/p.png", "train/labels/p.txt", "train/images/far/q.png"])

    def closing(look: Callable) -> Callable:
        def refuse(place):
            if Path(place) == root / closed:
                raise PermissionError(13, "Permission denied", str(place))
            return look(place)

        return refuse

    monkeypatch.setattr(os, "listdir", closing(os.listdir))
    monkeypatch.setattr(os, "scandir", closing(os.scandir))
    with pytest.raises(ValueError, match=rf"{closed} cannot be read .Permission denied"):
        counts(root)
