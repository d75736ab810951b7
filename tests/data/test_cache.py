"""Cached images equal decoded ones, stay within the size limit, and are never those of a changed file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp.data import cache as module
from detr_exp.data.augment import Augment
from detr_exp.data.cache import ImageCache, Room, image_cache
from detr_exp.data.coco import coco
from detr_exp.data.dataset import DataSet
from detr_exp.data.sampler import Key

SIZES = [(300, 400), (256, 256), (100, 140)]
NETWORK = SimpleNamespace(image_size=(64, 64), stride=32, tasks=("boxes",))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Two photographs of several times the network's size and one lossless image; caches lie in the same folder."""
    monkeypatch.setattr(module, "MEMORY", tmp_path / "memory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "memory").mkdir()
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    names = ["0.jpg", "1.jpg", "2.png"]
    for name, size in zip(names, SIZES):
        write(folder / name, size, seed=0)
    images = [{"id": i, "file_name": n, "height": h, "width": w} for i, (n, (h, w)) in enumerate(zip(names, SIZES))]
    boxes = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [10, 10, 50, 60], "area": 3000, "iscrowd": 0}
        for i in range(3)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return tmp_path / "data"


def write(path: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def data_set(root: Path, **settings) -> DataSet:
    augment = Augment(photometric=0.5, zoom_out=0.5, iou_crop=0.5, flip=0.5)
    return DataSet(source=coco, root=str(root), augment=augment, **settings)


def samples(data: DataSet, training: bool = True):
    return data.loader("train", network=NETWORK, batch_size=1, seed=0, training=training).dataset


KEYS = [Key(epoch, image, 64, 64) for epoch in range(8) for image in range(3)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("training", [True, False])
def test_samples_are_the_same(root, where, training):
    plain, cached = samples(data_set(root), training), samples(data_set(root, cache=where), training)
    for _ in range(2):
        for key in KEYS:
            assert torch.equal(plain[key].image, cached[key].image)
    folder = cached.image.func.__self__.room.folder
    scales = {path.name.rpartition("-")[2] for path in files(folder)}
    assert (len(scales) > 2 and "1" in scales) if training else scales == {"1"}

    def never(*_):
        raise AssertionError("decoded again")

    cached.split.image = never
    assert torch.equal(plain[KEYS[0]].image, cached[KEYS[0]].image)


def test_it_stays_below_its_limit(root):
    plain, limited = samples(data_set(root)), samples(data_set(root, cache="ram", cache_gb=200e-6))
    for key in KEYS:
        assert torch.equal(plain[key].image, limited[key].image)
    kept = sum(path.stat().st_size for path in files(root.parent / "memory"))
    assert 50_000 < kept <= 200_000


def test_a_changed_file_is_read_again(root):
    cached = samples(data_set(root, cache="disk"), training=False)
    before = cached[KEYS[0]].image
    path = root / "train" / "0.jpg"
    write(path, SIZES[0], seed=1)
    os.utime(path, ns=(0, 1))
    after = samples(data_set(root), training=False)[KEYS[0]].image
    assert not torch.equal(before, after)
    for _ in range(2):
        assert torch.equal(cached[KEYS[0]].image, after)


def test_workers_share_it(root):
    data = data_set(root, cache="ram", num_workers=2)
    loader = data.loader("train", network=NETWORK, batch_size=1, seed=0)
    assert len(list(loader)) == 3
    assert len(files(root.parent / "memory")) == 3
    assert data.cache.used.value == sum(path.stat().st_size for path in files(root.parent / "memory"))


def test_memory_is_given_back_and_the_disk_keeps(root):
    memory = root.parent / "memory"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = memory / f"detr_exp-{int(ended.stdout)}-x"
    left.mkdir()
    for where in ("ram", "disk"):
        data = data_set(root, cache=where)
        samples(data, training=False)[KEYS[0]]
        assert not left.exists()
        del data
    assert files(memory) == []
    assert len(files(root.parent / "home")) == 1
    kept = image_cache("disk", 1.0, str(root))
    assert kept.used.value > 100_000


def test_a_full_disk_is_no_error(tmp_path, root, monkeypatch):
    split = data_set(root).train
    cache = ImageCache(Room(tmp_path / "memory", 1e9))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for _ in range(2):
        assert np.array_equal(cache.image(split, 0), split.image(0))
    assert files(tmp_path / "memory") == []


@pytest.mark.parametrize(("settings", "word"), [({"cache": "gpu"}, "data.cache"), ({"cache_gb": 0}, "data.cache_gb")])
def test_wrong_settings_are_refused(root, settings, word):
    with pytest.raises(ValueError, match=word):
        data_set(root, **settings)


def test_a_place_that_cannot_be_written_to_is_refused(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = r"data\.cache is disk, but .* cannot be written to \(Not a directory\).*XDG_CACHE_HOME=FOLDER.*cache=ram"
    with pytest.raises(ValueError, match=message):
        data_set(root, cache="disk")
    assert data_set(root, cache="ram").split("train")


@pytest.mark.parametrize("cut", [0, 8, 31, 32, 5000, -1], ids=str)
def test_a_damaged_file_is_decoded_again(root, cut):
    split = data_set(root).split("train")
    folder = root.parent / "kept"
    folder.mkdir()
    right = ImageCache(Room(folder, 1e9)).image(split, 0)
    (kept,) = folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:cut])
    assert np.array_equal(ImageCache(Room(folder, 1e9)).image(split, 0), right)
    (kept,) = folder.iterdir()
    assert len(kept.read_bytes()) == 32 + right.nbytes
