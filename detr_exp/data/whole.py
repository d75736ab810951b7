"""Detect files that are truncated or filled with zeros, as broken transfers leave them, where decoders raise no error.

A decoder of entropy-coded images decodes zeros as grey. In uncompressed images (BMP, plain TIFF) zeros are simply
black and prove nothing.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from PIL import Image

_FILLER = bytes(64)
_JPEG_MARK = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # begins a segment: neither stuffing nor a restart nor a fill
_SEQUENTIAL, _TABLES, _SCAN, _END = (0xC0, 0xC1), 0xC4, 0xDA, 0xD9
_SKIP = 0xF0  # JPEG's symbol for 16 coefficients that are zero
_PLAIN = 1  # TIFF's value for "not compressed"
_STRIPS, _TILES = (273, 279), (324, 325)  # TIFF's tags of offsets and lengths


def tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF, by number."""
    return getattr(image, "tag_v2", {})


def is_filled_up(image: Image.Image, content: bytes) -> bool:
    """Whether the data of an image contain zeros that no encoder writes.

    Args:
        image: the file, opened with Pillow.
        content: of the file.
    """
    if _FILLER not in content:
        return False
    if image.format in ("JPEG", "MPO"):
        return _filled_jpeg(content)
    if image.format == "PNG":
        return _filled_png(content)
    if image.format == "WEBP":
        return _filled_webp(content)
    if image.format == "AVIF":
        parts = [content[start:end] for name, start, end in boxes(io.BytesIO(content)) if name == b"mdat"]
        return any(part.endswith(_FILLER) for part in parts)
    if image.format == "TIFF" and (found := tags(image)).get(259, _PLAIN) != _PLAIN:
        pairs = [zip(found.get(at, ()), found.get(length, ())) for at, length in (_STRIPS, _TILES)]
        return any(content[at : at + length].endswith(_FILLER) for pair in pairs for at, length in pair)
    return False


def is_cut_short(file: BinaryIO) -> bool:
    """Whether a video is shorter than its header states: MP4, QuickTime, AVI; False for other formats."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little") > size
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return any(end > size for _, _, end in boxes(file))
    return False


def boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte of the content and end of every outermost box of an ISO base media file (ISO 14496-12)."""
    at, whole = 0, file.seek(0, io.SEEK_END)
    while at + 8 <= whole:
        file.seek(at)
        head = file.read(16)
        length, begin = int.from_bytes(head[:4], "big"), at + 8
        if length == 1:
            length, begin = int.from_bytes(head[8:16], "big"), at + 16
        elif length == 0:
            length = whole - at
        if length < begin - at:
            return  # padding
        yield head[4:8], begin, at + length
        at += length


def _filled_jpeg(content: bytes) -> bool:
    """Zeros where the image data do not end, or where zeros cannot mean a flat area: with the usual Huffman tables they
    mean a coefficient of -1 everywhere. Bytes behind the end are the camera's."""
    at, sequential, tables = 2, False, dict[int, bool]()
    while found := _JPEG_MARK.search(content, at):
        mark, start = content[found.start() + 1], found.end()
        if mark == _END:
            return False
        at = start + int.from_bytes(content[start : start + 2], "big")
        if mark in _SEQUENTIAL:
            sequential = True
        elif mark == _TABLES:
            tables.update(_ac_tables(content[start + 2 : at]))
        elif mark == _SCAN:
            end = _JPEG_MARK.search(content, at)
            is_odd = end is None or (
                any(tables.values()) if sequential else _is_odd_scan(content[start + 2 : at], tables)
            )
            if is_odd and content.find(_FILLER, at, end.start() if end else len(content)) >= 0:
                return True
    return False


def _is_odd_scan(head: bytes, tables: Mapping[int, bool]) -> bool:
    """Whether zeros are odd in a scan of a progressive image: where it begins AC coefficients, its table says; equal
    DC coefficients and refinements may be zeros."""
    return len(head) == 6 and head[3] > 0 and head[5] >> 4 == 0 and tables.get(head[2] & 15, False)


def _ac_tables(segment: bytes) -> Iterator[tuple[int, bool]]:
    """The number of each AC table of a segment, and whether nothing but zeros is odd with it: they mean a coefficient,
    or the end of a block again and again where the table has a symbol for many blocks that end."""
    at = 0
    while at + 17 < len(segment):
        symbols = segment[at + 17 : at + 17 + sum(segment[at + 1 : at + 17])]
        if segment[at] >> 4 and symbols:
            ends_many = any(symbol % 16 == 0 and 0 < symbol < _SKIP for symbol in symbols)
            yield segment[at] & 15, symbols[0] % 16 > 0 or ends_many
        at += 17 + sum(segment[at + 1 : at + 17])


def _filled_png(content: bytes) -> bool:
    """Zeros in image data whose checksum is wrong; Pillow does not check it."""
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        name, data = content[at + 4 : at + 8], content[at + 8 : end]
        if (
            name == b"IDAT"
            and _FILLER in data
            and zlib.crc32(name + data) != int.from_bytes(content[end : end + 4], "big")
        ):
            return True
        at = end + 4
    return False


def _filled_webp(content: bytes) -> bool:
    """Zeros in place of parts, or as a large part of the image data: flat areas leave some at their end."""
    at, whole = 12, min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while at + 8 <= whole:
        name, end = content[at : at + 4], at + 8 + int.from_bytes(content[at + 4 : at + 8], "little")
        data = content[at + 8 : end]
        zeros = len(data) - len(data.rstrip(b"\0"))
        if name == bytes(4) or (name in (b"VP8 ", b"VP8L", b"ANMF") and zeros > max(len(_FILLER), len(data) * 9 // 20)):
            return True
        at = end + end % 2
    return False
