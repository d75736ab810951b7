"""Photometric distortion in few passes: one table, one matrix, and for the hue one lookup of small corrections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)
_LUMA = np.array([0.299, 0.587, 0.114])
_THUMBNAIL = 64
_RAMP = np.arange(256, dtype=np.float64)
_BITS = 5  # of a channel that decide about the correction of a hue
_HUE_DIGITS = 3  # hues are turned by whole thousandths of the circle, so that tables are met again


@dataclass
class Colour:
    """A drawn distortion, applied from top to bottom; None: that part was not drawn.

    Attributes:
        brightness: factor of every value.
        contrast_first: whether the contrast is changed here or after the hue.
        contrast: factor of the distance to the picture's mean grey.
        saturation: factor of the distance to the pixel's own grey.
        hue: part of the hue circle to turn by.
        channels: order of the channels at the end.
    """

    brightness: float | None = None
    contrast_first: bool = False
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    channels: tuple[int, int, int] | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator, chance: float) -> Colour | None:
        """Each part with probability `chance` (Liu et al. 2016, SSD; ranges of `RandomPhotometricDistort`); None where
        none was drawn."""
        drawn, first, values, order = rng.random(5) < chance, rng.random() < 0.5, rng.random(4), rng.permutation(3)
        if not drawn.any():
            return None
        brightness, contrast, saturation, hue = (
            low + (high - low) * value if on else None
            for (low, high), value, on in zip((BRIGHTNESS, CONTRAST, SATURATION, HUE), values.tolist(), drawn)
        )
        a, b, c = order.tolist()
        return cls(brightness, first, contrast, saturation, hue, (a, b, c) if drawn[4] else None)

    def on(self, image: Image.Image, whole: Image.Image) -> Image.Image:
        """Distort `image`, a part of the picture `whole`, whose mean grey decides the contrast."""
        grey = 0.0 if self.contrast is None else self._mean_grey(whole)
        image = self._coloured(self._before(image, grey))
        if self.contrast is not None and not self.contrast_first:
            image = _looked_up(image, _contrasted(_RAMP, self.contrast, grey))
        if self.channels is not None:
            bands = image.split()
            image = Image.merge("RGB", [bands[i] for i in self.channels])
        return image

    def _before(self, image: Image.Image, grey: float) -> Image.Image:
        """Brightness, and the contrast where it comes first."""
        table = _RAMP
        if self.brightness is not None:
            table = np.clip(table * self.brightness, 0, 255)
        if self.contrast is not None and self.contrast_first:
            table = _contrasted(table, self.contrast, grey)
        return image if table is _RAMP else _looked_up(image, table)

    def _coloured(self, image: Image.Image) -> Image.Image:
        """Saturation and hue."""
        if self.saturation is not None:
            matrix = np.zeros((3, 4))
            matrix[:, :3] = (1 - self.saturation) * _LUMA + self.saturation * np.eye(3)
            image = image.convert("RGB", tuple(matrix.reshape(-1).tolist()))
        return image if self.hue is None else _turned(image, round(self.hue, _HUE_DIGITS))

    def _mean_grey(self, whole: Image.Image) -> float:
        """Mean grey where the contrast is changed; a sample of the pixels is enough for it."""
        size = (min(whole.width, _THUMBNAIL), min(whole.height, _THUMBNAIL))
        sample = whole.resize(size, Image.Resampling.NEAREST)
        if self.brightness is not None:
            sample = _looked_up(sample, np.clip(_RAMP * self.brightness, 0, 255))
        if not self.contrast_first:
            sample = self._coloured(sample)
        return round(float(np.asarray(sample).mean((0, 1)) @ _LUMA))


def _contrasted(values: np.ndarray, factor: float, grey: float) -> np.ndarray:
    return np.clip(grey + factor * (values - grey), 0, 255)


def _looked_up(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(table.astype(np.uint8).tolist() * 3)


def _turned(image: Image.Image, part: float) -> Image.Image:
    """The picture with its hue turned by a part of the circle."""
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(-1, 4)
    cells = pixels >> (8 - _BITS)
    index = cells[:, 0].astype(np.uint16)
    for channel in (1, 2):
        index <<= _BITS
        index |= cells[:, channel]
    corrections = np.take(_corrections(part), index).view(np.uint8).reshape(-1, 4)
    return Image.frombytes("RGB", image.size, (pixels + corrections).tobytes(), "raw", "RGBX")


@lru_cache(maxsize=128)
def _corrections(part: float) -> np.ndarray:
    """`[cells]` what turning the hue adds to red, green and blue, a byte each (modulo 256), for cells of colours.

    What is added hardly changes within a cell: it is much smaller than the colour. It is bounded so that no colour of
    the cell leaves 0..255, where bytes would wrap around.
    """
    width = 1 << (8 - _BITS)
    low = np.arange(0, 256, width, dtype=np.float64)
    colours = np.stack(np.meshgrid(low, low, low, indexing="ij"), -1).reshape(-1, 3)
    middle = colours + (width - 1) / 2
    added = np.rint(turned(middle, part) - middle).clip(-colours, 255 - (width - 1) - colours)
    packed = np.zeros((len(added), 4), np.uint8)
    packed[:, :3] = added.astype(np.int64) % 256
    return packed.view(np.uint32)[:, 0]


def turned(rgb: np.ndarray, part: float) -> np.ndarray:
    """Colours `[..., 3]` with their hue turned by a part of the circle (hexcone model: value and chroma stay)."""
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    divisor = np.where(chroma > 0, chroma, 1)
    sextant = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    phases = (sextant + 6 * part)[..., None] + (5, 3, 1)
    phases %= 6
    return value[..., None] - chroma[..., None] * np.clip(np.minimum(phases, 4 - phases), 0, 1)
