"""Polygons describe a mask: filling them restores it."""

import numpy as np
import pytest
from pycocotools import mask as codec
from scipy.ndimage import binary_fill_holes, gaussian_filter, label

from detr_exp.ops.polygons import polygons_of_mask


def filled(polygons: list[list[float]], mask: np.ndarray) -> np.ndarray:
    return codec.decode(codec.merge(codec.frPyObjects(polygons, *mask.shape))).astype(bool)


@pytest.mark.parametrize("seed", range(20))
def test_filling_the_outlines_gives_the_mask(seed):
    rng = np.random.default_rng(seed)
    mask = binary_fill_holes(gaussian_filter(rng.normal(size=rng.integers(20, 120, 2)), rng.uniform(1, 6)) > 0.01)
    polygons = polygons_of_mask(mask)
    assert np.array_equal(filled(polygons, mask), mask)
    assert len(polygons) <= label(mask)[1]  # parts that touch at a corner may share an outline


def test_holes_are_filled():
    mask = np.zeros((20, 20), bool)
    mask[2:18, 3:17] = True
    ring = mask.copy()
    ring[5:9, 6:9] = False
    (outline,) = polygons_of_mask(ring)
    assert np.array_equal(filled([outline], mask), mask)


def test_one_pixel_and_the_whole_image():
    pixel = np.zeros((5, 7), bool)
    pixel[2, 3] = True
    ((*outline,),) = polygons_of_mask(pixel)
    assert sorted(zip(outline[::2], outline[1::2])) == [(3.0, 2.5), (3.5, 2.0), (3.5, 3.0), (4.0, 2.5)]
    everything = np.ones((5, 7), bool)
    assert np.array_equal(filled(polygons_of_mask(everything), everything), everything)


def test_parts_have_outlines_of_their_own_and_nothing_has_none():
    mask = np.zeros((40, 40), bool)
    mask[1:3, 1:3] = True
    mask[10:30, 10:30] = True
    small, large = sorted(polygons_of_mask(mask), key=len)
    assert max(small) < 4 < 9 < min(large)
    assert polygons_of_mask(np.zeros((4, 4), bool)) == []
