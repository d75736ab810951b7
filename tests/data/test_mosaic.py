"""Mosaics and mixes: every object keeps its pixels, its mask and its keypoints, wherever its image goes."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detr_exp.data.augment import MIX_SHARE, MOSAIC_CENTRE, Augment
from detr_exp.data.content import Category, Content, Objects
from detr_exp.data.dataset import DataSet
from detr_exp.data.phases import Phases
from detr_exp.data.render import resized_plainly
from detr_exp.data.sampler import Key
from detr_exp.data.shapes import shapes
from detr_exp.protocols import TASKS

OUT = (96, 128)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])


class Flags:
    """Five images, each grey with one rectangle of its own colour and class; its corners are keypoints."""

    has_masks = has_keypoints = True
    fingerprint = "flags"
    most_objects = 1
    image_ids = range(1, 6)

    def __len__(self) -> int:
        return 5

    def name(self, index: int) -> str:
        return f"flag {index}"

    def size(self, index: int) -> tuple[int, int]:
        return 80 + 10 * index, 120

    def box(self, index: int) -> tuple[int, int, int, int]:
        return 20 + 5 * index, 15, 70 + 5 * index, 60

    def objects(self, index: int) -> Objects:
        x0, y0, x1, y1 = self.box(index)
        return Objects(
            np.array([index]),
            np.array([[x0, y0, x1, y1]], float),
            [[[x0, y0, x1, y0, x1, y1, x0, y1]]],
            np.array([[(x0, y0, 2), (x1, y0, 2), (x0, y1, 2), (x1, y1, 2)]], np.float32),
            extra={"flag": np.array([index])},
        )

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        pixels = np.full((*self.size(index), 3), 90, np.uint8)
        x0, y0, x1, y1 = self.box(index)
        pixels[y0:y1, x0:x1] = COLOURS[index]
        return pixels

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def truth(self) -> dict:
        raise NotImplementedError  # nothing is evaluated


NAMES = ["upper left", "upper right", "lower left", "lower right"]


def flags(**augment: float) -> DataSet:
    categories = [Category(i, f"flag {i}", keypoints=NAMES) for i in range(5)]
    content = Content("flags", "flags", categories, {"train": Flags})
    return DataSet(source=lambda root, places: content, augment=Augment(**augment), num_workers=0)


def samples(data: DataSet, seed: int = 0):
    network = SimpleNamespace(image_size=OUT, stride=32, tasks=TASKS)
    return data.loader("train", network=network, batch_size=1, seed=seed, training=True).dataset


def extent(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("image", range(5))
@pytest.mark.parametrize(
    "settings", [{"mosaic": 1.0}, {"mosaic": 1.0, "flip": 0.5, "vertical_flip": 0.5, "iou_crop": 0.5}]
)
def test_every_object_of_a_mosaic_keeps_what_is_its_own(image, settings):
    seen = 0
    for epoch in range(4):
        sample = samples(flags(**settings))[Key(epoch, image, *OUT)]
        pixels, target = sample.image.numpy().astype(int), sample.target
        assert len(target.labels) <= 4
        assert len(target.labels) == len(target.boxes) == len(target.masks) == len(target.keypoints)
        assert torch.equal(target.extra["flag"], target.labels)
        for label, box, mask, points in zip(target.labels, target.boxes, target.masks.numpy(), target.keypoints):
            x, y, w, h = (box * torch.tensor([OUT[1], OUT[0]] * 2)).tolist()
            corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            np.testing.assert_allclose(extent(mask), corners, atol=1.01)
            own = np.abs(pixels - COLOURS[label]).max(-1) < 100
            assert (mask & own).sum() > 0.75 * mask.sum(), "the mask lies on the colour of its class"
            there = points[points[:, 2] > 0, :2].numpy() * OUT[::-1]
            assert (there >= np.array(corners[:2]) - 0.5).all()
            assert (there <= np.array(corners[2:]) + 0.5).all()
            seen += 1
    assert seen >= 8


def test_the_requested_image_is_included_and_the_centre_moves():
    augment, centres = Augment(mosaic=1.0), []
    for seed in range(200):
        ((*tiles,),) = augment.layers(np.random.default_rng(seed), 3, 5, OUT)
        assert [image for image, _ in tiles].count(3) >= 1
        covered = np.zeros(OUT, int)
        for _, (x0, y0, x1, y1) in tiles:
            covered[y0:y1, x0:x1] += 1
        assert (covered == 1).all()
        centres.append(min((x1, y1) for _, (x0, y0, x1, y1) in tiles if (x0, y0) == (0, 0)))
    shares = np.array(centres) / OUT[::-1]
    assert shares.min() >= MOSAIC_CENTRE[0] - 0.02
    assert shares.max() <= MOSAIC_CENTRE[1]
    assert shares.std() > 0.08


def test_a_mix_blends_two_images_and_joins_their_objects():
    data = flags(mixup=1.0)
    for image in range(5):
        sample = samples(data)[Key(0, image, *OUT)]
        plain = [resized_plainly(Flags().image(i), OUT).astype(float) for i in range(5)]
        first, second = sample.target.labels.tolist()
        assert first == image
        errors = [
            np.abs(sample.image.numpy() - (share * plain[first] + (1 - share) * plain[second])).mean()
            for share in np.linspace(*MIX_SHARE, 21)
        ]
        assert min(errors) < 1.5
        assert sample.image_id == image + 1


def test_what_is_known_of_a_whole_image_cannot_be_that_of_four(monkeypatch):
    plain = Flags.objects
    monkeypatch.setattr(Flags, "objects", lambda self, i: replace(plain(self, i), image_extra={"hour": np.array(i)}))
    assert samples(flags(flip=1.0))[Key(0, 3, *OUT)].target.image_extra["hour"] == 3
    with pytest.raises(ValueError, match=r"hour of a whole image .*data\.augment\.mosaic=0"):
        samples(flags(mosaic=1.0))[Key(0, 3, *OUT)]


def test_mosaics_and_mixes_end_with_the_strong_augmentation():
    data = flags(mosaic=1.0, mixup=1.0)
    data.phases = Phases(2)
    assert [len(samples(data)[Key(epoch, 0, *OUT)].target.labels) for epoch in (2, 3)] == [1, 1]
    assert len(samples(data)[Key(1, 0, *OUT)].target.labels) == 8


def test_each_part_has_its_epochs():
    """DEIM's: nothing, then everything, then no mosaics and mixes, then nothing again."""
    data = flags(mosaic=1.0, mixup=1.0, photometric=1.0)
    data.phases = Phases(given={"strong": [1, 4], "mosaic": [1, 3], "mixup": [2, 3]})
    made, plain = samples(data), samples(flags())
    numbers = [len(made[Key(epoch, 0, *OUT)].target.labels) for epoch in range(5)]
    assert numbers == [1, 4, 8, 1, 1]
    as_it_is = [bool((made[Key(e, 0, *OUT)].image == plain[Key(e, 0, *OUT)].image).all()) for e in range(5)]
    assert as_it_is == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cutout": [0, 3]}, "may have strong, mosaic"),
        ({"strong": [3, 3]}, r"strong is \[3, 3\].*data\.phases\.strong=\[4,64\]"),
        ({"strong": [None, 3]}, "the first epoch with it"),
        ({"strong": [3]}, "the first epoch with it"),
        ({"mosaic": [0, 3]}, r"no mosaic; use it, data\.augment\.mosaic=0\.5"),
        ({"multi_scale": [0, None]}, r"data\.multi_scale=rtdetr"),
    ],
)
def test_phases_that_cannot_be_are_refused(given, words):
    source = functools.partial(shapes, size=64, seed=0)
    with pytest.raises(ValueError, match=words):
        DataSet(source=source, train=12, val=0, test=0, augment=Augment(), phases=given)
    assert DataSet(source=source, train=12, val=0, test=0, augment=Augment(), phases={"mosaic": None}).phases


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    source = functools.partial(shapes, size=64, seed=0)
    settings = {"mosaic": 0.5, "mixup": 0.5, "photometric": 0.5, "iou_crop": 0.5, "zoom_out": 0.5}

    def drawn(seed: int = 0) -> list:
        data = DataSet(source=source, train=12, val=0, test=0, augment=Augment(**settings), num_workers=0)
        made = samples(data, seed)
        return [made[Key(epoch, image, *OUT)] for epoch in (0, 1) for image in (11, 3, 25)]

    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert all(
        torch.equal(a.image, b.image) and torch.equal(a.target.boxes, b.target.boxes) for a, b in zip(first, again)
    )
    assert not any(torch.equal(a.image, b.image) for a, b in zip(first, other))
    assert not torch.equal(first[0].image, first[3].image)


def test_without_them_no_random_number_is_used():
    """Published recipes use the same random numbers as before there were mosaics."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert Augment().layers(rng, 2, 5, OUT) == [[(2, (0, 0, OUT[1], OUT[0]))]]
    assert rng.bit_generator.state == before
