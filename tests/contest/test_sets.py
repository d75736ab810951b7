"""Sets as every program can read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from detr_exp.contest.job import ANNOTATIONS
from detr_exp.contest.sets import read_set, write_fold


def test_what_is_held_out_is_not_trained_on(squares: Path) -> None:
    (fold,) = read_set("squares", str(squares), None).folds
    assert (len(fold.train), len(fold.held_out)) == (6, 4)
    assert not set(fold.train) & set(fold.held_out)


def test_folds_hold_out_every_image_once(squares: Path) -> None:
    data = read_set("squares", str(squares), 3)
    assert sorted(number for fold in data.folds for number in fold.held_out) == list(range(1, 11))
    assert all(set(fold.train) | set(fold.held_out) == set(range(1, 11)) for fold in data.folds)
    assert len(data.truth["annotations"]) == 10


def test_programs_get_the_images_and_not_the_answers(squares: Path, tmp_path: Path) -> None:
    data = read_set("squares", str(squares), None)
    write_fold(data.content, data.folds[0], tmp_path / "given")
    train, held_out = (
        json.loads((tmp_path / "given" / name / ANNOTATIONS).read_text()) for name in ("train", "held_out")
    )
    assert (len(train["images"]), len(train["annotations"])) == (6, 6)
    assert (len(held_out["images"]), held_out["annotations"]) == (4, [])
    for image in held_out["images"]:
        with Image.open(tmp_path / "given" / "held_out" / image["file_name"]) as opened:
            assert opened.getpixel((0, 0))[2] == 255  # type: ignore[index]


def test_a_fingerprint_is_of_pixels_and_boxes_and_not_of_the_place(squares: Path, tmp_path: Path) -> None:
    first = read_set("squares", str(squares), None).fingerprint
    moved = squares.rename(tmp_path / "elsewhere")
    assert read_set("squares", str(moved), None).fingerprint == first
    assert read_set("squares", str(moved), 2).fingerprint != first
    Image.new("RGB", (40, 30), (9, 9, 9)).save(moved / "valid" / "0.png")
    assert read_set("squares", str(moved), None).fingerprint != first


def test_an_absent_folder_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sets\.cats\.root is .*nowhere.*data=FOLDER"):
        read_set("cats", str(tmp_path / "nowhere"), None)


def test_a_set_that_holds_nothing_out_is_refused(squares: Path) -> None:
    (squares / "valid").rename(squares.with_name("away"))
    with pytest.raises(ValueError, match=r"only a training split.*sets\.squares\.folds=5"):
        read_set("squares", str(squares), None)
