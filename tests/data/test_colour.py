"""Photometric distortion against torchvision's, part by part and all together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import RandomPhotometricDistort

from detr_exp.data.colour import Colour, turned


def photograph(seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, all hues in it."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth, int) + rng.integers(-8, 9, (72, 96, 3)), 0, 255).astype(np.uint8)


def oracle(colour: Colour, image: np.ndarray) -> np.ndarray:
    parameters = {
        "brightness_factor": colour.brightness,
        "contrast_factor": colour.contrast,
        "saturation_factor": colour.saturation,
        "hue_factor": colour.hue,
        "contrast_before": colour.contrast_first,
        "channel_permutation": None if colour.channels is None else torch.tensor(colour.channels),
    }
    return np.asarray(RandomPhotometricDistort().transform(Image.fromarray(image), parameters)).astype(int)


@pytest.mark.parametrize(
    ("colour", "mean", "most"),
    [
        (Colour(), 0, 0),
        (Colour(brightness=1.12), 0, 0),
        (Colour(contrast=0.5), 0.6, 1),
        (Colour(contrast=1.5, contrast_first=True), 0.6, 1),
        (Colour(saturation=0.5), 0.4, 1),
        (Colour(saturation=1.5), 0.4, 1),
        (Colour(hue=0.05), 1.0, 12),
        (Colour(hue=-0.05), 1.0, 12),
        (Colour(channels=(2, 0, 1)), 0, 0),
        (Colour(0.9, True, 1.4, 0.6, None, (1, 0, 2)), 1.3, 4),
        (Colour(0.9, False, 1.4, 1.4, 0.03, (1, 2, 0)), 1.5, 18),
    ],
)
def test_it_equals_torchvisions(colour, mean, most):
    image = photograph()
    difference = np.abs(colour.on(image, image).astype(int) - oracle(colour, image))
    assert difference.mean() <= mean
    assert difference.max() <= most


@pytest.mark.parametrize("part", [-12 / 255, -3 / 255, 1 / 255, 12 / 255])
def test_a_turned_hue_is_the_formulas(part):
    """All bytes of images that hold every kind of colour, not only the smooth ones of photographs."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels[:8] = pixels[:8] // 128 * 255
    pixels[8:16, :, 1] = pixels[8:16, :, 0]
    found = Colour(hue=part).on(pixels, pixels).astype(float)
    difference = np.abs(found - turned(pixels.astype(float), part))
    assert difference.mean() < 0.8
    assert difference.max() < 8


def test_contrast_is_measured_on_the_whole_image():
    image = photograph()
    colour = Colour(contrast=1.5)
    np.testing.assert_array_equal(colour.on(image[:20, :20], image), colour.on(image, image)[:20, :20])


def test_draws_have_torchvisions_frequencies_and_ranges():
    draws = [Colour.draw(np.random.default_rng(seed), 0.5) for seed in range(2000)]
    assert 30 < draws.count(None) < 100  # one in 32
    drawn = [Colour() if colour is None else colour for colour in draws]
    for name, low, high in (
        ("brightness", 0.875, 1.125),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -0.05, 0.05),
    ):
        values = [value for colour in drawn if (value := getattr(colour, name)) is not None]
        assert 900 < len(values) < 1100
        assert low <= min(values) < low + 0.01 * (high - low) * 5
        assert high - 0.05 * (high - low) < max(values) <= high
    assert 900 < sum(colour.channels is not None for colour in drawn) < 1100
    assert 850 < sum(colour.contrast_first for colour in drawn) < 1100
    assert len({colour.channels for colour in drawn}) == 7
