"""Cache of decoded images, reused in later epochs and shared by all loader workers.

A cached image is a file: a few numbers that identify its source file, then its bytes. With `ram` the files are in the
system's memory folder and are deleted when the process ends; with `disk` later runs reuse them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import multiprocessing
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detr_exp.data.content import Split, identity_of
from detr_exp.data.image import SCALES, decode_scale
from detr_exp.writing import caches

log = logging.getLogger(__name__)

PLACES = ("none", "ram", "disk")
MEMORY = Path("/dev/shm")
SHARE = 0.5  # largest part of the free space that `ram` and `disk` use; batches pass through the memory folder too
_HEADER = 32  # bytes: file size, time of change, height, width


@dataclass
class Room:
    """A folder of files that are made once.

    Attributes:
        folder: holds the files; that of `ram` is removed with this object.
        limit: bytes that all files may use together.
    """

    folder: Path
    limit: float


class ImageCache:
    """Images of a split, decoded once.

    The key of an image is its path, its file's size and modification time (in shards, its place and checksum), and the
    scale it was decoded at: a changed file is decoded again. Nothing is evicted; when the limit is reached, further
    images are decoded every time.

    Args:
        room: for its files.
        channels: of the images.
    """

    def __init__(self, room: Room, channels: int = 3) -> None:
        self.room, self.channels = room, channels
        self.used = multiprocessing.Value("q", sum(file.stat().st_size for file in room.folder.iterdir()))

    def image(self, split: Split, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        """The same as `split.image(index, smallest)`."""
        found = self._source(split, index)
        if found is None:
            return split.image(index, smallest)
        name, stamp = found
        place = self._place(name, decode_scale(split.name(index), split.size(index), smallest))
        kept = _read(place, stamp, self.channels)
        if kept is not None:
            return kept
        image = split.image(index, smallest)
        self._keep(place, stamp, image)
        return image

    def missing(self, split: Split, indices: Sequence[int]) -> list[int]:
        """Those of the images that are not in the cache at any scale."""
        sources = {index: self._source(split, index) for index in indices}
        return [
            index
            for index, source in sources.items()
            if source is None or not any(self._place(source[0], scale).exists() for scale in SCALES)
        ]

    def _source(self, split: Split, index: int) -> tuple[str, tuple[int, int]] | None:
        """What an image is kept under, and the stamp of its file; None: it has neither."""
        name = identity_of(split, index)
        if name is not None:
            return name, (0, 0)
        try:
            stat = os.stat(split.name(index))
        except (OSError, ValueError):  # synthetic; or missing, which the split reports better
            return None
        return split.name(index), (stat.st_size, stat.st_mtime_ns)

    def _place(self, name: str, scale: int) -> Path:
        end = "" if self.channels == 3 else f"-{self.channels}"
        return self.room.folder / f"{hashlib.sha1(name.encode()).hexdigest()}-{scale}{end}"

    def _keep(self, place: Path, stamp: tuple[int, int], pixels: np.ndarray) -> None:
        with self.used.get_lock():
            if self.used.value + _HEADER + pixels.nbytes > self.room.limit:
                return
            self.used.value += _HEADER + pixels.nbytes
        header = np.array([*stamp, *pixels.shape[:2]], np.int64)
        unfinished = place.with_suffix(f".{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                file.write(header.tobytes())
                file.write(pixels.data)
            unfinished.replace(place)  # readers see the complete file or none
        except OSError:  # no space left
            self.room.limit = 0
            unfinished.unlink(missing_ok=True)


def image_cache(where: str, gigabytes: float, root: str | None, channels: int = 3) -> ImageCache | None:
    """The cache that a configuration requests.

    Args:
        where: `none`, `ram` or `disk`.
        gigabytes: upper limit of its size.
        root: folder of the data set.
        channels: of the images.

    Raises:
        ValueError: as for `room_for`.
    """
    name = hashlib.sha1(os.path.abspath(root or "").encode()).hexdigest()[:16]
    room = room_for(where, gigabytes, name, "data")
    if room is None:
        return None
    log.info("decoded images are cached in %s, at most %.1f GB", room.folder, room.limit / 1e9)
    return ImageCache(room, channels)


def room_for(where: str, gigabytes: float, name: str, group: str) -> Room | None:
    """The folder of a cache; None: `none`.

    Args:
        where: `none`, `ram` or `disk`.
        gigabytes: upper limit of its size.
        name: of the folder that later runs find again, below `~/.cache/detr_exp`.
        group: whose keys `cache` and `cache_gb` these are, for messages.

    Raises:
        ValueError: for another place, one that cannot be written to, or a size that is not positive.
    """
    if where not in PLACES:
        raise ValueError(f"{group}.cache is {where!r}; use none, ram or disk: {group}.cache=ram")
    if gigabytes <= 0:
        raise ValueError(f"{group}.cache_gb is {gigabytes}; it must be above 0, or use {group}.cache=none")
    if where == "none":
        return None
    if where == "disk":
        folder = caches() / "detr_exp" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{group}.cache is disk, but {folder} cannot be written to ({error.strerror}); keep it elsewhere: "
                f"XDG_CACHE_HOME=FOLDER, or use {group}.cache=ram"
            ) from error
    else:
        base = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(base)
        folder = Path(tempfile.mkdtemp(prefix=f"detr_exp-{os.getpid()}-", dir=base))
    room = Room(folder, min(gigabytes * 1e9, SHARE * shutil.disk_usage(folder).free))
    if where == "ram":
        weakref.finalize(room, _remove, folder, os.getpid())
    return room


def _read(place: Path, stamp: tuple[int, int], channels: int) -> np.ndarray | None:
    """`[H, W, channels]` uint8, memory-mapped; None where there is no complete file with this stamp."""
    try:
        with place.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writes do not reach the file
    except (OSError, ValueError):
        return None
    if len(content) < _HEADER:
        return None
    size, changed, height, width = np.frombuffer(content, np.int64, 4).tolist()
    if (size, changed) != stamp or min(height, width) < 1 or len(content) != _HEADER + channels * height * width:
        return None  # of another version of the source file, or damaged
    return np.frombuffer(content, np.uint8, offset=_HEADER).reshape(height, width, channels)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits the call
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(base: Path) -> None:
    """Remove the folders of killed processes."""
    for folder in base.glob("detr_exp-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # a process of another user is alive
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True
