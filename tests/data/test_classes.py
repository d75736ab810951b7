"""Category ids to labels and back."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.data.classes import ClassMap
from detr_exp.data.content import Category

GAPS = [Category(90, "z"), Category(3, "a"), Category(0, "m")]


def test_contiguous_labels_follow_the_ids():
    classes = ClassMap(GAPS, "contiguous", None, "train.json")
    assert classes.classes == ["m", "a", "z"]
    assert classes.category_ids == [0, 3, 90]
    assert classes.num_classes == 3
    labels = classes.labels(np.array([90, 0, 3, 90]))
    assert labels.tolist() == [2, 0, 1, 2]
    assert [classes.category_ids[i] for i in labels] == [90, 0, 3, 90]


def test_raw_labels_are_the_ids():
    classes = ClassMap(GAPS, "raw", None, "train.json")
    assert classes.num_classes == len(classes.classes) == 91
    assert classes.labels(np.array([90, 0])).tolist() == [90, 0]
    assert (classes.classes[3], classes.classes[4]) == ("a", "unused_4")
    assert ClassMap(GAPS, "raw", 100, "train.json").num_classes == 100


def test_no_objects_have_no_labels():
    assert ClassMap(GAPS, "contiguous", 3, "x").labels(np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("categories", "mode", "number", "message"),
    [
        (GAPS, "contiguous", 80, r"data\.num_classes is 80 but train\.json defines 3 categories"),
        (GAPS, "raw", 90, r"data\.num_classes is 90 but train\.json has category ids up to 90"),
        (GAPS, "sorted", None, r"data\.category_ids=contiguous"),
        ([], "contiguous", None, "no categories"),
        ([Category(-1, "x")], "raw", None, "category id -1"),
    ],
)
def test_what_does_not_fit_is_refused(categories, mode, number, message):
    with pytest.raises(ValueError, match=message):
        ClassMap(categories, mode, number, "train.json")


def test_names_cannot_steer_a_terminal():
    names = ClassMap([Category(0, "\x1b[2Jcat\n"), Category(1, "größe 猫")], "contiguous", None, "train.json").classes
    assert names == ["\\x1b[2Jcat\\n", "größe 猫"]
