"""Repeats of images with rare classes, and images without objects, as they reach the batches of an epoch."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from detr_exp.data.augment import Augment
from detr_exp.data.balance import UNIT, Balance, earlier_uses, repeat_factors, sampled_uses
from detr_exp.data.content import Category, Content, Objects
from detr_exp.data.dataset import DataSet
from detr_exp.data.sampler import TrainSampler
from detr_exp.data.table import flat

NETWORK = SimpleNamespace(image_size=(64, 64), stride=32, tasks=("boxes",))
SKEWED = [[0, 0], [0, 1], [], [0], [1, 2], [0], [], [0], [0], [0]]  # classes of the objects of each image


class Listed:
    """A split of grey images with the given classes."""

    has_masks = has_keypoints = False
    fingerprint = "listed"

    def __init__(self, classes: list[list[int]]) -> None:
        self.classes, self.image_ids = classes, [100 + i for i in range(len(classes))]
        self.most_objects = max(map(len, classes))

    def __len__(self) -> int:
        return len(self.classes)

    def name(self, index: int) -> str:
        return f"image {index}"

    def size(self, index: int) -> tuple[int, int]:
        return 64, 64

    def objects(self, index: int) -> Objects:
        categories = np.array(self.classes[index], np.int64)
        return Objects(categories, np.tile([8.0, 8, 40, 40], (len(categories), 1)))

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        return np.full((64, 64, 3), index, np.uint8)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def truth(self) -> dict:
        return {}


def listed(root: str | None, places: dict, *, classes: list[list[int]]) -> Content:
    return Content("listed", "a list", [Category(i, f"c{i}") for i in range(3)], {"train": lambda: Listed(classes)})


def data(classes: list[list[int]] = SKEWED, **settings) -> DataSet:
    source = functools.partial(listed, classes=classes)
    return DataSet(source=source, augment=Augment(), num_workers=0, **settings)


def shown(made: DataSet, epoch: int = 0, **ranks: int) -> list[list[int]]:
    """The images that the network receives, batch by batch."""
    loader = made.loader("train", network=NETWORK, batch_size=2, seed=0, training=True, **ranks)
    loader.batch_sampler.set_epoch(epoch)
    return [[number - 100 for number in batch.image_ids] for batch in loader]


def test_repeat_factors_are_those_of_the_paper() -> None:
    found = repeat_factors(flat(Listed(SKEWED)), 0.5)
    share = {0: 0.7, 1: 0.2, 2: 0.1}
    for factor, classes in zip(found, SKEWED):
        expected = max([1.0, *(np.sqrt(0.5 / share[c]) for c in classes)])
        assert factor == pytest.approx(expected)


def test_every_epoch_has_the_same_number_of_images_and_averages_are_the_factors() -> None:
    rng = np.random.default_rng(0)
    uses = np.round(rng.uniform(0, 3, 50) * UNIT).astype(np.int64)
    rounds = np.array([sampled_uses(uses, rng) for _ in range(4000)])
    assert set(rounds.sum(1)) <= {uses.sum() // UNIT, uses.sum() // UNIT + 1}
    assert ((rounds == uses // UNIT) | (rounds == -(-uses // UNIT))).all()
    np.testing.assert_allclose(rounds.mean(0), uses / UNIT, atol=0.03)  # four standard deviations: 4 * 0.5 / sqrt(4000)


def test_whole_factors_are_exact() -> None:
    uses = np.array([1, 3, 2, 1] * 1000) * UNIT
    assert (sampled_uses(uses, np.random.default_rng(1)) == uses // UNIT).all()


def test_later_uses_of_an_image_are_numbered() -> None:
    assert earlier_uses(np.array([3, 1, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]


def test_rare_classes_are_seen_more_often_and_empty_images_less() -> None:
    made = data(repeat_threshold=0.9, keep_empty=0.5)
    epochs = [Counter(chain(*shown(made, epoch))) for epoch in range(60)]
    assert len({sum(epoch.values()) for epoch in epochs}) == 1
    mean = [sum(epoch[i] for epoch in epochs) / 60 for i in range(len(SKEWED))]
    assert mean[4] == pytest.approx(3, abs=0.3)  # sqrt(0.9 / 0.1)
    assert mean[1] == pytest.approx(np.sqrt(4.5), abs=0.3)
    assert mean[2] + mean[6] == pytest.approx(1, abs=0.3)
    assert {epoch[2] for epoch in epochs} == {0, 1}  # others in each epoch
    assert not any(
        epoch[i] for epoch in (Counter(chain(*shown(data(keep_empty=0), e))) for e in range(3)) for i in (2, 6)
    )


def test_without_settings_nothing_changes() -> None:
    assert Balance().uses(Listed(SKEWED)) is None
    assert shown(data()) == shown(data(repeat_threshold=1e-9))  # every class has more images than this


def test_a_resumed_epoch_and_ranks_share_the_repeated_images() -> None:
    uses = Balance(0.9, 0.5).uses(Listed(SKEWED * 4))
    sampler = TrainSampler(40, 2, 5, (64, 64), uses=uses)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert len(whole) == len(sampler) == uses.sum() // UNIT // 2
    sampler.set_start(7)
    assert list(sampler) == whole[7:]
    ranks = [TrainSampler(40, 1, 5, (64, 64), uses=uses, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.set_epoch(3)
    assert [{*first, *second} for first, second in zip(*ranks, strict=True)] == [set(batch) for batch in whole]
    assert len({key.image for batch in whole for key in batch}) == 2 * len(whole)  # each use is augmented anew


def test_fewer_images_than_a_batch_are_repeated() -> None:
    (batch,) = TrainSampler(2, 8, 0, (64, 64), uses=np.array([UNIT, UNIT // 2]))
    assert len({key.image for key in batch}) == 8
    assert Counter(key.image % 2 for key in batch)[0] >= 5


def test_overfitting_uses_each_of_its_images() -> None:
    made = data(repeat_threshold=0.9).first(4)
    assert sorted(chain(*shown(made))) == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat_threshold": 0.0}, r"data\.repeat_threshold is 0\.0; .* data\.repeat_threshold=0\.001"),
        ({"repeat_threshold": 1.5}, r"data\.repeat_threshold is 1\.5"),
        ({"keep_empty": -0.1}, r"data\.keep_empty is -0\.1; .* data\.keep_empty=0\.5"),
    ],
)
def test_other_shares_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**settings)


def test_no_image_left_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.keep_empty is 0, but only 0 of 2 .* data\.keep_empty=1"):
        shown(data([[], []], keep_empty=0))
