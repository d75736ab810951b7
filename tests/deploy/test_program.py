"""A graph on images: batches, and differences of outputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from detr_exp.data.fit import Fit
from detr_exp.deploy.program import Program, differences


def test_queries_are_matched_by_what_they_say() -> None:
    draw = np.random.default_rng(0)
    outputs = {"logits": draw.normal(size=(2, 5, 3)), "boxes": draw.random((2, 5, 4))}
    order = np.array([3, 1, 0, 4, 2])
    swapped = {name: value[:, order].copy() for name, value in outputs.items()}
    sizes = np.array([[10, 20], [30, 40]])
    assert all(gaps.max() == 0 for gaps in differences(outputs, swapped, sizes).values())
    swapped["boxes"][1, 2, 0] += 0.25
    apart = differences(outputs, swapped, sizes)["boxes"]
    assert sorted(apart) == pytest.approx([0] * 9 + [0.25])


@pytest.mark.parametrize("bad", ["logits", "boxes"])
def test_what_is_not_finite_is_not_compared(bad: str) -> None:
    right = {"logits": np.zeros((1, 2, 3)), "boxes": np.ones((1, 2, 4))}
    wrong = right | {bad: right[bad] * np.nan}
    for pair in [(right, wrong), (wrong, right)]:
        with pytest.raises(ValueError, match="not finite"):
            differences(*pair, np.array([[10, 10]]))


def test_pixels_are_compared_in_units_of_the_image() -> None:
    one = {"scores": np.ones((1, 1)), "labels": np.zeros((1, 1), int), "boxes": np.array([[[0.0, 0, 10, 10]]])}
    other = one | {"boxes": np.array([[[0.0, 0, 20, 10]]])}
    assert differences(one, other, np.array([[50, 100]]))["boxes"] == pytest.approx([0.1])


@pytest.mark.parametrize(("fixed", "calls"), [(None, [5]), (2, [2, 2, 2]), (8, [8])])
def test_batches_of_a_fixed_size_are_filled(fixed: int | None, calls: list[int]) -> None:
    network = SimpleNamespace(image_size=(8, 8))
    graph = SimpleNamespace(
        network=network, preprocess=False, postprocess=False, fit=Fit(), inputs=["images"], outputs=["means"]
    )
    seen = []

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        seen.append(len(inputs[0]))
        return [inputs[0].mean(axis=(1, 2, 3))]

    images = [np.full((4, 16, 3), level, np.uint8) for level in (0, 51, 102, 153, 204)]
    means = Program(graph, run, fixed).outputs(images)["means"]  # type: ignore[arg-type]
    assert means == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert seen == calls


def test_images_that_are_resized_inside_are_run_one_by_one() -> None:
    graph = SimpleNamespace(preprocess=True, outputs=["sizes"])
    images = [np.zeros((4, 16, 3), np.uint8), np.zeros((7, 5, 3), np.uint8)]
    program = Program(graph, lambda inputs: [np.array([inputs[0].shape[1:3]])])  # type: ignore[arg-type]
    assert program.outputs(images)["sizes"].tolist() == [[4, 16], [7, 5]]
