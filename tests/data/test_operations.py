"""Operations: each acts, keeps what it must, and its objects are where its pixels are."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.stored import stored
from detr_exp.data.augment import Augment
from detr_exp.data.copy_paste import CopyPaste
from detr_exp.data.operations import Affine, Blur, Cutout, Grey, Jpeg
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.structures import Target

SIZE = (90, 120)


def photo():
    return cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8), (0, 0), 1.5)


def disc(with_masks=False):
    """A bright disc on black, its box, mask and keypoint, its middle."""
    image = np.zeros((*SIZE, 3), np.uint8)
    cv2.ellipse(image, (70, 40), (30, 12), 0, 0, 360, (255, 255, 255), -1)
    box = torch.tensor([[70.5 / 120, 40.5 / 90, 61 / 120, 25 / 90]])
    masks = torch.from_numpy(image[..., 0] > 0)[None] if with_masks else None
    return image, Target(torch.tensor([1]), box, masks, torch.tensor([[[70.5 / 120, 40.5 / 90, 2.0]]]))


def nothing():
    return Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, *SIZE, dtype=torch.bool))


@pytest.mark.parametrize("operation", [Grey, Jpeg, Blur, Cutout, Affine])
def test_each_acts_with_its_chance_and_not_without(operation):
    image, rng = photo(), np.random.default_rng(0)
    assert operation(chance=0.0)(rng, image, nothing())[0] is image
    augment = Augment(operations=[operation(chance=1.0)])  # which refuses what cannot be batched
    changed, target = augment.operated(rng, image, nothing())
    assert changed.shape == image.shape
    assert not np.array_equal(changed, image)
    assert len(target.labels) == 0
    again = operation(chance=1.0)(np.random.default_rng(3), image, nothing())[0]
    assert np.array_equal(again, operation(chance=1.0)(np.random.default_rng(3), image, nothing())[0])


def test_grey_blur_and_jpeg_are_what_they_say():
    image, rng = photo(), np.random.default_rng(0)
    grey = Grey(1.0)(rng, image, nothing())[0].astype(int)
    assert (grey.max(-1) == grey.min(-1)).all()
    assert Blur(1.0, (3.0, 3.0))(rng, image, nothing())[0].std() < 0.7 * image.std()
    apart = [np.abs(Jpeg(1.0, (q, q))(rng, image, nothing())[0].astype(int) - image).mean() for q in (10, 95)]
    assert 0 < apart[1] < apart[0] < 40


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_objects_turn_with_their_pixels(seed, with_masks):
    image, target = disc(with_masks)
    shown, found = Affine(1.0, degrees=30.0, shear=10.0)(np.random.default_rng(seed), image, target)
    rows, columns = np.nonzero(shown[..., 0] > 127)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    box = cxcywh_to_xyxy(found.boxes)[0].numpy() * [120, 90, 120, 90]
    assert np.abs(box - seen).max() <= 2
    middle = found.keypoints[0, 0, :2].numpy() * [120, 90]
    if columns.max() < 119 and rows.min() > 0:
        assert np.abs(middle - [columns.mean() + 0.5, rows.mean() + 0.5]).max() <= 1
    if with_masks:
        assert (found.masks[0].numpy() == (shown[..., 0] > 127)).mean() > 0.99


def test_no_turn_changes_nothing():
    image, target = disc(with_masks=True)
    shown, found = Affine(1.0, degrees=0.0)(np.random.default_rng(0), image, target)
    assert np.array_equal(shown, image)
    torch.testing.assert_close(found.boxes, target.boxes, atol=1e-5, rtol=0)
    assert torch.equal(found.masks, target.masks)


def test_what_turns_out_of_the_image_is_dropped():
    image = np.zeros((40, 400, 3), np.uint8)
    target = Target(torch.tensor([0, 1]), torch.tensor([[0.02, 0.5, 0.03, 0.5], [0.5, 0.5, 0.02, 0.3]]))
    for seed in range(20):
        _, found = Affine(1.0, degrees=90.0)(np.random.default_rng(seed), image, target)
        assert 1 in found.labels.tolist()
    assert len(found.labels) == 1


@pytest.mark.parametrize("seed", range(6))
def test_cutouts_hide_masks_and_keypoints_and_drop_what_is_hardly_seen(seed):
    image, target = disc(with_masks=True)
    image = np.maximum(image, 1)
    shown, found = Cutout(1.0, count=3, side=(0.3, 0.6))(np.random.default_rng(seed), image, target)
    hidden = (shown == 0).all(-1)
    assert np.array_equal(shown[~hidden], image[~hidden])
    left = 1 - hidden[28:53, 40:101].mean()
    assert len(found.labels) == (left >= 0.3) or abs(left - 0.3) < 0.05
    if len(found.labels):
        assert np.array_equal(found.masks[0].numpy(), target.masks[0].numpy() & ~hidden)
        assert float(found.keypoints[0, 0, 2]) == (1 if hidden[40, 70] else 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grey(chance=2), "Grey has chance 2; .* chance: 0.5"),
        (lambda: Jpeg(quality=[90, 30]), "Jpeg has quality"),
        (lambda: Blur(sigma=[0.5]), "Blur has sigma"),
        (lambda: Cutout(count=0), "Cutout has count 0"),
        (lambda: Affine(degrees=-5), "Affine has degrees -5"),
    ],
)
def test_settings_that_cannot_be_used(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_configs_list_them_in_any_order_and_number():
    """On the command line, and from the config in a checkpoint."""
    one_of_each = build.plain(compose(["data/augment=varied"]))["data"]["augment"]["operations"]
    assert {type(each) for each in build.data(compose(["data=shapes", "data/augment=varied"])).augment.operations} == {
        *(Affine, Blur, Cutout, Grey, Jpeg, CopyPaste)
    }
    listed = ",".join(f"{{_target_: {each['_target_']}, chance: 0.1}}" for each in one_of_each[::-1] * 2)
    cfg = compose(["data=shapes", "data/augment=flip", f"data.augment.operations=[{listed}]"])
    for config in (cfg, stored(build.plain(cfg), Path("a.pth"))):
        made = [type(each).__name__ for each in build.data(config).augment.operations]
        assert made == [each["_target_"].rpartition(".")[2] for each in one_of_each[::-1] * 2]
    with pytest.raises(
        ConfigError, match=r"operations\[12\]\._target_ is os\.remove; configs may name .*Affine.*Jpeg there"
    ):
        build.data(compose(["data=shapes", f"data.augment.operations=[{listed},{{_target_: os.remove}}]"]))
