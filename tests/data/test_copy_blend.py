"""What CopyBlend does to pixels, boxes, masks and keypoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from detr_exp.data.augment import Augment
from detr_exp.data.copy_blend import MARGIN, SHARE, CopyBlend
from detr_exp.structures import Target

SIZE = np.array([80, 40, 80, 40])


def objects(boxes: list[list[float]], label: int, masks: np.ndarray | None = None) -> Target:
    """Objects with a keypoint in the middle of each."""
    made = torch.tensor(boxes).reshape(-1, 4)
    points = torch.cat([made[:, None, :2], torch.full((len(made), 1, 1), 2.0)], 2)
    return Target(torch.full((len(made),), label), made, None if masks is None else torch.from_numpy(masks), points, {})


def blended(target: Target, other: Target, seed: int = 0, **settings: Any) -> tuple[np.ndarray, Target]:
    """A white image with objects on a black one."""
    black, white = np.zeros((40, 80, 3), np.uint8), np.full((40, 80, 3), 255, np.uint8)
    operation = CopyBlend(chance=1.0, **settings)
    return Augment(operations=[operation]).operated(np.random.default_rng(seed), black, target, lambda: (white, other))


@pytest.mark.parametrize("seed", range(5))
def test_an_object_moves_with_a_margin_and_hides_nothing(seed: int) -> None:
    below = objects([[0.5, 0.5, 1.0, 1.0]], 0)
    image, found = blended(below, objects([[0.2, 0.5, 0.2, 0.5]], 1), seed)
    assert found.labels.tolist() == [0, 1]
    assert found.boxes[0].tolist() == below.boxes[0].tolist()
    assert found.boxes[1, 2:].numpy() == pytest.approx([0.2, 0.5], abs=0.02), "half a pixel may leave the image"
    rows, columns = np.nonzero(image[..., 0])
    assert {1 - SHARE[1] <= value / 255 + 0.01 <= 1 - SHARE[0] + 0.02 for value in image[rows, columns, 0]} == {True}
    left, top, right, bottom = (found.boxes[1, [0, 1, 0, 1]].numpy() + np.array([-0.1, -0.25, 0.1, 0.25])) * SIZE
    reach = np.array([16, 20]) * MARGIN[1] + 1.5
    assert left - reach[0] <= columns.min() <= left + 0.5
    assert right - 1.5 <= columns.max() <= right + reach[0]
    assert top - reach[1] <= rows.min() <= top + 0.5
    assert bottom - 1.5 <= rows.max() <= bottom + reach[1]
    assert found.keypoints[1, 0].tolist() == pytest.approx([*found.boxes[1, :2].tolist(), 2], abs=0.02)


def test_masks_move_with_their_objects() -> None:
    outline, own = np.zeros((1, 40, 80), bool), np.ones((1, 40, 80), bool)
    outline[0, 10:30, 10:22] = True
    _, found = blended(objects([[0.5, 0.5, 1.0, 1.0]], 0, own), objects([[0.2, 0.5, 0.15, 0.5]], 1, outline), 3)
    assert found.masks is not None
    assert found.masks[0].all()
    assert int(found.masks[1].sum()) == 20 * 12
    rows, columns = found.masks[1].nonzero(as_tuple=True)
    centre = [(columns.min() + columns.max() + 1) / 160, (rows.min() + rows.max() + 1) / 80]
    assert found.boxes[1, :2].tolist() == pytest.approx([float(one) for one in centre], abs=1e-5)


def test_a_few_large_objects_are_taken() -> None:
    many = objects([[0.1 * index + 0.1, 0.5, 0.16, 0.4] for index in range(8)], 1)
    tiny = objects([[0.5, 0.5, 0.1, 0.2]], 1)  # 64 square pixels
    none = objects([], 0)
    assert {len(blended(none, many, seed)[1].labels) for seed in range(5)} == {3}
    image, found = blended(none, tiny)
    assert not image.any()
    assert len(found.labels) == 0
    assert all(torch.equal(*(blended(none, many, 1)[1].boxes for _ in range(2))) for _ in range(2))


@pytest.mark.parametrize(("words", "said"), [({"chance": 1.5}, "chance 1.5"), ({"most": 0}, "most 0")])
def test_settings_are_checked(words: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CopyBlend(**words)
