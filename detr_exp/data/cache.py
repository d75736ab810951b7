"""Decoded images, kept for later epochs and shared by all loader workers.

A kept image is a file: a few numbers that say what it was decoded from, then its bytes. In memory (`ram`) the files
lie in the system's memory folder and go with the process that made them; on `disk` later runs find them again.
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
from pathlib import Path

import numpy as np

from detr_exp.data.content import Split
from detr_exp.data.image import decode_scale

log = logging.getLogger(__name__)

PLACES = ("none", "ram", "disk")
MEMORY = Path("/dev/shm")
SHARE = 0.5  # of the free space that `ram` and `disk` take at most; batches pass through the memory folder too
_HEADER = 32  # bytes: file size, time of change, height, width


class ImageCache:
    """Images of a split, decoded once.

    An image is known by its path, its file's size and time of change, and the scale it was decoded at: a file that
    changed is decoded anew. What is kept stays; when the limit is reached, further images are decoded every time.

    Args:
        folder: holds the files.
        limit: bytes they may take together.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.used = multiprocessing.Value("q", sum(file.stat().st_size for file in folder.iterdir()))

    def image(self, split: Split, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        """What `split.image(index, smallest)` gives."""
        path = split.name(index)
        try:
            stat = os.stat(path)
        except (OSError, ValueError):  # drawn, not read; or gone, which the split says better
            return split.image(index, smallest)
        scale = decode_scale(path, split.size(index), smallest)
        place = self.folder / f"{hashlib.sha1(path.encode()).hexdigest()}-{scale}"
        stamp = (stat.st_size, stat.st_mtime_ns)
        kept = _read(place, stamp)
        if kept is not None:
            return kept
        image = split.image(index, smallest)
        self._keep(place, stamp, image)
        return image

    def _keep(self, place: Path, stamp: tuple[int, int], pixels: np.ndarray) -> None:
        with self.used.get_lock():
            if self.used.value + _HEADER + pixels.nbytes > self.limit:
                return
            self.used.value += _HEADER + pixels.nbytes
        header = np.array([*stamp, *pixels.shape[:2]], np.int64)
        unfinished = place.with_suffix(f".{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                file.write(header.tobytes())
                file.write(pixels.data)
            unfinished.replace(place)  # readers see all of it or nothing
        except OSError:  # no space left
            self.limit = 0
            unfinished.unlink(missing_ok=True)


def image_cache(where: str, gigabytes: float, root: str | None) -> ImageCache | None:
    """The cache that a configuration asks for.

    Args:
        where: `none`, `ram` or `disk`.
        gigabytes: most it may take.
        root: folder of the data set.

    Raises:
        ValueError: for another place or a size that is not positive.
    """
    if where not in PLACES:
        raise ValueError(f"data.cache is {where!r}; use none, ram or disk: data.cache=ram")
    if gigabytes <= 0:
        raise ValueError(f"data.cache_gb is {gigabytes}; it must be above 0, or use data.cache=none")
    if where == "none":
        return None
    if where == "disk":
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detr_exp"
        folder = base / hashlib.sha1(os.path.abspath(root or "").encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    else:
        base = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(base)
        folder = Path(tempfile.mkdtemp(prefix=f"detr_exp-{os.getpid()}-", dir=base))
    limit = min(gigabytes * 1e9, SHARE * shutil.disk_usage(folder).free)
    cache = ImageCache(folder, limit)
    if where == "ram":
        weakref.finalize(cache, _remove, folder, os.getpid())
    log.info("decoded images are kept in %s, at most %.1f GB", folder, limit / 1e9)
    return cache


def _read(place: Path, stamp: tuple[int, int]) -> np.ndarray | None:
    """`[H, W, 3]` uint8, mapped, so that only what is looked at is read; None where no whole one of this stamp is."""
    try:
        with place.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # written on, it would not reach the file
    except (OSError, ValueError):
        return None
    if len(content) < _HEADER:
        return None
    size, changed, height, width = np.frombuffer(content, np.int64, 4).tolist()
    if (size, changed) != stamp or min(height, width) < 1 or len(content) != _HEADER + 3 * height * width:
        return None  # of another file, or damaged
    return np.frombuffer(content, np.uint8, offset=_HEADER).reshape(height, width, 3)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits the call
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(base: Path) -> None:
    """Remove what killed processes left behind."""
    for folder in base.glob("detr_exp-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # somebody else's is alive
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True
