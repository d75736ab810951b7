"""Photometric distortion in few passes: a lookup table, a matrix, and for the hue a lookup of small corrections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)
_LUMA = np.array([0.299, 0.587, 0.114])
_THUMBNAIL = 64
_RAMP = np.arange(256, dtype=np.float64)
_HUES = 255  # steps of the hue circle: in Pillow and torchvision hue is a byte; few steps let tables be reused


@dataclass
class Colour:
    """Sampled distortion parameters, applied from top to bottom; None: that part is left out.

    Attributes:
        brightness: factor of every value.
        contrast_first: whether the contrast is changed here or after the hue.
        contrast: factor of the distance to the image's mean grey.
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
        all are left out."""
        chosen, first, values, order = rng.random(5) < chance, rng.random() < 0.5, rng.random(4), rng.permutation(3)
        if not chosen.any():
            return None
        brightness, contrast, saturation, hue = (
            low + (high - low) * value if on else None
            for (low, high), value, on in zip((BRIGHTNESS, CONTRAST, SATURATION, HUE), values.tolist(), chosen)
        )
        a, b, c = order.tolist()
        return cls(brightness, first, contrast, saturation, hue, (a, b, c) if chosen[4] else None)

    def on(self, pixels: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """Distort `[H, W, C]` uint8, a part of the image `whole`, whose mean grey is the centre of the contrast.

        Images without the three colours have no hue, saturation and order of channels.
        """
        if pixels.shape[2] != 3 and (self.saturation, self.hue, self.channels) != (None, None, None):
            return replace(self, saturation=None, hue=None, channels=None).on(pixels, whole)
        grey = 0.0 if self.contrast is None else self._mean_grey(whole)
        pixels = self._coloured(self._before(pixels, grey))
        if self.contrast is not None and not self.contrast_first:
            pixels = _looked_up(pixels, _contrasted(_RAMP, self.contrast, grey))
        if self.channels is not None:
            found = np.empty(pixels.shape, np.uint8)
            cv2.mixChannels([pixels], [found], [place for to in range(3) for place in (self.channels[to], to)])
            pixels = found
        return pixels

    def _before(self, pixels: np.ndarray, grey: float) -> np.ndarray:
        """Brightness, and the contrast where it comes first."""
        table = _RAMP
        if self.brightness is not None:
            table = np.clip(table * self.brightness, 0, 255)
        if self.contrast is not None and self.contrast_first:
            table = _contrasted(table, self.contrast, grey)
        return pixels if table is _RAMP else _looked_up(pixels, table)

    def _coloured(self, pixels: np.ndarray) -> np.ndarray:
        """Saturation and hue."""
        if self.saturation is not None:
            pixels = cv2.transform(pixels, (1 - self.saturation) * _LUMA + self.saturation * np.eye(3))
        return pixels if self.hue is None else _turned(pixels, int(self.hue * _HUES))

    def _mean_grey(self, whole: np.ndarray) -> float:
        """Mean grey where the contrast is changed; a sample of the pixels is enough for it."""
        rows, columns = (-(-side // _THUMBNAIL) for side in whole.shape[:2])
        sample = np.ascontiguousarray(whole[rows // 2 :: rows, columns // 2 :: columns])
        if self.brightness is not None:
            sample = _looked_up(sample, np.clip(_RAMP * self.brightness, 0, 255))
        if not self.contrast_first:
            sample = self._coloured(sample)
        if sample.shape[2] != 3:
            return round(float(sample.mean()))
        return round(float(np.array(cv2.mean(sample)[:3]) @ _LUMA))


def _contrasted(values: np.ndarray, factor: float, grey: float) -> np.ndarray:
    return np.clip(grey + factor * (values - grey), 0, 255)


def _looked_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    return cv2.LUT(pixels, table.astype(np.uint8)).reshape(pixels.shape)  # OpenCV drops an axis of one


def _turned(pixels: np.ndarray, steps: int) -> np.ndarray:
    """The image with its hue turned by steps of which `_HUES` make the circle."""
    cells = cv2.cvtColor(pixels, cv2.COLOR_BGR2BGR565).view(np.uint16)[..., 0]  # any channel order works here
    corrections = np.take(_corrections(steps), cells).view(np.uint8).reshape(*cells.shape, 4)
    added = cv2.cvtColor(corrections, cv2.COLOR_BGRA2BGR)
    return np.add(pixels, added, out=added)


@lru_cache(maxsize=32)
def _corrections(steps: int) -> np.ndarray:
    """`[65536]` what turning the hue adds to red, green and blue, a byte each (modulo 256), per colour cell.

    A cell are the colours with the same 5 leading bits of red and blue and 6 of green. The difference hardly changes
    within a cell. It is bounded so that no colour of the cell leaves 0..255, where bytes would wrap around.
    """
    cells = np.arange(1 << 16)
    low = np.stack([(cells & 31) << 3, (cells >> 5 & 63) << 2, cells >> 11 << 3], -1)
    last = np.array([7, 3, 7])  # of the cell, in each channel
    middle = low + last / 2
    added = np.rint(turned(middle, steps / _HUES) - middle).clip(-low, 255 - last - low)
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
