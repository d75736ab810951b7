"""Where pictures to predict on come from: files, folders, patterns, films, standard input."""

from __future__ import annotations

import glob
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detr_exp.data.files import files_below, is_picture
from detr_exp.data.picture import SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

FILMS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


class UnreadableError(RuntimeError):
    """Some pictures could not be read; all others were."""


@dataclass(frozen=True)
class Item:
    """A picture that has not been read yet.

    Attributes:
        name: what results call it: its path; of a film the path and the number of the frame.
        stem: what files made from it are called.
        read: gives it upright, as 8-bit RGB; raises ValueError where it cannot.
    """

    name: str
    stem: str
    read: Callable[[], Image.Image]


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
    if path.suffix.lower() in FILMS and path.is_file():
        return _frames(path, every)
    found = find_pictures(path)
    return iter([Item(str(one), one.stem, _reading(one)) for one in found]), len(found)


def find_pictures(source: str | Path) -> list[Path]:
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
    found = sorted(one for one in candidates if is_picture(one.name) and one.is_file())
    if not found:
        what = "matches" if is_pattern else "holds" if path.is_dir() else "does not exist, so it holds"
        raise ValueError(
            f"source={source} {what} no picture; give a picture, a film, -, or a folder or pattern of "
            f"{', '.join(sorted(SUFFIXES))} files"
        )
    return found


def _reading(path: Path) -> Callable[[], Image.Image]:
    from PIL import Image

    from detr_exp.data.picture import read_picture

    return lambda: Image.fromarray(read_picture(path))


def _from_stdin() -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(sys.stdin.buffer.read())) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError("what came from standard input is no picture; as in: cat photo.jpg | ... source=-") from error


def _frames(path: Path, every: int) -> tuple[Iterator[Item], int]:
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} is a film, and reading it needs PyAV: pip install 'detr_exp[video]'") from None
    try:
        film: Any = av.open(str(path))
        stream = film.streams.video[0]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as a film ({error}); give another file") from error
    length = stream.frames or int(float((stream.duration or 0) * (stream.time_base or 0)) * float(stream.average_rate))

    def items() -> Iterator[Item]:
        with film:
            for number, frame in enumerate(film.decode(stream)):
                if number % every == 0:
                    yield Item(f"{path}#{number}", f"{path.stem}_{number:06d}", frame.to_image)

    return items(), -(-length // every)
