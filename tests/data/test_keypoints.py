"""Keypoint schemas: pairs from names, overrides, sigmas."""

from __future__ import annotations

import pytest

from detr_exp.data.content import Category
from detr_exp.data.keypoints import COCO_SIGMAS, mirror_remarks, pairs_by_name, schema, split_words


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [(1, 2)]),
        (["Right Knee", "Left Knee", "hip"], [(0, 1)]),
        (["eyeLeft", "eyeRight"], [(0, 1)]),
        (["l_ear", "r_ear", "tail"], [(0, 1)]),
        (["leftmost", "rightmost"], None),
        (["left_eye", "right_ear"], None),
        (["a", "b"], None),
        (["left_left", "right_right"], None),
    ],
)
def test_pairs_are_derived_from_left_and_right(names, pairs):
    assert pairs_by_name(names) == pairs


def test_a_data_set_without_keypoints_has_no_schema():
    assert schema([Category(1, "a"), None]) is None


def test_classes_keep_their_own_points():
    cat = Category(1, "cat", ["nose", "left_ear", "right_ear"], [(0, 1), (0, 2)])
    fish = Category(2, "fish", ["left_fin", "right_fin"])
    found = schema([cat, None, fish, Category(4, "stone")])
    assert found is not None
    assert found.counts == [3, 0, 2, 0]
    assert found.flip_pairs == [[(1, 2)], [], [(0, 1)], []]
    assert found.flip_order().tolist() == [[0, 2, 1], [0, 1, 2], [1, 0, 2], [0, 1, 2]]
    assert found.flippable
    assert found.skeleton == [(0, 1), (0, 2)]
    assert found.sigmas == [0.05] * 3


def test_unnamed_points_forbid_mirrors_unless_pairs_are_given():
    cup = Category(1, "cup", ["0", "1", "2"])
    assert not schema([cup]).flippable
    told = schema([cup], flip_pairs=[[0, 2]])
    assert told.flippable
    assert told.flip_order().tolist() == [[2, 1, 0]]
    assert schema([cup], flip_pairs=[]).flippable
    assert schema([Category(1, "cup", ["0", "1"], flip_pairs=[])]).flippable


def test_sigmas():
    person = Category(1, "person", ["nose", *map(str, range(16))])
    assert schema([person]).sigmas == COCO_SIGMAS
    assert schema([Category(1, "hand", ["wrist", *map(str, range(16))])]).sigmas == [0.05] * 17
    assert schema([Category(1, "cup", ["0", "1"])], sigmas=[0.1, 0.2]).sigmas == [0.1, 0.2]


@pytest.mark.parametrize(
    "settings",
    [
        {"sigmas": [0.1]},
        {"sigmas": [0.1, 0.0]},
        {"flip_pairs": [[0, 2]]},
        {"flip_pairs": [[1, 1]]},
        {"flip_pairs": [[0]]},
        {"flip_pairs": [0, 1]},
        {"flip_pairs": 3},
        {"flip_pairs": {"cup": [[0, 2]]}},
        {"flip_pairs": {"cup": 0}},
        {"flip_pairs": {"ball": [[0, 1]]}},
    ],
)
def test_overrides_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match=r"data\.keypoint_"):
        schema([Category(1, "cup", ["0", "1"])], **settings)


def test_pairs_of_one_class_leave_those_of_others():
    hand, car = Category(1, "hand", ["left", "right"]), Category(2, "car", ["front", "rear", "port", "starboard"])
    told = schema([hand, car], flip_pairs={"car": [[2, 3]]})
    assert told.flip_pairs == [[(0, 1)], [(2, 3)]]
    assert told.flippable


def test_words_of_a_name():
    assert split_words("turnLeft_2") == ["turn", "left", "2"]
    assert split_words("日本 straße") == ["日本", "straße"]


@pytest.mark.parametrize(
    ("names", "sided"),
    [
        (["left_eye", "right_eye", "lear", "rear"], ["lear", "rear"]),
        (["left_eye", "right_eye", "footL", "footR"], []),
        (["left_eye", "right_eye", "footl", "footr", "nose"], ["footl", "footr"]),
        (["left_eye", "right_eye", "left_ear"], ["left_ear"]),
        (["left_eye", "right_eye", "nose", "rim"], []),
    ],
)
def test_sides_of_only_some_points_are_reported(names, sided):
    made = schema([Category(1, "cup", keypoints=names), Category(2, "ball")])
    remarks = mirror_remarks(made, ["cup", "ball"], sideways=True)
    assert [case for cases in remarks.values() for case in cases] == [f"'cup': {name!r}" for name in sided]
    assert not mirror_remarks(made, ["cup", "ball"], sideways=False)


def test_points_with_the_same_name_are_reported():
    made = schema([Category(1, "cup", keypoints=["left", "right", "right"])])
    assert any("same name" in kind for kind in mirror_remarks(made, ["cup"], sideways=True))
