"""A fixed sample of a split."""

from __future__ import annotations

import functools

import pytest

from detr_exp.data.augment import Augment
from detr_exp.data.dataset import DataSet
from detr_exp.data.part import Part, sample
from detr_exp.data.shapes import shapes


def drawn(sample: int | None, val: int = 30, seed: int = 0) -> DataSet:
    source = functools.partial(shapes, size=64, seed=seed)
    return DataSet(source=source, train=3, val=val, test=4, augment=Augment(), num_workers=0, val_sample=sample)


def test_the_sample_depends_on_ids_alone_and_larger_ones_contain_smaller_ones() -> None:
    split = drawn(None).val
    some, more = sample(split, 5, ""), sample(split, 12, "")
    assert (len(some), len(more)) == (5, 12)
    assert some == sorted(some)
    assert set(some) < set(more)
    turned = Part(split, range(29, -1, -1))
    assert {turned.image_ids[i] for i in sample(turned, 5, "")} == {split.image_ids[i] for i in some}


def test_a_training_evaluates_the_sample_and_nothing_else_changes() -> None:
    whole, made = drawn(10), drawn(10).sampled()
    assert len(made.val) == len(made.val.truth()["images"]) == 10
    assert len(whole.val) == 30, "other commands do not sample"
    assert (len(made.train), len(made.test)) == (3, 4)
    assert made.fingerprint == whole.fingerprint == drawn(None).fingerprint
    assert drawn(None).sampled().val.image_ids == whole.val.image_ids


def test_both_halves_are_sampled_and_stay_apart() -> None:
    whole = drawn(8).halved()
    made = whole.sampled()
    for name in ("val", "held_out"):
        assert len(made.split(name)) == 8
        assert set(made.split(name).image_ids) <= set(whole.split(name).image_ids)


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.val_sample is 31, but .*val has 30 images.*data\.val_sample=null"):
        drawn(31).sampled()
    empty = next(seed for seed in range(200) if not len(drawn(None, 1, seed).val.objects(0)))
    with pytest.raises(ValueError, match=r"none of these images .* has objects"):
        drawn(1, 1, empty).sampled()
