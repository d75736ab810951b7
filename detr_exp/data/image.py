"""Decode images from files, bytes and arrays, with one rule for orientation, colour modes, bit depth and size."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from detr_exp.data import bands
from detr_exp.data.pixels import COLOURS, HUGE, MAX_PIXELS, OTHER_CHANNELS, OTHER_SIZE, as_channels, in_bytes
from detr_exp.data.pixels import ImageError as ImageError
from detr_exp.data.whole import is_filled_up, tags

cv2.setNumThreads(1)  # its threads do not survive the fork to a loader worker, and one thread is enough for one image

# formats that Pillow opens, without those of videos, documents and measurements
# fmt: off
SUFFIXES = {
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".dng", ".ftc", ".ftu", ".gif",
    ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
    ".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".qoi", ".ras",
    ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm",
}
# fmt: on
JPEG_SUFFIXES = {".jpeg", ".jpg"}
SCALES = (1, 2, 4, 8)  # by which JPEG files are shrunk while they are decoded
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF's
# from the upright image back to the stored one
_TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_FILLED = "{} is damaged: a part of its image data is nothing but zeros, as a broken transfer leaves it; replace it"
_END_OF_JPEG = b"\xff\xd9"
# OpenCV's flags for RGB without EXIF rotation, at the scales of libjpeg
_STORED_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# exceptions that Pillow raises for truncated or damaged files
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError, struct.error, zlib.error)


FIRST_FRAME = "only the first frame of an image with several is used"


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright image, from the header."""
    shape = bands.shape_of(path)
    try:
        with _opened(path) as image:
            return _sizes(image)[1]
    except ImageError:
        if shape is None:
            raise
        return shape[:2]


def refuse_size(path: Path, size: tuple[int, int], channels: int = 3) -> None:
    """Check from the header that an image can be opened, has the (height, width) that was annotated, and the channels.

    Raises:
        ImageError: it does not.
    """
    if (shape := bands.described(path, channels)) is not None:
        return bands.refuse(str(path), shape, size, channels)
    with _opened(path) as image:
        _fitting(str(path), image, size)
        _refuse_channels(str(path), image, channels)


def oddities(path: Path, size: tuple[int, int], channels: int = 3) -> list[str]:
    """What is unusual about a readable image, and how it is handled.

    Args:
        path: the file.
        size: (height, width) that was annotated.
        channels: as `read_image`.
    """
    if bands.described(path, channels) is not None:
        return []
    with _opened(path) as image:
        (stored, _), orientation = _sizes(image), _orientation(image)
        found = []
        usual = Image.registered_extensions().get(path.suffix.lower())
        if usual is not None and image.format not in (usual, "MPO"):
            found.append(f"images whose name says {usual} are {image.format}; they are read as {image.format}")
        if orientation in _TRANSPOSED and size == stored != stored[::-1]:
            found.append("EXIF tags were ignored: the annotated size is that of the image as it is stored")
        elif orientation > 1 and (orientation not in _TRANSPOSED or stored == stored[::-1]):
            found.append(
                "images were turned as their EXIF tag says; whether the boxes were cannot be told from the size"
            )
        if has_more_frames(image):
            found.append(FIRST_FRAME)
        return found


def has_more_frames(source: Path | bytes | Image.Image, channels: int = 3) -> bool:
    """Whether only the first of several frames or pages is read."""
    if not isinstance(source, Image.Image):
        if bands.described(source, channels) is not None:
            return False
        with _opened(source) as image:
            return has_more_frames(image)
    try:
        return getattr(source, "is_animated", False) and source.format != "MPO" and source.tell() == 0
    except _BROKEN:
        return False  # later frames are damaged, but they are not used


def read_image(
    source: Path | bytes,
    size: tuple[int, int] | None = None,
    smallest: tuple[int, int] | None = None,
    *,
    suffix: str = "",
    channels: int = 3,
) -> np.ndarray:
    """Decode an image to `[H, W, 3]` uint8 RGB, or to as many channels as `data.channels` says.

    Images are rotated as their EXIF or TIFF tag says, and boxes refer to the upright image. The tag is ignored only
    where the annotated size fits the stored image and not the upright one: then the annotator saw the stored image.
    16-bit and float images are scaled by their range, alpha is dropped, and only the first of several frames is read.
    One channel is the grey of a colour image. Other numbers are those of the file, in its order: a TIFF, a NumPy file,
    or the alpha of an image as its fourth.

    Args:
        source: the file, or its content.
        size: (height, width) the annotations were made for; None: any.
        smallest: a JPEG is decoded at 1/2, 1/4 or 1/8 scale where the result is at least this (height, width).
        suffix: that of the file which a content is from, as `decode_scale` needs it.
        channels: of the result.

    Raises:
        ImageError: unreadable, damaged, too large, of another size than annotated, or with other channels.
    """
    if (shape := bands.described(source, channels)) is not None:
        return bands.decoded(source, shape, size, channels)
    with _opened(source) as image:
        _refuse_channels(_name(source), image, channels)
        orientation = _orientation(image)
        upright = _fitting(_name(source), image, size)
        turn = orientation > 1 and (size is None or size == upright)
        is_jpeg = image.format == "JPEG"
        content = _checked(source, image)
        named = f"image{suffix}" if isinstance(source, bytes) else source
        scale = decode_scale(named, size or upright, smallest)
        if is_jpeg and image.mode == "RGB" and not turn:
            pixels = _jpeg(content, scale)
            if pixels is not None:
                return as_channels(pixels, channels)
        if is_jpeg and scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        return _decoded(image, _name(source), orientation, turn, channels)


def pixels_of(image: Image.Image, channels: int = 3) -> np.ndarray:
    """Decode a PIL image as `read_image` decodes its file, or convert one that was changed in memory.

    Raises:
        ImageError: damaged or too large.
    """
    name = str(getattr(image, "filename", "") or "a PIL image")
    _refuse_huge(name, image)
    _refuse_channels(name, image, channels)
    file = getattr(image, "fp", None)
    if file is not None and not file.closed and file.seekable():  # not decoded yet
        place = file.tell()
        file.seek(0)
        content = file.read()
        file.seek(place)
        if is_filled_up(image, content):
            raise ImageError(_FILLED.format(name))
    return _decoded(image, name, _orientation(image), True, channels)


def decode_scale(path: str | Path, size: tuple[int, int], smallest: tuple[int, int] | None) -> int:
    """The factor by which `read_image` shrinks both sides: 1, or 2, 4 or 8 where the suffix is that of a JPEG."""
    if smallest is None or os.path.splitext(path)[1].lower() not in JPEG_SUFFIXES:
        return 1
    most = min(size[0] // smallest[0], size[1] // smallest[1])
    return max(scale for scale in SCALES if scale <= max(1, most))


def _checked(source: Path | bytes, image: Image.Image) -> bytes:
    """The content of the file, of formats that are checked for zeros.

    Raises:
        ImageError: a part of it is filled with zeros.
    """
    if image.format not in ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF"):
        return b""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ImageError(f"{_name(source)} cannot be read ({error.strerror}); replace it or drop it") from error
    if is_filled_up(image, content):
        raise ImageError(_FILLED.format(_name(source)))
    return content


def _jpeg(content: bytes, scale: int) -> np.ndarray | None:
    """Decode with OpenCV: the same bits as Pillow, in 80 % of the time. None where Pillow has to read the file, since
    OpenCV fills truncated images without an error."""
    if not content.endswith(_END_OF_JPEG):
        return None
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), _STORED_RGB | _REDUCED[scale])
    except cv2.error:
        return None


def _decoded(image: Image.Image, name: str, orientation: int, turn: bool, channels: int = 3) -> np.ndarray:
    """All pixels, upright or as stored."""
    # Pillow inverts 8-bit images whose zeros mean white, but not those of 16 bits
    is_negative = image.mode.startswith("I;16") and tags(image).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    try:
        if image.format == "TIFF" and orientation in _TRANSPOSED:
            # Pillow memory-maps plain data of a file with a name, and then with the row length of the rotated image
            image.filename = ""  # type: ignore[attr-defined]
        if turn and orientation > 1:
            image = ImageOps.exif_transpose(image)
        elif orientation > 1 and image.format == "TIFF":
            image.load()  # Pillow rotates it here
            image = image.transpose(_TURNED_BACK[orientation])
        if channels not in COLOURS:
            return np.array(image)
        pixels = np.array(_rgb(image))
        return as_channels(255 - pixels if is_negative else pixels, channels)
    except _BROKEN as error:
        raise ImageError(f"{name} cannot be decoded ({error}); replace it or drop it from the data set") from error


def _refuse_channels(name: str, image: Image.Image, channels: int) -> None:
    """Refuse an image without the channels, where they are not those of colours."""
    count = len(image.getbands())
    if channels not in COLOURS and (image.mode not in ("LA", "RGBA") or count != channels):
        raise ImageError(OTHER_CHANNELS.format(name, count, channels, count))


def _sizes(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the image as it is stored, and upright."""
    stored = (image.height, image.width)
    if image.format == "TIFF":  # some versions of Pillow return the upright size
        stored = (tags(image).get(257, stored[0]), tags(image).get(256, stored[1]))
    return stored, stored[::-1] if _orientation(image) in _TRANSPOSED else stored


def _fitting(name: str, image: Image.Image, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the upright image; `size` has to be this size or the stored one."""
    stored, upright = _sizes(image)
    if size is not None and size not in (upright, stored):
        raise ImageError(OTHER_SIZE.format(name, upright[1], upright[0], size[1], size[0]))
    return upright


def _name(source: Path | bytes) -> str:
    return "an image in memory" if isinstance(source, bytes) else str(source)


def _opened(source: Path | bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{_name(source)} is not a readable image ({error}); replace it or drop it from the data"
        ) from error
    try:
        _refuse_huge(_name(source), image)
    except ImageError:
        image.close()
        raise
    return image


def _refuse_huge(name: str, image: Image.Image) -> None:
    if math.prod(image.size) > MAX_PIXELS:
        raise ImageError(HUGE.format(name, image.width, image.height, MAX_PIXELS // 10**6))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1  # a damaged tag is ignored
    return value if value in range(1, 9) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(in_bytes(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())  # undo the multiplication by alpha
    if image.mode == "RGB":
        image.load()  # `convert` would copy
        return image
    return image.convert("RGB")
