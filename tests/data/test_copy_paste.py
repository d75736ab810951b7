"""What copy-paste does to pixels, boxes, masks and keypoints."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from detr_exp.data.augment import Augment
from detr_exp.data.copy_paste import CopyPaste
from detr_exp.data.dataset import DataSet
from detr_exp.data.shapes import shapes
from detr_exp.structures import Target


def objects(boxes: list[list[float]], label: int, masks: np.ndarray | None = None) -> Target:
    """Objects with a keypoint in the middle of each."""
    boxes = torch.tensor(boxes)
    points = torch.cat([boxes[:, None, :2], torch.full((len(boxes), 1, 1), 2.0)], 2)
    return Target(
        torch.full((len(boxes),), label), boxes, None if masks is None else torch.from_numpy(masks), points, {}
    )


def pasted(target: Target, other: Target, most: int = 1, seed: int = 0) -> tuple[np.ndarray, Target]:
    black, white = np.zeros((40, 80, 3), np.uint8), np.full((40, 80, 3), 255, np.uint8)
    rng = np.random.default_rng(seed)
    return Augment(operations=[CopyPaste(chance=1.0, most=most)]).operated(rng, black, target, lambda: (white, other))


def test_boxes_bring_their_pixels_and_cover_what_is_below() -> None:
    below = objects([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.2, 0.2]], 0)
    image, found = pasted(below, objects([[0.3, 0.5, 0.4, 1.0]], 1))
    white = np.zeros((40, 80), bool)
    white[:, 8:40] = True
    np.testing.assert_array_equal(image[..., 0] == 255, white)
    assert found.labels.tolist() == [0, 1], "of the first one 20 % are seen, so it is dropped"
    assert found.boxes[1].tolist() == pytest.approx([0.3, 0.5, 0.4, 1.0])
    assert found.keypoints[:, 0, 2].tolist() == [2, 2]


def test_outlines_bring_only_their_own_pixels_and_hide_keypoints() -> None:
    round_one = np.zeros((1, 40, 80), bool)
    round_one[0, 18:22, 38:42] = True
    own = np.zeros((1, 40, 80), bool)
    own[0, 10:30, 20:60] = True
    image, found = pasted(objects([[0.5, 0.5, 0.5, 0.5]], 0, own), objects([[0.5, 0.5, 0.05, 0.1]], 1, round_one))
    np.testing.assert_array_equal(image[..., 0] == 255, round_one[0])
    np.testing.assert_array_equal(found.masks.numpy(), np.concatenate([own & ~round_one, round_one]))
    assert found.keypoints[:, 0, 2].tolist() == [1, 2], "the middle of the one below is labelled, and not visible"


def test_a_network_of_boxes_gets_no_masks_and_outlines_are_used_all_the_same() -> None:
    outline = np.zeros((1, 40, 80), bool)
    outline[0, 5:9, 5:9] = True
    image, found = pasted(objects([[0.7, 0.5, 0.1, 0.1]], 0), objects([[0.0875, 0.175, 0.05, 0.1]], 1, outline))
    assert found.masks is None
    assert (image[..., 0] == 255).sum() == 16


def test_the_number_is_sampled_and_nothing_comes_from_an_empty_image() -> None:
    many = objects([[0.1 * i + 0.1, 0.5, 0.05, 0.1] for i in range(8)], 1)
    none = objects([[0.5, 0.1, 0.1, 0.1]], 0).kept(torch.zeros(1, dtype=torch.bool))
    counts = {len(pasted(none, many, most=3, seed=seed)[1].labels) for seed in range(30)}
    assert counts == {1, 2, 3}
    image, found = pasted(objects([[0.5, 0.5, 0.1, 0.1]], 0), many.kept(torch.zeros(8, dtype=torch.bool)))
    assert not image.any()
    assert found.labels.tolist() == [0]


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_in_a_loader_it_adds_objects_at_its_chance_and_changes_nothing_else(fit: str) -> None:
    class Canvas:
        image_size, stride, tasks, pixel_mean = (48, 64), 1, ("boxes", "masks", "keypoints"), torch.zeros(3, 1, 1)

    def batch(*operations: CopyPaste):
        source = functools.partial(shapes, size=64, seed=0)
        augment = Augment(flip=0.5, operations=operations)
        data = DataSet(source=source, train=8, val=2, augment=augment, num_workers=0, fit=fit)
        return next(iter(data.loader("train", network=Canvas, batch_size=8, seed=0, training=True)))

    plain, never, always = batch(), batch(CopyPaste(chance=0.0)), batch(CopyPaste(chance=1.0))
    assert torch.equal(plain.images, never.images)
    assert torch.equal(plain.targets.boxes, never.targets.boxes)
    again = batch(CopyPaste(chance=1.0))
    assert torch.equal(always.images, again.images), "it depends on the seed alone"
    assert always.targets.counts != plain.targets.counts
    # every object is where its mask is, and the padding stays
    boxes, masks = always.targets.boxes, always.targets.masks
    owners = np.repeat(range(8), always.targets.counts)
    assert all(mask.any() for mask in masks)
    if fit == "letterbox":
        assert not always.images[always.padding_mask].any()
        assert not any(masks[i][always.padding_mask[owner]].any() for i, owner in enumerate(owners))
    centre_x = torch.stack([mask.any(0).nonzero().float().mean() for mask in masks]) / 64
    assert (centre_x - boxes[:, 0]).abs().median() < 0.03


@pytest.mark.parametrize(("words", "said"), [({"chance": 1.5}, "chance 1.5"), ({"most": 0}, "most 0")])
def test_settings_are_checked(words: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CopyPaste(**words)
