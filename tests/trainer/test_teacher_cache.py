"""What a teacher makes of images is kept: the same numbers, each image once, and never another image's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.data.augment import Augment
from detr_exp.data.cache import Room
from detr_exp.structures import Batch, Prediction, Targets
from detr_exp.trainer.teacher_cache import Caching, TeacherCache
from detr_exp.trainer.teaching import Seen


def batch_of(*values: int, masked: bool = False) -> Batch:
    """Images of one grey each."""
    images = torch.stack([torch.full((4, 6, 3), value, dtype=torch.uint8) for value in values])
    targets = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,) * len(values))
    mask = torch.zeros(len(values), 4, 6, dtype=torch.bool)
    mask[:, -1] = masked
    return Batch(images, targets, torch.tensor([[4, 6]] * len(values)), padding_mask=mask)


class Counter:
    """A teacher that says the mean of an image and of its mask, and counts the images it has seen."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images: Tensor, padding_mask: Tensor | None) -> Seen:
        assert padding_mask is not None
        self.sizes.append(len(images))
        mean = images.mean((1, 2, 3)) + padding_mask.float().mean((1, 2))
        return Seen(Prediction(mean[:, None, None], mean[:, None, None].expand(-1, 1, 4)), [mean[:, None]])


@pytest.fixture
def see() -> Counter:
    return Counter()


def said(cache: TeacherCache, see: Counter, batch: Batch, size: int = 4) -> list[float]:
    images = batch.pixels(torch.contiguous_format)[:, :, :size]
    found = cache.joined(see, batch, images, batch.padding_mask)
    assert found.prediction is not None
    assert found.maps is not None
    assert torch.equal(found.prediction.boxes[:, 0, 0], found.maps[0][:, 0])
    return found.prediction.logits.flatten().tolist()


def test_each_image_is_computed_once_and_alone(tmp_path: Path, see: Counter) -> None:
    cache = TeacherCache(Room(tmp_path, 1e9))
    assert said(cache, see, batch_of(10, 20)) == said(cache, see, batch_of(20, 10))[::-1]
    assert see.sizes == [1, 1]
    mixed = said(cache, see, batch_of(30, 10, 10))
    assert mixed[1] == mixed[2] < mixed[0]
    assert see.sizes == [1, 1, 1]
    later = TeacherCache(Room(tmp_path, 1e9))
    assert said(later, see, batch_of(30, 10, 20))[:2] == mixed[:2]
    assert len(see.sizes) == 4, "the first tells how tensors belong together"
    assert later.used == cache.used == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_other_padding_and_other_sizes_are_other_images(tmp_path: Path, see: Counter) -> None:
    cache = TeacherCache(Room(tmp_path, 1e9))
    for batch, size in ((batch_of(10), 4), (batch_of(10, masked=True), 4), (batch_of(10), 2)):
        said(cache, see, batch, size)
    assert len(see.sizes) == 3
    assert said(cache, see, batch_of(10, masked=True)) != said(cache, see, batch_of(10))
    assert len(see.sizes) == 3


def test_damaged_files_and_full_rooms_cost_time_only(
    tmp_path: Path, see: Counter, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TeacherCache(Room(tmp_path, 1e9))
    right = said(cache, see, batch_of(10, 20))
    (first, *_) = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:99])
    assert said(cache, see, batch_of(10, 20)) == right
    assert len(see.sizes) == 3
    full = TeacherCache(Room(tmp_path, 10.0))
    for _ in range(2):
        assert said(full, see, batch_of(40, 50)) == said(full, see, batch_of(40, 50))
    assert len(see.sizes) == 11
    assert caplog.text.count("teacher.cache_gb=") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_place_is_named_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["trainer/hardware=cpu", "trainer.hardware.products=torch"]
    plain, half = (build.hardware(compose([*words, f"trainer.hardware.amp={amp}"])) for amp in ("null", "bf16"))
    caching, record = Caching.of({"cache": "disk", "checkpoint": "a", "weights": None}, Augment()), {"sha256": "1"}
    made = [
        caching.opened(record | {"teacher": "a"}, plain),
        caching.opened(record | {"teacher": "b"}, plain),
        Caching.of({"cache": "disk", "checkpoint": "b", "weights": None}, Augment()).opened(record, plain),
        Caching.of({"cache": "disk", "weights": "raw"}, Augment()).opened(record, plain),
        caching.opened({"sha256": "2"}, plain),
        caching.opened(record, half),
    ]
    folders = [one.room.folder for one in made if one is not None]
    assert folders[0] == folders[1] == folders[2]
    assert len(set(folders)) == 4
    with pytest.raises(ValueError, match=r"no sha256.*teacher.cache=ram"):
        caching.opened({"teacher": "mine"}, plain)
    with pytest.raises(ValueError, match=r"teacher.cache is 'tape'; use none, ram or disk"):
        Caching("tape").opened(record, plain)


def test_changing_images_are_refused() -> None:
    assert Caching.of({"cache": "none"}, Augment(flip=0.5)).where == "none"
    with pytest.raises(ValueError, match=r"\(data.augment.flip, data.augment.operations\): teacher.cache=none"):
        Caching.of({"cache": "ram"}, Augment(flip=0.5, operations=[os.path.join]))  # type: ignore[list-item]
