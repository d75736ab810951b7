"""Two halves of a split: equal for every run, and with the same classes."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from detr_exp.data.augment import Augment
from detr_exp.data.dataset import DataSet
from detr_exp.data.halves import halves
from detr_exp.data.problems import DataError
from detr_exp.data.shapes import shapes


def drawn(val: int) -> DataSet:
    source = functools.partial(shapes, size=64, seed=0)
    return DataSet(source=source, train=3, val=val, test=0, augment=Augment(), num_workers=0)


def many(seed: int, count: int) -> tuple[list[int], list[set[int]]]:
    """Ids of images, and some of eight classes in each, the last ones rare."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * count)[:count].tolist()
    return ids, [{k for k in range(8) if rng.random() < 0.5 ** (k + 0.5)} for _ in ids]


@pytest.mark.parametrize("seed", range(3))
def test_every_image_is_in_one_half_and_both_show_each_class_as_often(seed: int) -> None:
    ids, shown = many(seed, 203)
    parts = halves(ids, shown)
    assert sorted([*parts[0], *parts[1]]) == list(range(203))
    assert abs(len(parts[0]) - len(parts[1])) <= 8
    for number in range(8):
        counts = [sum(number in shown[i] for i in part) for part in parts]
        assert abs(counts[0] - counts[1]) <= max(1, 0.1 * sum(counts)), (number, counts)


def test_they_depend_on_ids_alone_and_not_on_the_order_of_the_images() -> None:
    ids, shown = many(0, 50)
    chosen = {ids[i] for i in halves(ids, shown)[0]}
    turned = halves(ids[::-1], shown[::-1])[0]
    assert {ids[::-1][i] for i in turned} == chosen
    assert turned == sorted(turned)


def test_one_image_cannot_be_halved_and_two_can() -> None:
    assert [len(part) for part in halves([7, 3], [{1}, {1}])] == [1, 1]
    assert [len(part) for part in halves([7, 3], [set(), set()])] == [1, 1]
    with pytest.raises(DataError, match=r"1 validation image with objects .* metric.honest_selection=false"):
        drawn(val=1).halved()


def test_a_halved_data_set_has_the_same_fingerprint_and_trains_on_the_same_images() -> None:
    whole = drawn(val=5)
    made = whole.halved()
    ids = [list(made.split(name).image_ids) for name in ("val", "held_out")]
    assert sorted([*ids[0], *ids[1]]) == sorted(whole.val.image_ids)
    assert made.fingerprint == whole.fingerprint
    assert list(made.train.image_ids) == list(whole.train.image_ids)
    assert whole.held_out is None
    with pytest.raises(ValueError, match="no half of the validation images is held out"):
        whole.split("held_out")
