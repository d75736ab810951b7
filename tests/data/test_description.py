"""A `data.yaml`: names are read as written, and duplicate keys are refused."""

from __future__ import annotations

import pytest

from detr_exp.data.description import read_description


def described(tmp_path, text: str):
    (tmp_path / "data.yaml").write_text(text)
    return read_description(tmp_path / "data.yaml")


WORDS = [
    "no",
    "yes",
    "on",
    "Off",
    "true",
    "null",
    "~",
    "12:30",
    "007",
    "1e3",
    "0x1F",
    "1_000",
    "2024-01-01",
    ".inf",
    "y",
]


@pytest.mark.parametrize(
    "form", ["[{}]", "{{{}}}", "\n  - {}", "\n  {}"], ids=["list", "map", "lines", "numbered lines"]
)
def test_names_are_text(tmp_path, form):
    numbered = [f"{i}: {word}" for i, word in enumerate(WORDS)] if form in ("{{{}}}", "\n  {}") else WORDS
    joined = {"\n  - {}": "\n  - ", "\n  {}": "\n  "}.get(form, ", ").join(numbered)
    made = described(tmp_path, f"names: {form.format(joined)}\nkpt_shape: [2, 3]\nkpt_names: [no, 1e1]\n")
    assert [category.name for category in made.categories] == WORDS
    assert made.categories[0].keypoints == ["no", "1e1"]


def test_names_that_differ_in_their_letters_are_two(tmp_path):
    assert [c.name for c in described(tmp_path, "names: [Car, car, 'car ', \"no\"]").categories] == [
        "Car",
        "car",
        "car ",
        "no",
    ]


def test_keypoint_names_belong_to_their_class(tmp_path):
    made = described(
        tmp_path, "names: [a, b, c]\nkpt_shape: [2, 3]\nkpt_names:\n  1: [left, right]\n  0: [rim, foot]\n"
    )
    assert [c.keypoints for c in made.categories] == [["rim", "foot"], ["left", "right"], ["0", "1"]]
    made.categories[0].keypoints.append("handle")
    assert len(made.categories[1].keypoints) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, ' ']", "names is"),
        ("names: [a, [b]]", "names is"),
        ("names: classes.txt", "names is 'classes.txt'"),
        ("names: {0: a, 1: {b: c}}", "names is"),
        ("names: {a: 0, b: 1}", r"they must be 0 \.\. 1"),
        ("names: [no, 'no']", "name twice: \\['no'\\]"),
        ("names: [a]\ntrain: x\nnames: [b]", "'names' stands twice"),
        ("names: {0: a, 1: b, 1: c}", "'1' stands twice"),
        ("names: [a]\nkpt_shape: [2, 3]\nkpt_names: {7: [l, r]}", "its keys are classes"),
        ("names: [a]\nkpt_shape: [2, 3]\nkpt_names: {0: [l]}", "asks for 2 names"),
        ("", "holds a NoneType"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        described(tmp_path, text)
