"""Images to predict on: files, folders, patterns, videos, standard input."""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from detr_exp.data.files import files_below, is_image
from detr_exp.data.image import SUFFIXES
from detr_exp.data.pixels import COLOURS
from detr_exp.data.whole import is_cut_short
from detr_exp.inference.detector import as_image
from detr_exp.inference.live import frames, is_live, stem_of
from detr_exp.published.download import DownloadError
from detr_exp.published.fetch import fetch_file
from detr_exp.tracker.secrets import masked

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

log = logging.getLogger("detr_exp.predict")

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
VIDEO_HEADS = (
    b"RIFF",
    b"\x1aE\xdf\xa3",
    b"\x00\x00\x01\xba",
    b"\x00\x00\x01\xb3",
    b"FLV",
    b"OggS",
)  # AVI, Matroska, MPEG
ADDRESSES = ("http://", "https://")
LARGEST_DOWNLOAD = 1 << 30  # bytes
_RESULTS = (".jpg", ".txt")  # suffixes of the results of an image
_LONGEST, _SHORT = (
    255,
    200,
)  # bytes of a file's name: the limit of file systems, and the part of a longer name that is used


class UnreadableError(RuntimeError):
    """Some images could not be read; all others were."""


@dataclass(frozen=True)
class Item:
    """An image that has not been read yet.

    Attributes:
        name: its name in results: its path; for a video the path and the number of the frame.
        stem: path of its result files, relative to their folder and without suffix; unique.
        read: returns it upright, `[H, W, 3]` uint8 RGB; raises ValueError if it cannot be read.
        moves: whether it is a frame, followed by others.
    """

    name: str
    stem: str
    read: Callable[[], np.ndarray]
    moves: bool = False


def open_source(source: str, every: int = 1, channels: int = 3) -> tuple[Iterator[Item], int]:
    """The images of `source`, and their approximate number; 0 for what has no known end.

    Args:
        source: an image, a video, a folder with images in it and below, a pattern with `*` or `?`, `-`, an address
            (`https://...`) of an image or a video, the number of a camera (`0`), or a stream (`rtsp://...`).
        every: n reads every n-th frame of a video, a camera or a stream.
        channels: of an image.

    Raises:
        ValueError: there are none.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it must be >= 1: every=1")
    if not source:
        raise ValueError("source is empty; give an image, a folder, a pattern, a video or -: source=photo.jpg")
    if source == "-":
        return iter([Item("-", "stdin", partial(_from_stdin, channels))]), 1
    if source.startswith(ADDRESSES):
        return _from_address(source, every, channels)
    path = Path(source).expanduser()
    if is_live(source) and not path.exists():
        stem, shown = stem_of(source), str(masked(source))
        read = frames(source, every)
        return (Item(f"{shown}#{number}", f"{stem}_{number:06d}", one, moves=True) for number, one in read), 0
    if path.suffix.lower() in VIDEOS and path.is_file():
        return _frames(path, every)
    paths = find_images(path, channels)
    items = [Item(str(one), stem, partial(as_image, one, channels)) for one, stem in zip(paths, result_stems(paths))]
    return iter(items), len(paths)


def _from_address(url: str, every: int, channels: int) -> tuple[Iterator[Item], int]:
    """What a server sends, which is kept in the cache: one image, or a video."""
    path = fetch_file(url, _refuse_other_kinds, LARGEST_DOWNLOAD)
    if not _is_image(path):
        return _frames(path, every)
    return iter(
        [Item(str(masked(url)), path.name.partition("-")[2] or "download", partial(as_image, path, channels))]
    ), 1


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _refuse_other_kinds(path: Path) -> None:
    """
    Raises:
        DownloadError: it is neither an image nor a video.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if not (_is_image(path) or head[4:8] == b"ftyp" or head.startswith(VIDEO_HEADS)):
        raise DownloadError(f"it is neither an image nor a video (it begins with {head[:12]!r})")


def items_of(source: object, every: int = 1, channels: int = 3) -> tuple[Iterator[Item], bool]:
    """The images of everything that can be predicted on in Python.

    Args:
        source: see `open_source`; the content of a file, an open file, a PIL image, an array, a tensor, a stack of
            arrays or tensors `[n, ...]`, or an iterable of any of these.
        every, channels: see `open_source`.

    Returns:
        the images, and whether they were found in one place, where some may be unreadable; others were named one by
        one, so that there must be a result for each.
    """
    if isinstance(source, str | Path | int):
        items, count = open_source(str(source), every, channels)
        return items, count != 1
    parts = [source] if _is_one(source) or not isinstance(source, Iterable) else source
    return _each(parts, every, channels), False


def _each(parts: Iterable[object], every: int, channels: int) -> Iterator[Item]:
    for place, part in enumerate(parts):
        if isinstance(part, str | Path):
            yield from open_source(str(part), every, channels)[0]
        else:
            content = part.read() if isinstance(part, BufferedIOBase) else part
            yield Item(str(place), str(place), partial(as_image, content, channels))  # type: ignore[arg-type]


def _is_one(source: object) -> bool:
    """Whether this is one image, and not several."""
    if isinstance(source, np.ndarray | torch.Tensor):
        return source.ndim in (2, 3)
    return isinstance(source, bytes | Image.Image | BufferedIOBase)


def readable(items: Sequence[Item], skipped: list[str]) -> Iterator[tuple[Item, np.ndarray]]:
    """The images that can be read; the others cause a warning, and their names are added to `skipped`."""
    for item in items:
        try:
            yield item, item.read()
        except ValueError as error:
            log.warning("skipped: %s", error)
            skipped.append(item.name)


def result_stems(paths: Sequence[Path]) -> list[str]:
    """A path for the results of each image: relative to the folder that all share, without suffix.

    Where two would be equal (`a.jpg`, `a.png`, and `A.jpg` on some disks), or a result would have the name of a folder,
    they keep their suffix, and get a number where that is not enough or too long for a name.
    """
    shared = os.path.commonpath([path.parent for path in paths])
    full = [os.path.relpath(path, shared) for path in paths]
    folders = {str(folder).casefold() for name in full for folder in Path(name).parents}
    tries = [0] * len(full)
    while True:
        stems = [_stem(name, number, i) for i, (name, number) in enumerate(zip(full, tries))]
        count = Counter(stem.casefold() for stem in stems)
        clashing = [
            i
            for i, stem in enumerate(stems)
            if (count[stem.casefold()] > 1 and tries[i] != 1) or not _is_free(stem, folders)
        ]
        if not clashing:
            return stems
        for i in clashing:
            tries[i] += 1


def _stem(name: str, number: int, index: int) -> str:
    """Stem number 0, 1, ... for the results of an image; from 2 on it has the image's index, so it is unique."""
    if number == 1:
        return name
    folder, last = os.path.split(os.path.splitext(name)[0])
    if number > 1:
        last = f"{os.fsencode(last)[:_SHORT].decode(errors='ignore')}_{index + 1}-{number}"
    return os.path.join(folder, last)


def _is_free(stem: str, folders: set[str]) -> bool:
    """Whether result files may have this stem."""
    fits = len(os.fsencode(os.path.basename(stem))) + max(map(len, _RESULTS)) <= _LONGEST
    return fits and not any(f"{stem}{suffix}".casefold() in folders for suffix in _RESULTS)


def find_images(source: str | Path, channels: int = 3) -> list[Path]:
    """The image `source`, those in the folder `source` and below, or those of a pattern, sorted by name.

    Links to folders are followed; each folder is read once. NumPy files are images for networks of other channels.

    Raises:
        ValueError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    is_pattern = not path.exists() and any(mark in str(source) for mark in "*?")
    candidates = [Path(one) for one in glob.iglob(str(path), recursive=True)] if is_pattern else files_below(path)[0]
    also = () if channels in COLOURS else (".npy",)
    images = sorted(one for one in candidates if one.is_file() and (is_image(one.name) or one.suffix in also))
    if not images:
        what = "matches" if is_pattern else "holds" if path.is_dir() else "does not exist, so it holds"
        raise ValueError(
            f"source={source} {what} no image; give an image, a video, -, an address (https://...), a camera (0), or a "
            f"folder or pattern of {', '.join(sorted(SUFFIXES))} files"
        )
    return images


def _from_stdin(channels: int) -> np.ndarray:
    try:
        return as_image(sys.stdin.buffer.read(), channels)
    except ValueError as error:
        raise ValueError(f"standard input is no image ({error}); use it like: cat photo.jpg | ... source=-") from error


def _frames(path: Path, every: int) -> tuple[Iterator[Item], int]:
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} is a video, and reading it needs PyAV: pip install 'detr_exp[video]'") from None
    try:
        video = av.open(str(path))
        stream = video.streams.video[0]
        rate = float(stream.average_rate or 0)
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}); give another file") from error
    length = stream.frames or int(float((stream.duration or 0) * (stream.time_base or 0)) * rate)

    def items() -> Iterator[Item]:
        number, damaged = 0, 0
        with video:
            for frame in _decoded(video, stream):
                if isinstance(frame, Exception):
                    damaged += 1
                    continue
                if number % every == 0:
                    yield Item(f"{path}#{number}", f"{path.stem}_{number:06d}", partial(_upright, frame), moves=True)
                number += 1
        with path.open("rb") as file:
            problem = (
                "the file is truncated" if is_cut_short(file) else f"{damaged} parts are damaged" if damaged else ""
            )
        if problem:
            yield Item(
                f"{path} after {number} frames", "", partial(_refuse, f"{path}: {problem}; {number} frames read")
            )

    return items(), -(-length // every)


def _decoded(video: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | Exception]:
    """The frames of a video; a frame that cannot be decoded becomes an exception, and the next ones follow."""
    import av

    packets = video.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (OSError, av.FFmpegError) as error:
            yield error
            return
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.EOFError:
            return
        except (OSError, av.FFmpegError) as error:
            yield error


def _upright(frame: Any) -> np.ndarray:
    """A frame's pixels as a player shows them: mirrored and turned by its display matrix."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # x' = a x + c y, y' = b x + d y; rows of three, as in ISO 14496-12
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _refuse(message: str) -> np.ndarray:
    raise ValueError(message)
