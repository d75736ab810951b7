"""Where pictures to predict on come from: files, folders, patterns, films, standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detr_exp.data.files import files_below, is_image
from detr_exp.data.image import SUFFIXES
from detr_exp.data.whole import is_cut_short
from detr_exp.inference.detector import as_image

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_RESULTS = (".jpg", ".txt")  # what is made of a picture
_LONGEST, _SHORT = 255, 200  # bytes of a file's name: what systems allow, and what is kept of one that is too long


class UnreadableError(RuntimeError):
    """Some pictures could not be read; all others were."""


@dataclass(frozen=True)
class Item:
    """A picture that has not been read yet.

    Attributes:
        name: what results call it: its path; of a film the path and the number of the frame.
        stem: where files made from it lie, below a folder of theirs and without suffix; no two items share one.
        read: gives it upright, `[H, W, 3]` uint8 RGB; raises ValueError where it cannot.
    """

    name: str
    stem: str
    read: Callable[[], np.ndarray]


def open_source(source: str, every: int = 1) -> tuple[Iterator[Item], int]:
    """The pictures meant by `source`, and how many there are about.

    Args:
        source: a picture, a film, a folder with pictures in it and below, a pattern with `*` or `?`, or `-`.
        every: of a film, only each so many-th frame.

    Raises:
        ValueError: there are none.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it must be >= 1: every=1")
    if source == "-":
        return iter([Item("-", "stdin", _from_stdin)]), 1
    path = Path(source).expanduser()
    if path.suffix.lower() in VIDEOS and path.is_file():
        return _frames(path, every)
    found = find_images(path)
    items = [Item(str(one), stem, partial(as_image, one)) for one, stem in zip(found, result_stems(found))]
    return iter(items), len(found)


def result_stems(paths: Sequence[Path]) -> list[str]:
    """A stem for the results of each picture: its path below the folder that all share, without suffix.

    Where two would be the same (`a.jpg`, `a.png`, and `A.jpg` on some disks), or a result's name that of a folder, they
    keep their suffix, and get a number where that does not help or is too long for a name.
    """
    shared = os.path.commonpath([path.parent for path in paths])
    full = [os.path.relpath(path, shared) for path in paths]
    folders = {str(folder).casefold() for name in full for folder in Path(name).parents}
    tries = [0] * len(full)
    while True:
        found = [_stem(name, number, i) for i, (name, number) in enumerate(zip(full, tries))]
        count = Counter(stem.casefold() for stem in found)
        clashing = [
            i
            for i, stem in enumerate(found)
            if (count[stem.casefold()] > 1 and tries[i] != 1) or not _is_free(stem, folders)
        ]
        if not clashing:
            return found
        for i in clashing:
            tries[i] += 1


def _stem(name: str, number: int, index: int) -> str:
    """The first, second ... stem that the results of a picture of this name may have; from the third on by its index,
    which no other has."""
    if number == 1:
        return name
    folder, last = os.path.split(os.path.splitext(name)[0])
    if number > 1:
        last = f"{os.fsencode(last)[:_SHORT].decode(errors='ignore')}_{index + 1}-{number}"
    return os.path.join(folder, last)


def _is_free(stem: str, folders: set[str]) -> bool:
    """Whether files of results may have this stem's name."""
    fits = len(os.fsencode(os.path.basename(stem))) + max(map(len, _RESULTS)) <= _LONGEST
    return fits and not any(f"{stem}{suffix}".casefold() in folders for suffix in _RESULTS)


def find_images(source: str | Path) -> list[Path]:
    """The picture `source`, those in the folder `source` and below, or those of a pattern, in the order of their names.

    Linked folders are followed; what they lead to is read once.

    Raises:
        ValueError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    is_pattern = not path.exists() and any(mark in str(source) for mark in "*?")
    candidates = [Path(one) for one in glob.iglob(str(path), recursive=True)] if is_pattern else files_below(path)[0]
    found = sorted(one for one in candidates if is_image(one.name) and one.is_file())
    if not found:
        what = "matches" if is_pattern else "holds" if path.is_dir() else "does not exist, so it holds"
        raise ValueError(
            f"source={source} {what} no picture; give a picture, a film, -, or a folder or pattern of "
            f"{', '.join(sorted(SUFFIXES))} files"
        )
    return found


def _from_stdin() -> np.ndarray:
    try:
        return as_image(sys.stdin.buffer.read())
    except ValueError as error:
        raise ValueError(
            f"what came from standard input is no picture ({error}); as in: cat photo.jpg | ... source=-"
        ) from error


def _frames(path: Path, every: int) -> tuple[Iterator[Item], int]:
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} is a film, and reading it needs PyAV: pip install 'detr_exp[video]'") from None
    try:
        video = av.open(str(path))
        stream = video.streams.video[0]
        rate = float(stream.average_rate or 0)
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as a film ({error}); give another file") from error
    length = stream.frames or int(float((stream.duration or 0) * (stream.time_base or 0)) * rate)

    def items() -> Iterator[Item]:
        number, spoiled = 0, 0
        with video:
            for frame in _decoded(video, stream):
                if isinstance(frame, Exception):
                    spoiled += 1
                    continue
                if number % every == 0:
                    yield Item(f"{path}#{number}", f"{path.stem}_{number:06d}", partial(_upright, frame))
                number += 1
        with path.open("rb") as file:
            what = "the file is cut short" if is_cut_short(file) else f"{spoiled} parts are spoiled" if spoiled else ""
        if what:
            yield Item(f"{path} after {number} frames", "", partial(_refuse, f"{path}: {what}; {number} frames read"))

    return items(), -(-length // every)


def _decoded(video: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | Exception]:
    """The frames of a film; what could not be decoded comes as an exception, and the film goes on."""
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
