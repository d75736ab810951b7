"""Pictures from files: one rule for orientation, colour modes and size."""

from __future__ import annotations

import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

cv2.setNumThreads(1)  # its threads do not survive the fork to a loader worker, and one picture needs no more

# what Pillow opens, without films, pages and measurements
# fmt: off
SUFFIXES = {
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".dng", ".ftc", ".ftu", ".gif",
    ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
    ".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".qoi", ".ras",
    ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm",
}
# fmt: on
JPEG_SUFFIXES = {".jpeg", ".jpg"}
MAX_PIXELS = 2**27  # 134 megapixels, 400 MB decoded; checked on the header, before anything is decoded
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
_END_OF_JPEG = b"\xff\xd9"
# OpenCV's words for red, green, blue as they are stored, at the scales of libjpeg
_STORED_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# what Pillow raises for files that are cut off or spoiled
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)


class PictureError(ValueError):
    """A picture that cannot be used. Raised in a loader worker, it reaches the training process as its sentence alone:
    PyTorch makes it anew from the worker's whole traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header."""
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _TRANSPOSED else (height, width)


def refuse_size(path: Path, size: tuple[int, int]) -> None:
    """Check from the header that a picture can be opened and has the (height, width) that was annotated.

    Raises:
        PictureError: it does not.
    """
    with _opened(path) as image:
        _fitting(path, image, size)


def oddities(path: Path, size: tuple[int, int]) -> list[str]:
    """What is unusual about a picture that can be read, each with what is done about it.

    Args:
        path: the file.
        size: (height, width) that was annotated.
    """
    with _opened(path) as image:
        stored, orientation = (image.height, image.width), _orientation(image)
        found = []
        usual = Image.registered_extensions().get(path.suffix.lower())
        if usual is not None and image.format not in (usual, "MPO"):
            found.append(f"pictures whose name says {usual} are {image.format}; they are read as what they are")
        if orientation in _TRANSPOSED and size == stored != stored[::-1]:
            found.append("EXIF tags were ignored: the annotated size is that of the picture as it is stored")
        elif orientation > 1 and (orientation not in _TRANSPOSED or stored == stored[::-1]):
            found.append(
                "pictures were turned as their EXIF tag says; whether the boxes were cannot be told from the size"
            )
        if getattr(image, "is_animated", False) and image.format != "MPO":
            found.append("only the first frame of a picture with several is used")
        return found


def read_picture(
    path: Path, size: tuple[int, int] | None = None, smallest: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode a picture to `[H, W, 3]` uint8 RGB.

    Pictures are turned upright as their EXIF tag says, and boxes refer to the upright picture. Only where the
    annotated size fits the stored picture and not the upright one is the tag ignored: then the annotator did too.
    16-bit and float pictures are scaled by their range; an alpha channel is dropped.

    Args:
        path: the file.
        size: (height, width) the annotations were made for; None: whatever it is.
        smallest: a JPEG is decoded at 1/2, 1/4 or 1/8 where it is then not smaller than this (height, width).

    Raises:
        PictureError: unreadable, too large, or of another size than annotated.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        upright = _fitting(path, image, size)
        turn = orientation > 1 and (size is None or size == upright)
        scale = decode_scale(path, size or upright, smallest)
        is_jpeg = image.format == "JPEG"
        if is_jpeg and image.mode == "RGB" and not turn:
            pixels = _jpeg(path, scale)
            if pixels is not None:
                return pixels
        if is_jpeg and scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        try:
            return np.array(_rgb(ImageOps.exif_transpose(image) if turn else image))
        except _BROKEN as error:
            raise PictureError(
                f"{path} cannot be decoded ({error}); replace it or drop it from the data set"
            ) from error


def decode_scale(path: str | Path, size: tuple[int, int], smallest: tuple[int, int] | None) -> int:
    """What `read_picture` divides both sides of a picture by: 1, or 2, 4 or 8 where its name says that it is a JPEG."""
    if smallest is None or os.path.splitext(path)[1].lower() not in JPEG_SUFFIXES:
        return 1
    most = min(size[0] // smallest[0], size[1] // smallest[1])
    return 8 if most >= 8 else 4 if most >= 4 else 2 if most >= 2 else 1


def _jpeg(path: Path, scale: int) -> np.ndarray | None:
    """What Pillow decodes, to the bit and a fifth sooner; None where it should have a look at the file itself: OpenCV
    fills up what is cut off without a word."""
    try:
        content = np.fromfile(path, np.uint8)
        is_whole = content[-2:].tobytes() == _END_OF_JPEG
        return cv2.imdecode(content, _STORED_RGB | _REDUCED[scale]) if is_whole else None
    except (OSError, cv2.error):
        return None


def _fitting(path: Path, image: Image.Image, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the upright picture; `size` has to be that, or that of the stored one."""
    stored = (image.height, image.width)
    upright = stored[::-1] if _orientation(image) in _TRANSPOSED else stored
    if size is not None and size not in (upright, stored):
        raise PictureError(
            f"{path} is {upright[1]}x{upright[0]} pixels but annotated as {size[1]}x{size[0]}; mend the "
            "annotation file or put the original picture back"
        )
    return upright


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise PictureError(
            f"{path} is not a readable picture ({error}); replace it or drop it from the data"
        ) from error
    if math.prod(image.size) > MAX_PIXELS:
        image.close()
        raise PictureError(
            f"{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} megapixels; cut it into "
            "tiles or scale it down"
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1  # a spoiled tag turns nothing
    return value if value in range(1, 9) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        top = 65535.0 if image.mode.startswith("I") and values.min() >= 0 and values.max() <= 65535 else None
        low, high = (0.0, top) if top else (values.min(), max(values.max(), values.min() + 1e-12))
        return Image.fromarray(((values - low) * (255 / (high - low))).round().astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        image.load()  # `convert` would copy
        return image
    return image.convert("RGB")
