"""YOLO data sets: the three kinds of rows, where images are searched, and errors with file and line."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp.data.yolo import yolo

from .conftest import write_image


def write(root: Path, rows: str = "1 0.5 0.5 0.2 0.4\n", description: str = "", split: str = "train") -> Path:
    """Two images of 60 x 40; the second has no text file."""
    (root / "data.yaml").write_text(description or "names: [a, b]\ntrain: train/images\n")
    for i, name in enumerate(("p.png", "q.png")):
        write_image(root / split / "images" / name, seed=i)
    (root / split / "labels").mkdir(exist_ok=True)
    (root / split / "labels" / "p.txt").write_text(rows)
    return root


def read(root: Path, split: str = "train"):
    return yolo(str(root), {}).read[split]()


def test_boxes_become_pixels_and_a_missing_file_means_no_objects(tmp_path):
    split = read(write(tmp_path))
    np.testing.assert_allclose(split.objects(0).boxes_xyxy, [[24, 12, 36, 28]])
    assert split.objects(0).categories.tolist() == [1]
    assert len(split.objects(1)) == 0
    assert not split.has_masks


@pytest.mark.parametrize("rows", ["1 0.5 0.5 0.2 0.4\r\n\r\n", "\ufeff1 0.5 0.5 0.2 0.4", "1.0\t.5  5e-1 0.2 0.4\n"])
def test_line_ends_marks_and_spaces_do_not_matter(tmp_path, rows):
    write(tmp_path)
    (tmp_path / "train/labels/p.txt").write_bytes(rows.encode())
    np.testing.assert_allclose(read(tmp_path).objects(0).boxes_xyxy, [[24, 12, 36, 28]])


def test_polygons_give_masks_and_boxes(tmp_path):
    split = read(write(tmp_path, "0 0.1 0.1 0.5 0.1 0.5 0.8\n1 0.5 0.5 0.2 0.4\n"))
    objects = split.objects(0)
    np.testing.assert_allclose(objects.boxes_xyxy[0], [6, 4, 30, 32])
    np.testing.assert_allclose(objects.segments[0], [[6, 4, 30, 4, 30, 32]])
    assert objects.segments[1] is None


def test_poses(tmp_path):
    description = "names: {0: a}\ntrain: train/images\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\nkpt_names: {0: [l, r]}\n"
    content = yolo(str(write(tmp_path, "0 0.5 0.5 0.5 0.5 0.25 0.5 2 0.9 0.9 0\n", description)), {})
    assert content.categories[0].keypoints == ["l", "r"]
    assert content.categories[0].flip_pairs == [(0, 1)]
    np.testing.assert_allclose(content.read["train"]().objects(0).keypoints, [[[15, 20, 2], [0, 0, 0]]])


def test_poses_without_visibility(tmp_path):
    description = "names: [a]\ntrain: train/images\nkpt_shape: [2, 2]\n"
    split = read(write(tmp_path, "0 0.5 0.5 0.5 0.5 0.25 0.5 0 0\n", description))
    np.testing.assert_allclose(split.objects(0).keypoints, [[[15, 20, 2], [0, 0, 0]]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0 0.5 0.5 0.2", "4 columns"),
        ("0 0.5 0.5 0.2 0.4 0.9", "6 columns"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "8 columns"),
        ("2 0.5 0.5 0.2 0.4", "class 2 is not one of 0 .. 1"),
        ("-1 0.5 0.5 0.2 0.4", "class -1"),
        ("0.5 0.5 0.5 0.2 0.4", r"class 0\.5"),
        ("nan 0.5 0.5 0.2 0.4", "class nan"),
        ("a 0.5 0.5 0.2 0.4", "not a number"),
        ("0 0.5 nan 0.2 0.4", "nan is outside"),
        ("0 320 240 20 40", "320 is outside 0..1"),
        ("0 .1 .1 .2 .2 .3 1e300", "outside 0..1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    write(tmp_path, f"1 0.5 0.5 0.2 0.4\n{row}\n")
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert "train/labels/p.txt:2: " in str(error.value)


def test_all_bad_rows_are_reported_at_once(tmp_path):
    with pytest.raises(ValueError, match="3 problems"):
        read(write(tmp_path, "9 .5 .5 .1 .1\n0\n0 2 2 2 2\n"))


def test_a_row_without_area_is_dropped_with_file_and_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        split = read(write(tmp_path, "1 0.5 0.5 0.2 0.4\n0 0.5 0.5 0 0\n"))
    assert len(split.objects(0)) == 1
    assert "p.txt:2" in caplog.text


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("names: [a]\n", None),  # without a key, train/images
        ("names: [a]\ntrain: elsewhere\n", "'elsewhere', but there is no"),
        ("names: [a]\ntrain: [train/images, extra/images]\n", "'extra/images', but there is no"),
        ("names: [a]\ntrain: [train/images, train/images/]\n", "named twice"),
        ("names: [a]\ntrain: train/images\ntest: test/images\n", "'test/images', but there is no"),
        ("names: [a]\ntrain: train/images\ntrain: train\n", "'train' stands twice"),
        ("names: {0: a, 0: b}\ntrain: train/images\n", "'0' stands twice"),
        ("names: [a]\ntrain: /content/set/train/images\n", None),  # as on another machine
        ("names: [a]\ntrain: ../train/images\n", None),  # as Roboflow writes it
        ("names: [a]\npath: /content/data\ntrain: train/images\n", None),
        ("names: [a]\ntrain: [train/images]\n", None),
        ("names: [a]\nnc: 1\ntrain: train\n", None),
        ("train: train/images\n", "names is None"),
        ("names: []\ntrain: train/images\n", "names"),
        ("names: {0: a, 2: b}\ntrain: train/images\n", "0 .. 1"),
        ("names: [a]\nnc: 3\ntrain: train/images\n", "nc is 3"),
        ("names: [a]\nkpt_shape: 17\ntrain: train/images\n", "kpt_shape"),
        ("names: [a]\nkpt_shape: [3, 2]\nflip_idx: [1, 2, 0]\ntrain: train/images\n", "flip_idx"),
        ("names: [a]\nkpt_shape: [3, 2]\nkpt_names: [x]\ntrain: train/images\n", "kpt_names"),
        ("names: [a]\ntrain: 5\n", "train is 5"),
        ("- a\n", "holds a list"),
        ("a: [", "not readable YAML"),
        ("!!python/object/apply:os.system [ls]", "not readable YAML"),
    ],
)
def test_the_yaml_file(tmp_path, description, message):
    write(tmp_path, "0 0.5 0.5 0.2 0.4\n", description)
    if message is None:
        assert len(read(tmp_path)) == 2
    else:
        with pytest.raises(ValueError, match=message):
            yolo(str(tmp_path), {})


def test_images_listed_in_a_text_file(tmp_path):
    write(tmp_path, description="names: [a, b]\ntrain: train.txt\n")
    (tmp_path / "train.txt").write_text("./train/images/p.png\n\ntrain/images/q.png\n")
    assert len(read(tmp_path)) == 2
    (tmp_path / "train.txt").write_text("train/images/r.png\n")
    with pytest.raises(ValueError, match=r"r\.png.* does not exist"):
        read(tmp_path)


def test_splits_outside_the_folder_are_refused(tmp_path):
    write_image(tmp_path / "other" / "images" / "x.png")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", description="names: [a, b]\ntrain: ../other/images\n")
    with pytest.raises(ValueError, match="extra_roots"):
        yolo(str(tmp_path / "set"), {})
    assert len(yolo(str(tmp_path / "set"), {}, extra_roots=[str(tmp_path / "other")]).read["train"]()) == 1


def test_a_split_that_is_named_and_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="val is 'valid/images', but there is no"):
        yolo(str(write(tmp_path, description="names: [a, b]\ntrain: train/images\nval: valid/images\n")), {})


def test_a_missing_yaml_file_lists_what_exists(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"photos/.*data\.source\.file"):
        yolo(str(tmp_path), {})


def test_an_unreadable_image_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train/images/q.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"q\.png is not a readable image"):
        read(tmp_path)


def test_a_bad_image_does_not_shift_the_others(tmp_path):
    """Rows stay with their image whatever the order of the files."""
    write(tmp_path)
    Image.new("RGB", (10, 10)).save(tmp_path / "train/images/a.png")
    split = read(tmp_path)
    assert [len(split.objects(i)) for i in range(3)] == [0, 1, 0]
    assert split.size(0) == (10, 10)


def poses(count: int, points: int, channels: int, seed: int = 0) -> str:
    """Rows of boxes and points in them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        w, h = rng.uniform(0.05, 0.3, 2)
        x, y = rng.uniform(0.2, 0.8, 2)
        row = [0, x, y, w, h]
        for _ in range(points):
            seen = [int(rng.integers(1, 3))] if channels == 3 else []
            row += [x + w * rng.uniform(-0.4, 0.4), y + h * rng.uniform(-0.4, 0.4), *seen]
        rows.append(" ".join(f"{value:.6g}" for value in row))
    return "\n".join(rows)


@pytest.mark.parametrize(("points", "channels"), [(1, 3), (2, 3), (17, 3), (4, 2), (17, 2)])
def test_rows_of_keypoints_without_kpt_shape_are_refused(tmp_path, points, channels):
    rows = poses(12, points, channels)
    with pytest.raises(ValueError, match=rf"kpt_shape: \[{points}, {channels}\]"):
        read(write(tmp_path, rows))
    described = f"names: [a]\ntrain: train/images\nkpt_shape: [{points}, {channels}]\n"
    assert len(read(write(tmp_path, rows, described)).objects(0)) == 12


@pytest.mark.parametrize("corners", [4, 5, 12])
@pytest.mark.parametrize("reach", [0.01, 0.05, 0.2])
def test_polygons_of_one_length_are_polygons(tmp_path, corners, reach, caplog):
    rng = np.random.default_rng(corners)
    angles = np.sort(rng.uniform(0, 2 * np.pi, (40, corners)), 1)
    centres = rng.uniform(0.25, 0.75, (40, 1, 2))
    vertices = centres + reach * np.stack([np.cos(angles), np.sin(angles)], 2)
    rows = "\n".join("0 " + " ".join(f"{v:.6g}" for v in polygon.reshape(-1)) for polygon in vertices)
    with caplog.at_level(logging.WARNING):
        assert read(write(tmp_path, rows)).has_masks
    assert not caplog.text


def test_corners_in_place_of_centres_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (40, 2, 2)), 1).reshape(40, 4)
    rows = "\n".join("0 " + " ".join(f"{v:.6g}" for v in row) for row in corners)
    with pytest.raises(ValueError, match="look like two corners"):
        read(write(tmp_path, rows))
