"""Objects are drawn at their positions."""

from itertools import pairwise

import numpy as np
from PIL import Image

from detr_exp.ops.draw import CAPTION, colour, draw_objects, sheet

GREY = np.full((100, 200, 3), 128, np.uint8)


def drawn(**changes):
    objects = {"boxes_xyxy_px": np.array([[50, 40, 90, 80]]), "labels": [1], "names": ["a", "b"]} | changes
    return np.asarray(draw_objects(GREY, **objects))


def test_box_has_the_colour_of_its_class_at_its_corners():
    image = drawn()
    assert tuple(image[80, 90]) == tuple(image[40, 70]) == colour(1)
    assert tuple(image[60, 70]) == (128, 128, 128)


def test_nothing_drawn_without_objects():
    assert (drawn(boxes_xyxy_px=np.zeros((0, 4)), labels=[]) == GREY).all()


def test_masks_tint_their_pixels_only():
    mask = np.zeros((1, 100, 200), bool)
    mask[0, 55:60, 60:65] = True
    changed = (drawn(masks=mask) != drawn()).any(-1)
    assert changed[55:60, 60:65].all()
    assert changed.sum() == 25


def test_points_that_are_not_there_are_left_out():
    points = np.array([[[60.0, 50.0, 2.0], [80.0, 70.0, 0.0]]])
    image = drawn(keypoints_px=points, skeletons=[[], [(0, 1)]])
    assert tuple(image[50, 60]) == (255, 255, 255)
    assert tuple(image[70, 80]) == tuple(image[60, 70]) == (128, 128, 128)


def test_inverted_and_outside_boxes_and_unknown_labels_do_not_fail():
    drawn(boxes_xyxy_px=np.array([[90, 80, 50, 40], [-50, -50, 500, 500]]), labels=[0, 7], scores=[0.5, 0.25])


def test_neighbouring_classes_differ():
    colours = [np.array(colour(i), float) for i in range(20)]
    assert min(np.abs(a - b).max() for a, b in pairwise(colours)) > 60


def test_sheet_holds_every_image_in_its_proportions():
    images = [Image.new("RGB", size, (255, 0, 0)) for size in ((200, 100), (100, 200), (50, 50))]
    pixels = np.asarray(sheet(images, columns=2, tile=100))
    assert (pixels[..., 0] == 255).sum() == 100 * 50 + 50 * 100 + 100 * 100


def test_captions_stand_above_their_images() -> None:
    images = [Image.new("RGB", (100, 50), (0, 0, 255))] * 3
    plain = np.asarray(sheet(images, columns=2, tile=100))
    captioned = np.asarray(sheet(images, ["a.jpg: 3 annotated", "x/" * 200 + "end.jpg", ""], columns=2, tile=100))
    assert captioned.shape[0] - plain.shape[0] == 2 * CAPTION
    assert captioned.shape[1] == plain.shape[1]
    rows = [slice(4, 4 + CAPTION), slice(4 + CAPTION, 54 + CAPTION)]
    assert captioned[rows[0], 4:104].max() > 200, "words"
    assert (captioned[rows[1], 4:104] == (0, 0, 255)).all(), "the image is not written on"
    assert (captioned[rows[0], 104:108] == 24).all(), "a long caption stays above its image"
