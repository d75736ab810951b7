"""Images of any number of channels: NumPy files, and TIFFs of several bands, which image libraries do not decode.

A TIFF of C bands is decoded as one of a single band that is C times as wide: the bytes of both are the same, so that
all compressions of the library work. Where bands are stored apart, each is such an image.

Legend: (H, W) height and width, C channels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import TiffImagePlugin

from detr_exp.data.pixels import (
    COLOURS,
    HUGE,
    MAX_PIXELS,
    OTHER_CHANNELS,
    OTHER_SIZE,
    ImageError,
    as_channels,
    in_bytes,
    pixels_of_array,
)

NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*")
MOST_PAGES = 512
SUFFIXES = {".npy", ".tif", ".tiff"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_SAMPLES, _ROWS, _PLANES, _PREDICTOR, _FORMAT = 277, 278, 284, 317, 339
_STRIPS, _TILES, _TILE_WIDTH, _TILE_HEIGHT = (273, 279), (324, 325), 322, 323  # offsets and lengths
_DEFLATE = (8, 32946)  # compressions
_PREDICTING = (5, *_DEFLATE)  # those with a predictor; 5 is LZW
_DIFFERENCES = 2  # the predictor that stores differences to the left neighbour
_DAMAGED = (struct.error, zlib.error, cv2.error)
_BROKEN = (*_DAMAGED, OSError, ValueError, LookupError, TypeError, SyntaxError, ArithmeticError, EOFError)
Tags = TiffImagePlugin.ImageFileDirectory_v2


def shape_of(source: Path | bytes, *, paged: bool = False) -> tuple[int, int, int] | None:
    """(height, width, channels) of a NumPy file or a TIFF, from its header; None of other files and damaged ones.

    Args:
        source: the file, or its content.
        paged: pages of one band are the channels; False: there is nothing but the first page.
    """
    if isinstance(source, Path) and source.suffix.lower() not in SUFFIXES:
        return None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(8)
            if head.startswith(NUMPY):
                return _shape(_numpy_header(file))
            return _tiff_shape(_pages(file, head, paged)) if head[:4] in TIFF else None
    except _BROKEN:
        return None


def is_numpy(source: Path | bytes) -> bool:
    """Whether a file for which `shape_of` is not None is a NumPy file."""
    if isinstance(source, bytes):
        return source.startswith(NUMPY)
    with open(source, "rb") as file:
        return file.read(len(NUMPY)) == NUMPY


def described(source: Path | bytes, channels: int) -> tuple[int, int, int] | None:
    """(height, width, channels) of a file whose channels are read one by one; None: it is opened as an image."""
    shape = shape_of(source, paged=channels not in COLOURS)
    if shape is None or is_numpy(source) or channels not in COLOURS:
        return shape
    return None if shape[2] in (1, 3, 4) else shape


def refuse(name: str, shape: tuple[int, int, int], size: tuple[int, int] | None, channels: int) -> None:
    """Refuse a file by its header.

    Args:
        name: of the file.
        shape: by `described`.
        size: (height, width) that was annotated; None: any.
        channels: that are needed.

    Raises:
        ImageError: it is too large, or has another size or other channels.
    """
    height, width, count = shape
    if height * width > MAX_PIXELS:
        raise ImageError(HUGE.format(name, width, height, MAX_PIXELS // 10**6))
    if size is not None and size != (height, width):
        raise ImageError(OTHER_SIZE.format(name, width, height, size[1], size[0]))
    if count != channels and {count, channels} != set(COLOURS):
        raise ImageError(OTHER_CHANNELS.format(name, count, channels, count))


def decoded(
    source: Path | bytes, shape: tuple[int, int, int], size: tuple[int, int] | None, channels: int
) -> np.ndarray:
    """`[H, W, channels]` uint8: a file that `described` describes; see `refuse` and `image.read_image`.

    Raises:
        ImageError: it cannot be used.
    """
    name = "an image in memory" if isinstance(source, bytes) else str(source)
    refuse(name, shape, size, channels)
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        values = read(content, paged=channels not in COLOURS)
    except ValueError as error:
        raise ImageError(f"{name}: {error}; replace it or drop it from the data set") from error
    if is_numpy(content):
        return pixels_of_array(values, channels)
    return as_channels(in_bytes(values), channels)


def read(content: bytes, *, paged: bool = False) -> np.ndarray:
    """`[H, W, C]`: the values of a file for which `shape_of` is not None.

    Args:
        content: of the file.
        paged: see `shape_of`.

    Raises:
        ValueError: it is damaged, or of a kind that is not read.
    """
    try:
        if content.startswith(NUMPY):
            values = np.load(io.BytesIO(content), allow_pickle=False)
            height, width, count = _shape(values.shape)
            is_first = values.ndim == 3 and values.shape != (height, width, count)
            return np.moveaxis(values, 0, -1) if is_first else values.reshape(height, width, count)
        pages = _pages(io.BytesIO(content), content[:8], paged)
        pages = pages[: 1 if _tiff_shape(pages)[2] == _samples(pages[0]) else None]
        return np.concatenate([_tiff(content, tags) for tags in pages], 2)
    except _BROKEN as error:
        raise ValueError(f"it cannot be decoded ({' '.join(str(error).split())[:200]})") from error


def _shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels are the last axis of three, or the first one if it is shorter."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if len(shape) != 3 or not min(shape):
        raise ValueError(f"an array {list(shape)} is no image; it needs [H, W, C]")
    return (shape[1], shape[2], shape[0]) if shape[0] < shape[2] else (shape[0], shape[1], shape[2])


def _numpy_header(file: BinaryIO) -> tuple[int, ...]:
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read_header(file)[0]


def _pages(file: BinaryIO, head: bytes, paged: bool) -> list[Tags]:
    """The tags of the first page, or of all."""
    pages, place = list[Tags](), Tags(head).next
    while place and len(pages) < (MOST_PAGES if paged else 1):
        tags = Tags(head)
        file.seek(place)
        tags.load(file)
        pages.append(tags)
        place = tags.next
    return pages


def _samples(tags: Tags) -> int:
    return int(tags.get(_SAMPLES, 1))


def _tiff_shape(pages: Sequence[Tags]) -> tuple[int, int, int]:
    """Of the first page; pages of one band and of one size are the channels of an image."""
    shapes = {(int(tags[_HEIGHT]), int(tags[_WIDTH]), _samples(tags)) for tags in pages}
    height, width, count = int(pages[0][_HEIGHT]), int(pages[0][_WIDTH]), _samples(pages[0])
    return height, width, len(pages) if shapes == {(height, width, 1)} else count


def _tiff(content: bytes, tags: Tags) -> np.ndarray:
    height, width, count = _tiff_shape([tags])
    predictor, turned = tags.get(_PREDICTOR, 1), tags.get(_ORIENTATION, 1)
    if predictor not in (1, _DIFFERENCES) and tags.get(_COMPRESSION, 1) in _PREDICTING:
        raise ValueError(f"its predictor is {predictor}; write it without, or with differences (2)")
    if turned != 1:
        raise ValueError(f"its orientation tag is {turned}; write it upright")
    offsets, lengths = (tags[tag] for tag in (_TILES if _TILES[0] in tags else _STRIPS))
    if tags.get(_PLANES, 1) == 1:
        return _bands(content, tags, offsets, lengths, count).reshape(height, width, count)
    each = len(offsets) // count
    parts = [slice(each * i, each * (i + 1)) for i in range(count)]
    return np.concatenate([_bands(content, tags, offsets[part], lengths[part], 1) for part in parts], 2)


def _bands(content: bytes, tags: Tags, offsets: Sequence[int], lengths: Sequence[int], count: int) -> np.ndarray:
    """`[H, W, count]`: bands that are stored together, at these places of the file."""
    height, width, _ = _tiff_shape([tags])
    across, compression = width * count, tags.get(_COMPRESSION, 1)
    if compression in _DEFLATE:  # of which the library reports no damage
        parts = [zlib.decompress(content[start : start + length]) for start, length in zip(offsets, lengths)]
        ends = np.cumsum([8, *map(len, parts)]).tolist()
        content, offsets, lengths, compression = content[:8] + b"".join(parts), ends[:-1], [*map(len, parts)], 1
    at = len(content) + len(content) % 2
    single = {_WIDTH: [across], _HEIGHT: [height], _SAMPLES: [1], _PHOTOMETRIC: [1], _PLANES: [1]}
    single |= {tag: [_first(tags.get(tag, 1))] for tag in (_BITS, _FORMAT)} | {_COMPRESSION: [compression]}
    is_tiled, order = _TILES[0] in tags, "<" if content.startswith(b"II") else ">"
    in_pairs = is_tiled and single[_BITS] == [8]  # small tiles of bytes cannot be decoded, those of two bytes can
    if is_tiled:
        single |= {_TILE_WIDTH: [tags[_TILE_WIDTH] * count], _TILE_HEIGHT: [tags[_TILE_HEIGHT]]}
    else:
        single[_ROWS] = [min(tags.get(_ROWS, height), height)]
    if in_pairs:
        single |= {_WIDTH: [(across + 1) // 2], _TILE_WIDTH: [single[_TILE_WIDTH][0] // 2], _BITS: [16], _FORMAT: [1]}
        order = "<"
    places, sizes = _TILES if is_tiled else _STRIPS
    single |= {places: [*offsets], sizes: [*lengths]}
    head = TIFF[order == ">"] + struct.pack(f"{order}I", at)
    file = head + content[8:] + bytes(at - len(content)) + _directory(single, at, order)
    values = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape != (height, single[_WIDTH][0]):
        raise ValueError("its image data are truncated, or in a compression or type that is not read")
    values = np.ascontiguousarray(values.view(np.uint8)[:, :across] if in_pairs else values)
    values = values.reshape(height, width, count)
    if tags.get(_PREDICTOR, 1) == _DIFFERENCES and tags.get(_COMPRESSION, 1) in _PREDICTING:
        step = tags[_TILE_WIDTH] if is_tiled else width
        for start in range(0, width, step):
            part = values[:, start : start + step]
            np.cumsum(part, 1, part.dtype, out=part)
    return values


def _directory(tags: Mapping[int, Sequence[int]], at: int, order: str) -> bytes:
    """A directory of tags, as the file has it at byte `at`, with their values behind it."""
    end, fields, values = at + 2 + 12 * len(tags) + 4, b"", b""
    for tag, numbers in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        place = data if len(data) == 4 else struct.pack(f"{order}I", end + len(values))
        fields += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + place
        values += data if len(data) > 4 else b""
    return struct.pack(f"{order}H", len(tags)) + fields + bytes(4) + values


def _first(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]
