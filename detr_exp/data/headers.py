"""Read the headers of all images before the first step, to find images that cannot be opened or that have another size
than annotated before hours of training.

A split without faults is remembered by a stamp of the annotations and of every file's path, size and time, so that the
next run on the same files only checks the file system.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from detr_exp.data.content import Split
from detr_exp.data.files import is_image
from detr_exp.data.image import ImageError, refuse_size
from detr_exp.data.joined import tables_of
from detr_exp.data.problems import Problems
from detr_exp.data.table import TableSplit
from detr_exp.writing import caches

log = logging.getLogger(__name__)
Made = TypeVar("Made")
_MANY, _AHEAD = 32, 512  # numbers a thread takes at a time; and such parts that are begun before the first is used
THREADS = 8  # network disks serve several requests at once


def accounted(split: Split, problems: Problems) -> tuple[str, bool]:
    """Check the headers of all images, and count what is in a split.

    Returns:
        its numbers in words, and whether no object is left to train on.
    """
    tables = tables_of(split).values()
    spoiled = [check_headers(table, problems) for table in tables]
    usable = sum(table.counts.sum() - table.counts[list(bad)].sum() for table, bad in zip(tables, spoiled))
    accounts = [
        table.account + f"; {len(bad)} of the images cannot be read" * bool(bad) for table, bad in zip(tables, spoiled)
    ]
    has_only_tables = sum(map(len, tables)) == len(split)
    return "; ".join(accounts) or f"{len(split)} images", not split.most_objects or (has_only_tables and not usable)


def check_headers(split: TableSplit, problems: Problems) -> set[int]:
    """Report images whose header cannot be read or states another size than annotated, and return their indices."""
    remembered = _memory() / stamp(split)
    if remembered.exists():
        return set()
    with ThreadPoolExecutor(THREADS) as pool:
        complaints = {i: c for i, c in enumerate(in_turn(pool, partial(_complaint, split), len(split))) if c}
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


def unlisted(splits: Iterable[TableSplit]) -> Iterator[str]:
    """The images that lie in the folders of others and belong to no split."""
    names_in: dict[str, set[str]] = {}
    for split in splits:
        for path in split.paths:
            place, _, name = path.rpartition(os.sep)
            names_in.setdefault(place, set()).add(name)
    for place in sorted(names_in, key=Path):
        for name in sorted(set(os.listdir(place or os.curdir)) - names_in[place]):
            if is_image(name):
                yield str(Path(place, name))


def report_unlisted(origin: str, splits: Iterable[TableSplit]) -> None:
    """Report images that lie beside those of the splits but belong to no split."""
    problems = Problems(origin)
    for path in unlisted(splits):
        problems.note("images that lie beside others and that no split lists", path)
    problems.report()


def stamp(split: TableSplit) -> str:
    """A hash of the annotations and of the path, size and time of every image."""
    digest = hashlib.sha256(split.fingerprint.encode())
    if split.channels != 3:
        digest.update(f" {split.channels} channels".encode())
    for path in split.paths:
        try:
            status = os.stat(path)
        except OSError:
            digest.update(f"\n{path} missing".encode(errors="surrogateescape"))
        else:
            digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def in_turn(pool: ThreadPoolExecutor, do: Callable[[int], Made], count: int) -> Iterator[Made]:
    """What `do` returns for each number below `count`, in order; each thread takes many at a time, and few wait."""
    starts = range(0, count, _MANY)
    for first in range(0, len(starts), _AHEAD):
        some = starts[first : first + _AHEAD]
        for done in pool.map(lambda start: [do(i) for i in range(start, min(start + _MANY, count))], some):
            yield from done


def _complaint(split: TableSplit, index: int) -> str | None:
    try:
        refuse_size(Path(split.paths[index]), split.size(index), split.channels)
    except ImageError as error:
        return str(error)
    return None


def _memory() -> Path:
    """The folder of the stamps."""
    return caches() / "detr_exp" / "headers"
