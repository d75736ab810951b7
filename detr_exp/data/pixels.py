"""Pixels of images in memory: one rule for types, ranges and channels."""

from __future__ import annotations

import cv2
import numpy as np

MAX_PIXELS = 2**27  # 134 megapixels, 400 MB decoded; checked on the header, before anything is decoded
TOP = 65535.0  # highest value of 16 bits
_HALF_LEVEL = 0.5 / 255
COLOURS = (1, 3)  # channels of grey and of colour images; others are those of the file
OTHER_CHANNELS = "{} has {} channels, but data.channels is {}; give images with these, or set data.channels={}"
OTHER_SIZE = "{} is {}x{} pixels but annotated as {}x{}; fix the annotation file or restore the original image"
HUGE = "{} has {}x{} pixels, more than {} megapixels; cut it into tiles or scale it down"


class ImageError(ValueError):
    """An image that cannot be used.

    PyTorch rebuilds an exception of a loader worker from its whole traceback; only the message itself is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def pixels_of_array(values: np.ndarray, channels: int = 3) -> np.ndarray:
    """`[H, W, 3]` uint8 RGB, or as many channels as a network has, from an image in memory.

    Args:
        values: `[H, W]` or `[H, W, 1]` grey, `[H, W, 3]` RGB or `[H, W, 4]` RGBA, whose alpha is dropped; uint8, uint16
            scaled by its range as a file of 16 bits is, bool, or float in 0..1. `[H, W, channels]` stay as they are.
        channels: of the result.

    Raises:
        ImageError: of another kind, or outside its range.
    """
    is_float = np.issubdtype(values.dtype, np.floating)
    is_known = is_float or values.dtype in (np.dtype(np.uint8), np.dtype(bool)) or values.dtype.str[1:] == "u2"
    is_image = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4, channels))
    if not is_known or not is_image or not values.size:
        raise ImageError(
            f"an array {list(values.shape)} of {values.dtype} is no image; give [H, W, {channels}] uint8"
            f"{' RGB, or [H, W], [H, W, 4]' if channels == 3 else ''}, uint16, or float in 0..1"
        )
    if is_float:
        low, high = float(values.min()), float(values.max())
        if not (low >= -_HALF_LEVEL and high <= 1 + _HALF_LEVEL):
            raise ImageError(
                f"an image of {values.dtype} has values from {low:.4g} to {high:.4g}; they have to be in 0..1, before "
                "any normalisation: divide by 255, or give uint8"
            )
        values = (values.astype(np.float32) * 255).round().clip(0, 255)
    elif values.dtype == bool:
        values = values * np.uint8(255)
    elif values.dtype != np.uint8:
        # as Pillow reads files: grey to the nearest level, of colours the upper byte
        values = values >> 8 if values.ndim == 3 and values.shape[2] in (3, 4) else (values * (255 / 65535)).round()
    values = values.astype(np.uint8, copy=False)
    values = values[..., None] if values.ndim == 2 else values
    values = values[..., :3] if values.shape[2] == 4 and channels in (1, 3) else values  # without alpha
    return np.ascontiguousarray(as_channels(values, channels))


def as_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """`[H, W, channels]`: colours as their grey, grey as colours, or what has these channels already.

    Raises:
        ImageError: it has others.
    """
    count = pixels.shape[2]
    if count == channels:
        return pixels
    if (count, channels) == (3, 1):
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    if (count, channels) == (1, 3):
        return pixels.repeat(3, axis=2)
    raise ImageError(OTHER_CHANNELS.format("an image", count, channels, count))


def in_bytes(values: np.ndarray) -> np.ndarray:
    """uint8: values of a file with more than 8 bits, scaled by the range of 16 bits, or else by their own."""
    values = np.asarray(values)
    if values.dtype == np.uint8:
        return values
    is_whole = np.issubdtype(values.dtype, np.integer)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = TOP if is_whole and values.min() >= 0 and values.max() <= TOP else None
    low, high = (0.0, top) if top else (values.min(), max(values.max(), values.min() + 1e-12))
    return ((values - low) * (255 / (high - low))).round().astype(np.uint8)
