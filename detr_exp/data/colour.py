"""Photometric distortion as one table, one matrix and, where hue was drawn, one turn of the hue circle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)
_LUMA = np.array([0.299, 0.587, 0.114])
_THUMBNAIL = 64


@dataclass
class Colour:
    """A drawn distortion; None: that part was not drawn. Applied from top to bottom.

    Attributes:
        brightness: factor of every value.
        contrast: factor of the distance to the picture's mean grey; before the hue or after it.
        contrast_first: which.
        saturation: factor of the distance to the pixel's own grey.
        hue: part of the hue circle to turn by.
        channels: order of the channels at the end.
    """

    brightness: float | None
    contrast: float | None
    contrast_first: bool
    saturation: float | None
    hue: float | None
    channels: tuple[int, int, int] | None

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Colour:
        """Each part with probability 1/2 (Liu et al. 2016, SSD; ranges of `RandomPhotometricDistort`)."""
        drawn, first, values, order = rng.random(5) < 0.5, rng.random() < 0.5, rng.random(4), rng.permutation(3)
        brightness, contrast, saturation, hue = (
            low + (high - low) * value if on else None
            for (low, high), value, on in zip((BRIGHTNESS, CONTRAST, SATURATION, HUE), values.tolist(), drawn)
        )
        a, b, c = order.tolist()
        return cls(brightness, contrast, first, saturation, hue, (a, b, c) if drawn[4] else None)

    def on(self, image: Image.Image, whole: Image.Image) -> Image.Image:
        """Distort `image`, a part of the picture `whole`, whose mean grey decides the contrast."""
        table = np.arange(256, dtype=np.float64)
        if self.brightness is not None:
            table = np.clip(table * self.brightness, 0, 255)
        if self.contrast is not None and self.contrast_first:
            grey = _mean_grey(_small(whole), table)
            table = np.clip(grey + self.contrast * (table - grey), 0, 255)
        steps = Colour(None, None, False, self.saturation, self.hue, None)
        thumbnail = _small(whole) if self.contrast is not None and not self.contrast_first else None
        if self.brightness is not None or (self.contrast is not None and self.contrast_first):
            image = _looked_up(image, table)
            thumbnail = thumbnail and _looked_up(thumbnail, table)
        image = steps._saturated_and_turned(image)
        if thumbnail is not None and self.contrast is not None:
            table = np.arange(256, dtype=np.float64)
            grey = _mean_grey(steps._saturated_and_turned(thumbnail), table)
            image = _looked_up(image, np.clip(grey + self.contrast * (table - grey), 0, 255))
        if self.channels is not None:
            bands = image.split()
            image = Image.merge("RGB", [bands[i] for i in self.channels])
        return image

    def _saturated_and_turned(self, image: Image.Image) -> Image.Image:
        if self.saturation is not None:
            grey = (1 - self.saturation) * _LUMA
            matrix = np.zeros((3, 4))
            matrix[:, :3] = grey + self.saturation * np.eye(3)
            image = image.convert("RGB", tuple(matrix.reshape(-1).tolist()))
        if self.hue is not None:
            hue, saturation, value = image.convert("HSV").split()
            turned = hue.point([(i + int(self.hue * 255)) % 256 for i in range(256)])
            image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
        return image


def _small(image: Image.Image) -> Image.Image:
    """A sample of the pixels, enough for a mean."""
    if max(image.size) <= _THUMBNAIL:
        return image
    return image.resize((min(image.width, _THUMBNAIL), min(image.height, _THUMBNAIL)), Image.Resampling.NEAREST)


def _mean_grey(image: Image.Image, table: np.ndarray) -> float:
    """Mean grey after every value went through `table`."""
    return round(float(table[np.asarray(image)].mean((0, 1)) @ _LUMA))


def _looked_up(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(table.astype(np.uint8).tolist() * 3)
