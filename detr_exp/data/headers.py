"""Read the headers of all images before the first step, to find images that cannot be opened or that have another size
than annotated before hours of training.

A split without faults is remembered by a stamp of the annotations and of every file's path, size and time, so that the
next run on the same files only checks the file system.
"""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detr_exp.data.image import ImageError, refuse_size
from detr_exp.data.problems import Problems
from detr_exp.data.table import TableSplit

log = logging.getLogger(__name__)
THREADS = 8  # network disks serve several requests at once


def check_headers(split: TableSplit, problems: Problems) -> set[int]:
    """Report images whose header cannot be read or states another size than annotated, and return their indices."""
    remembered = _memory() / stamp(split)
    if remembered.exists():
        return set()
    with ThreadPoolExecutor(THREADS) as pool:
        complaints = {i: c for i, c in enumerate(pool.map(lambda i: _complaint(split, i), range(len(split)))) if c}
    for complaint in complaints.values():
        problems.image(complaint)
    if complaints:
        return set(complaints)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.touch()
    except OSError as error:
        log.info("the headers of %d images are valid, but this result cannot be saved: %s", len(split), error)
    return set()


def stamp(split: TableSplit) -> str:
    """A hash of the annotations and of the path, size and time of every image."""
    digest = hashlib.sha256(split.fingerprint.encode())
    for path in split.paths:
        try:
            status = os.stat(path)
        except OSError:
            digest.update(f"\n{path} missing".encode(errors="surrogateescape"))
        else:
            digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _complaint(split: TableSplit, index: int) -> str | None:
    try:
        refuse_size(Path(split.paths[index]), split.size(index))
    except ImageError as error:
        return str(error)
    return None


def _memory() -> Path:
    """The folder of the stamps, as the XDG specification defines it."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "detr_exp" / "headers"
