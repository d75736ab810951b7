"""Photometric distortion in few passes: one table, one matrix, or, where hue is turned, one lookup for everything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)
_LUMA = np.array([0.299, 0.587, 0.114])
_THUMBNAIL = 64
_CELLS = 17  # of the lookup cube a side; between them colours are interpolated


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
    def draw(cls, rng: np.random.Generator) -> Colour:
        """Each part with probability 1/2 (Liu et al. 2016, SSD; ranges of `RandomPhotometricDistort`)."""
        drawn, first, values, order = rng.random(5) < 0.5, rng.random() < 0.5, rng.random(4), rng.permutation(3)
        brightness, contrast, saturation, hue = (
            low + (high - low) * value if on else None
            for (low, high), value, on in zip((BRIGHTNESS, CONTRAST, SATURATION, HUE), values.tolist(), drawn)
        )
        a, b, c = order.tolist()
        return cls(brightness, first, contrast, saturation, hue, (a, b, c) if drawn[4] else None)

    def on(self, image: Image.Image, whole: Image.Image) -> Image.Image:
        """Distort `image`, a part of the picture `whole`, whose mean grey decides the contrast."""
        grey = 0.0 if self.contrast is None else self._mean_grey(whole)
        if self.hue is not None:
            cube = self.changed(_cube(), grey).astype(np.float32) / 255
            return image.filter(ImageFilter.Color3DLUT(_CELLS, cube.reshape(-1), _copy_table=False))
        ramp = np.arange(256, dtype=np.float64)
        if self.brightness is not None or (self.contrast is not None and self.contrast_first):
            image = _looked_up(image, self._before(ramp, grey))
        if self.saturation is not None:
            matrix = np.zeros((3, 4))
            matrix[:, :3] = (1 - self.saturation) * _LUMA + self.saturation * np.eye(3)
            image = image.convert("RGB", tuple(matrix.reshape(-1).tolist()))
        if self.contrast is not None and not self.contrast_first:
            image = _looked_up(image, _contrasted(ramp, self.contrast, grey))
        if self.channels is not None:
            bands = image.split()
            image = Image.merge("RGB", [bands[i] for i in self.channels])
        return image

    def changed(self, rgb: np.ndarray, grey: float) -> np.ndarray:
        """The distortion of `[..., 3]` colours in 0..255, given the grey that contrast is measured from."""
        rgb = self._coloured(self._before(rgb, grey))
        if self.contrast is not None and not self.contrast_first:
            rgb = _contrasted(rgb, self.contrast, grey)
        return rgb if self.channels is None else rgb[..., self.channels]

    def _before(self, values: np.ndarray, grey: float) -> np.ndarray:
        if self.brightness is not None:
            values = np.clip(values * self.brightness, 0, 255)
        if self.contrast is not None and self.contrast_first:
            values = _contrasted(values, self.contrast, grey)
        return values

    def _coloured(self, rgb: np.ndarray) -> np.ndarray:
        if self.saturation is not None:
            own = (rgb @ _LUMA)[..., None]
            rgb = np.clip(own + self.saturation * (rgb - own), 0, 255)
        return rgb if self.hue is None else _turned(rgb, self.hue)

    def _mean_grey(self, whole: Image.Image) -> float:
        """Mean grey where the contrast is changed; a sample of the pixels is enough for it."""
        size = (min(whole.width, _THUMBNAIL), min(whole.height, _THUMBNAIL))
        rgb = np.asarray(whole.resize(size, Image.Resampling.NEAREST), np.float64)
        if self.brightness is not None:
            rgb = np.clip(rgb * self.brightness, 0, 255)
        if not self.contrast_first:
            rgb = self._coloured(rgb)
        return round(float(rgb.mean((0, 1)) @ _LUMA))


def _contrasted(values: np.ndarray, factor: float, grey: float) -> np.ndarray:
    return np.clip(grey + factor * (values - grey), 0, 255)


def _turned(rgb: np.ndarray, part: float) -> np.ndarray:
    """Colours with their hue turned by a part of the circle (hexcone model: value and chroma stay)."""
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


@cache
def _cube() -> np.ndarray:
    """`[cells, cells, cells, 3]` colours on a regular grid, red fastest, as Pillow's lookup wants them."""
    axis = np.linspace(0, 255, _CELLS)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    return np.stack([red, green, blue], -1)


def _looked_up(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(table.astype(np.uint8).tolist() * 3)
