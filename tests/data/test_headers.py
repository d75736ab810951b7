"""Headers are read before the first step, once."""

from __future__ import annotations

import logging
import os

import pytest

from detr_exp.data import headers
from detr_exp.data.problems import Problems

from .conftest import data_set, document, read, write_image


@pytest.fixture(autouse=True)
def memory(tmp_path_factory, monkeypatch):
    """A cache folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_all_splits_are_complained_about_at_once(roboflow):
    root = roboflow(train=document(), valid=document(), test=document(images=[]))
    (root / "train" / "a.png").write_bytes(b"broken")
    write_image(root / "valid" / "b.png", (30, 30))
    with pytest.raises(ValueError, match=r"a\.png is not a readable image") as error:
        data_set(root).check(["train"])
    assert "30x30 pixels but annotated as 60x40" in str(error.value)
    assert "no image" in str(error.value)


def test_sound_headers_are_read_once(roboflow, monkeypatch):
    root = roboflow(train=document())
    calls = []
    monkeypatch.setattr(headers, "refuse_size", lambda path, size, channels: calls.append(path.name))
    data_set(root).check(["train"])
    data_set(root).check(["train"])
    assert sorted(calls) == ["a.png", "b.png"]
    os.utime(root / "train" / "a.png", ns=(1, 1))
    data_set(root).check(["train"])
    assert len(calls) == 4


def test_a_stamp_changes_with_annotations_paths_sizes_and_times(roboflow):
    root = roboflow(train=document())
    stamps = {headers.stamp(read(root))}
    (root / "train" / "a.png").write_bytes(b"xx")
    stamps.add(headers.stamp(read(root)))
    os.utime(root / "train" / "a.png", ns=(1, 1))
    stamps.add(headers.stamp(read(root)))
    (root / "train" / "a.png").rename(root / "train" / "c.png")
    images = [{**document()["images"][0], "file_name": "c.png"}, document()["images"][1]]
    stamps.add(headers.stamp(read(roboflow(train=document(images=images)))))
    assert len(stamps) == 4


def test_what_was_wrong_is_not_remembered(roboflow):
    root = roboflow(train=document())
    (root / "train" / "a.png").write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(ValueError, match="readable"):
            data_set(root).check(["train"])


def test_a_folder_that_cannot_be_written_does_not_matter(roboflow, memory, monkeypatch):
    (memory / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(memory / "file"))
    data_set(roboflow(train=document())).check(["train"])


def test_bad_images_are_left_out_on_request_and_named(roboflow, network, caplog):
    root = roboflow(train=document(), valid=document())
    data = data_set(root, on_error="skip")
    (root / "train" / "a.png").write_bytes((root / "train" / "a.png").read_bytes()[:600])
    (root / "valid" / "a.png").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        data.check(["train"])
    assert "left out" in caplog.text
    assert "valid/a.png" in caplog.text
    (batch,) = data.loader("train", network=network, batch_size=2, seed=0, training=True)
    assert batch.image_ids == [12, 12]
    assert len(batch.skipped) == 1
    assert "train/a.png cannot be decoded" in batch.skipped[0]
    (batch,) = data.loader("val", network=network, batch_size=2, seed=0)
    assert batch.image_ids == [11, 12]
    assert not batch.images[0].any(), "black, so that its objects count as missed"
    assert batch.targets.counts == (2, 0)
    assert len(batch.skipped) == 1


def test_nothing_left_is_an_error_still(roboflow, network):
    root = roboflow(train=document())
    data = data_set(root, on_error="skip")
    for name in ("a.png", "b.png"):
        (root / "train" / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable image"):
        list(data.loader("train", network=network, batch_size=2, seed=0, training=True))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"data\.on_error=error"):
        Problems("x", "ignore")
