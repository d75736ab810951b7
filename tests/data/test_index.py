"""Data are opened again as they were read, and read again where anything has changed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as codec

from detr_exp.data import coco, index, seen, voc, yolo
from detr_exp.data.auto import auto
from detr_exp.data.content import Content, Split
from detr_exp.data.problems import DataError, collected

from .conftest import document, write_image
from .test_twins import write

ROBOFLOW = "_annotations.coco.json"


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """An index of its own for every data set, however small and new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LEAST", 0)
    monkeypatch.setattr(seen, "SETTLED", -(10**18))
    return tmp_path / "cache" / "detr_exp" / "index"


@pytest.fixture
def readings(monkeypatch):
    """The splits that were read, and not opened."""
    found = []
    for module in (coco, yolo, voc):

        def tabulated(images, *rest, really=module.tabulated):
            found.append(len(images.ids))
            return really(images, *rest)

        monkeypatch.setattr(module, "tabulated", tabulated)
    return found


def of_split(split: Split) -> list:
    """All that a split gives, as text: every bit of every number."""
    lines = [(len(split), list(split.image_ids), split.has_masks, split.has_keypoints, split.most_objects)]
    lines.append((split.fingerprint, split.account))
    for i in range(len(split)):
        found = split.objects(i)
        points = None if found.keypoints is None else (found.keypoints.dtype, found.keypoints.tolist())
        lines.append((split.name(i), split.size(i), found.boxes_xyxy.tolist(), found.segments, points))
        lines.append((found.categories.dtype, found.categories.tolist()))
    return [repr(line) for line in lines] + [json.dumps(split.truth())]


def told(root: Path, on_error: str = "error") -> list:
    """Everything of a data set: categories, splits and what was said about them."""
    with collected() as problems:
        content: Content = auto(str(root), {}, on_error=on_error)
        lines = [repr(content.categories)]
        for read in content.read.values():
            lines += of_split(read())
    return lines + [repr((one.source, one.warnings, one.notes)) for one in problems]


def rich(root: Path) -> Path:
    """A COCO set with all that annotations may have, and some that is remarked on."""
    mask = np.zeros((40, 60), np.uint8, "F")
    mask[3:9, 4:20] = 1
    code = codec.encode(mask)
    runs = {"size": [40, 60], "counts": [4 * 40 + 3, 6, 2400 - 4 * 40 - 9]}
    box, ids = {"category_id": 7, "bbox": [4, 3, 16.25, 6]}, iter(range(1, 99))
    points = [5, 5, 2, 8.5, 6, 1, 0, 0, 0]
    shapes = [
        {"segmentation": [[4, 3, 20, 3, 20, 9.125], [5, 5, 9, 5, 9, 8]], "keypoints": points, "area": 31.5},
        {"segmentation": {"size": [40, 60], "counts": code["counts"].decode()}, "iscrowd": 1},
        {"segmentation": runs, "keypoints": [99, 1, 2, 0, 0, 0, 0, 0, 0]},
        {"segmentation": [[1, 2, 3]]},
        {"segmentation": [[4, 3, 1e6, 3, 20, 9]], "id": 1},
        {"bbox": [70, 3, 5, 5]},
        {"category_id": 3},
    ]
    entries = [{"id": next(ids), "image_id": 2**52, **box, **shape} for shape in shapes]
    content = document(
        images=[
            {"id": -3, "file_name": "b.png"},
            {"id": 2**52, "file_name": "größe 猫.png", "width": 60, "height": 40},
            {"id": 0, "file_name": "b.png", "width": 60, "height": 40},
        ],
        annotations=entries,
        categories=[
            {"id": 7, "name": "猫", "keypoints": ["left", "right", "tip"], "skeleton": [[1, 2]]},
            {"id": 3, "name": "ball"},
        ],
    )
    for split in ("train", "valid"):
        write_image(root / split / "größe 猫.png")
        write_image(root / split / "b.png", seed=1)
        (root / split / ROBOFLOW).write_text(json.dumps(content, ensure_ascii=split == "train"), encoding="utf-8")
    return root


def yolo_set(root: Path) -> Path:
    return write(root, poses=False)[1]


def voc_set(root: Path) -> Path:
    for i in range(3):
        write_image(root / "train" / f"{i}.png", seed=i)
        things = "".join(
            f"<object><name>cup</name><difficult>{k}</difficult><bndbox><xmin>{k}</xmin><ymin>2</ymin><xmax>30</xmax>"
            "<ymax>20</ymax></bndbox></object>"
            for k in range(i)
        )
        (root / "train" / f"{i}.xml").write_text(f"<annotation>{things}</annotation>")
    return root


SETS = {"coco": rich, "yolo": yolo_set, "poses": lambda root: write(root, poses=True)[1], "voc": voc_set}


@pytest.mark.parametrize("name", SETS)
def test_it_is_as_if_it_were_read(tmp_path, name, readings, monkeypatch, memory):
    root = SETS[name](tmp_path / "set")
    monkeypatch.setattr(index, "LEAST", 10**9)
    plain = told(root)
    assert not memory.exists()
    monkeypatch.setattr(index, "LEAST", 0)
    assert told(root) == plain  # and writes it
    count = len(readings)
    assert told(root) == plain
    assert len(readings) == count
    assert not [path for path in tmp_path.rglob("*index*") if memory not in (path, *path.parents)]


@pytest.mark.parametrize("name", ["bccd_coco", "bccd_yolo", "cats_coco"])
def test_real_data_are_as_if_they_were_read(real_data, name, readings, monkeypatch):
    first = told(real_data / name)
    count = len(readings)
    assert told(real_data / name) == first
    assert len(readings) == count


def other_content(path: Path) -> None:
    """Other content of the same size, with the old time."""
    before, data = path.stat(), path.read_bytes()
    time.sleep(0.02)  # longer than the clock of the file system ticks
    path.write_bytes(data.replace(b"cup", b"pot").replace(b"16.25", b"17.25").replace(b"\n0 ", b"\n1 "))
    assert path.read_bytes() != data
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("name", SETS)
def test_other_content_of_the_same_size_and_time_is_read(tmp_path, name, readings, monkeypatch):
    root = SETS[name](tmp_path / "set")
    if name == "coco":
        path = root / "train" / ROBOFLOW
    else:
        path = max(root.rglob("*.xml" if name == "voc" else "*.txt"), key=lambda path: path.stat().st_size)
        path.write_text(path.read_text() + "\n0 0.5 0.5 0.25 0.25" * (name == "yolo"))
        if name == "poses":
            path.write_text("\n" + path.read_text().replace("1 ", "0 ", 1))
    before = told(root)
    other_content(path)
    count = len(readings)
    after = told(root)
    assert len(readings) > count
    monkeypatch.setattr(index, "LEAST", 10**9)
    assert after == told(root) != before


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("deed", ["remove", "link", "add", "replace"])
def test_what_happens_to_images_is_noticed(tmp_path, name, deed, monkeypatch):
    root = SETS[name](tmp_path / "set")
    told(root, "skip")
    path = sorted(root.rglob("*.png"))[-1]
    if deed == "add":
        shutil.copy(path, path.with_name("new.png"))
    elif deed == "replace":
        path.write_bytes(write_image(tmp_path / "other.png", (33, 44)).read_bytes())
    else:
        path.unlink()
        if deed == "link":
            path.symlink_to(write_image(tmp_path / "outside" / "other.png"))
    now = told(root, "skip")
    monkeypatch.setattr(index, "LEAST", 10**9)
    assert now == told(root, "skip")


def test_a_link_to_another_annotation_file_is_noticed_whatever_its_times(tmp_path, monkeypatch):
    root = rich(tmp_path / "set")
    path = root / "train" / ROBOFLOW
    other = tmp_path / "other.json"
    other.write_bytes(path.read_bytes().replace(b"16.25", b"17.25"))
    path.rename(tmp_path / "first.json")
    path.symlink_to(tmp_path / "first.json")
    for module in (coco, seen):  # as of two files that were unpacked in one moment
        monkeypatch.setattr(module, "stamp_of", lambda path, really=seen.stamp_of: (really(path)[0], 1, 1))
    before = told(root)
    path.unlink()
    path.symlink_to(other)
    assert told(root) != before


def test_a_name_that_no_file_can_have_does_no_harm(tmp_path):
    root = rich(tmp_path / "set")
    path = root / "train" / ROBOFLOW
    content = json.loads(path.read_text())
    content["images"].append({"id": 99, "file_name": "a\0b.png", "height": 4, "width": 4})
    path.write_text(json.dumps(content))
    assert told(root, "skip") == told(root, "skip")


def test_a_file_with_another_time_and_the_same_content_is_not_parsed(tmp_path, readings):
    root = rich(tmp_path / "set")
    told(root)
    count = len(readings)
    os.utime(root / "train" / ROBOFLOW, ns=(1, 1))
    (root / "train" / "notes.txt").write_text("something else")
    told(root)
    assert len(readings) == count


def test_what_changed_just_now_is_not_trusted(tmp_path, readings, monkeypatch):
    monkeypatch.setattr(seen, "SETTLED", 10**18)
    folders = write(tmp_path, poses=False)
    told(folders[0])
    count = len(readings)
    told(folders[0])
    assert len(readings) == count  # the same by its hash
    told(folders[1])
    told(folders[1])
    assert len(readings) == count + 2


def test_a_damaged_index_is_not_used(tmp_path, readings, memory):
    root = rich(tmp_path / "set")
    plain = told(root)
    whole = {path: path.read_bytes() for path in memory.iterdir()}
    assert len(whole) == 3  # of the categories and two splits
    for path, data in whole.items():
        damaged = [b"", b"foreign", data[:-1], data + b"\0", data[:100], b"x" + data[1:]]
        for at in range(0, len(data), max(1, len(data) // 6)):
            damaged.append(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for content in damaged:
            path.write_bytes(content)
            assert told(root) == plain
    assert len(readings) > 20


def test_an_index_of_other_code_or_of_another_set_is_not_used(tmp_path, readings, monkeypatch, memory):
    root = rich(tmp_path / "set")
    told(root)
    count = len(readings)
    monkeypatch.setattr(index, "_code", lambda: "of yesterday")
    told(root)
    assert len(readings) == count + 2
    first, *_, last = sorted(memory.iterdir(), key=lambda path: path.stat().st_size)
    shutil.copy(last, first)
    told(root)
    assert len(readings) >= count + 2


@pytest.mark.parametrize("fault", ["no folder", "full disk"])
def test_where_none_can_be_written_the_data_are_read(tmp_path, fault, readings, monkeypatch):
    root = rich(tmp_path / "set")
    if fault == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:

        def refuse(*_: object) -> None:
            raise ValueError("No space left on device")

        monkeypatch.setattr(index, "write", refuse)
    assert told(root) == told(root)
    assert len(readings) == 4


def test_errors_are_not_kept(tmp_path, memory):
    root = rich(tmp_path / "set")
    (root / "train" / "b.png").unlink()
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.png' does not exist"):
            told(root)
    write_image(root / "train" / "b.png", seed=1)
    assert told(root)


def test_an_opened_split_can_be_sent_to_another_process(tmp_path):
    root = rich(tmp_path / "set")
    told(root)
    split = auto(str(root), {}).read["train"]()
    assert not split.boxes_xywh.flags.writeable  # it is that of the file
    assert of_split(pickle.loads(pickle.dumps(split))) == of_split(split)


def test_an_index_that_was_not_used_for_long_is_deleted(tmp_path, memory):
    old = memory / "old"
    memory.mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    told(rich(tmp_path / "set"))
    assert not old.exists()
