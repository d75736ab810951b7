"""What was read of a data set, kept as columns on disk, so that it is opened again without reading it.

An index is one file: a mark, the length and checksum of a header, the header (JSON), and the columns, which are mapped
into memory. Loader workers and ranks share them, and only the parts that are used take memory. An index is used where
it was made by the same code, for the same settings, and where the reading would see the same files (`seen`); else the
data are read and it is replaced. It lies in the user's cache, never beside the data.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import mmap
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from detr_exp.data.content import Category
from detr_exp.data.files import Folder
from detr_exp.data.problems import Problems
from detr_exp.data.seen import Seen, holds
from detr_exp.data.table import TableSplit, Texts
from detr_exp.values import Values
from detr_exp.writing import caches, write

log = logging.getLogger(__name__)
LEAST = 2000  # images: fewer are read sooner than they are looked up
UNUSED = 90 * 86400  # seconds after which an index is deleted
_MARK = b"detr_exp index\0\0"
_ALIGNED = 64  # bytes
_BLOCK = 2**20
_TYPES = {"|b1", "|u1", "<i8", "<f4", "<f8"}
Columns = Mapping[str, np.ndarray]


def categories(
    folder: Folder, key: Values, problems: Problems, read: Callable[[], tuple[list[Category], int]]
) -> list[Category]:
    """The categories of a data set: from its index, or else from `read`, which also returns the number of images."""

    def make() -> tuple[Values, Columns, int]:
        found, count = read()
        return {"categories": [asdict(category) for category in found]}, {}, count

    values, _ = _recalled(folder, key, problems, make)
    return [category_of(category) for category in values["categories"]]


def split(
    folder: Folder, key: Values, problems: Problems, known: list[Category], read: Callable[[], TableSplit]
) -> TableSplit:
    """A split: from its index, or else from `read`.

    Args:
        folder: of the data set, through which everything is read.
        key: all on which the result depends, besides files and `known`.
        problems: receives those of the reading, whenever it was.
        known: the categories of the data set.
        read: reads it.

    Raises:
        DataError: it has errors; then nothing is kept.
    """

    def make() -> tuple[Values, Columns, int]:
        found = read()
        columns = {**found.columns, "paths": found.paths.data, "path_ends": found.paths.ends}
        return {"fingerprint": found.fingerprint, "account": found.account}, columns, len(found)

    values, columns = _recalled(folder, {**key, "categories": [asdict(one) for one in known]}, problems, make)
    columns = dict(columns)
    paths = Texts(columns.pop("paths"), columns.pop("path_ends"))
    return TableSplit(paths, columns, known, values["fingerprint"], values["account"])


def category_of(values: Values) -> Category:
    """A category from its values in an index."""
    pairs = values["flip_pairs"]
    skeleton = [(a, b) for a, b in values["skeleton"]]
    return Category(
        **{**values, "skeleton": skeleton, "flip_pairs": None if pairs is None else [(a, b) for a, b in pairs]}
    )


def _recalled(
    folder: Folder, key: Values, problems: Problems, make: Callable[[], tuple[Values, Columns, int]]
) -> tuple[Values, Columns]:
    """Values and columns of the index of `key`, or else of `make`, whose last result is the number of images."""
    key = {**key, "source": problems.source, "skip": problems.skip, "code": _code(), **folder.identity()}
    key = json.loads(json.dumps(key))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    place = cache_folder() / name
    kept = opened(place, key)
    if kept is not None and holds(kept[0]["facts"], kept[1]["stamps"]):
        values, columns = kept
        _touch(place)
    else:
        folder.seen = Seen()
        made, columns, count = make()
        if not problems.errors:
            facts, stamps = folder.seen.facts()
            found = {"warnings": problems.warnings, "notes": problems.notes}
            values, columns = {"key": key, "facts": facts, **found, **made}, {**columns, "stamps": stamps}
            values = json.loads(json.dumps(values))
            if count >= LEAST and _is_written(place, values, columns):
                values, columns = opened(place, key) or (values, columns)
        folder.seen = Seen()
    if not problems.errors:
        problems.warnings, problems.notes = values["warnings"], values["notes"]
    problems.report()
    return values, {name: column for name, column in columns.items() if name != "stamps"}


def cache_folder() -> Path:
    """The folder of the indices of this user."""
    return caches() / "detr_exp" / "index"


@functools.cache
def _code() -> str:
    """A hash of the code that reads data, so that an index of another version is not used."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ the file


def filling(values: Values, columns: Columns) -> Callable[[IO[bytes]], None]:
    """A function that writes an index into an open file.

    Args:
        values: of JSON; its `key` says what the index is of, see `opened`.
        columns: arrays of bool, uint8, int64, float32 or float64.
    """
    described, end = {}, 0
    for name, column in columns.items():
        data = np.ascontiguousarray(column)
        described[name] = {
            "type": data.dtype.str,
            "shape": data.shape,
            "start": end,
            "crc": zlib.crc32(data.reshape(-1).view(np.uint8).data),
        }
        end += -(-data.nbytes // _ALIGNED) * _ALIGNED
    header = json.dumps({**values, "columns": described, "bytes": end}).encode()
    header += b" " * (-(len(header) + len(_MARK) + 16) % _ALIGNED)

    def fill(file: IO[bytes]) -> None:
        file.write(_MARK + len(header).to_bytes(8, "little") + zlib.crc32(header).to_bytes(8, "little") + header)
        for column in columns.values():
            data = np.ascontiguousarray(column)
            file.write(data.reshape(-1).view(np.uint8).data)
            file.write(bytes(-data.nbytes % _ALIGNED))

    return fill


def _is_written(place: Path, values: Values, columns: Columns) -> bool:
    """Write an index, in place of an older one; says where that is not possible."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(place.parent)
        write(place, filling(values, columns))
    except (OSError, ValueError) as error:
        log.info("the data are read anew each time, since their index cannot be kept: %s", error)
        return False
    return True


def opened(place: Path, key: Values) -> tuple[Values, Columns] | None:
    """The content of an index; None where there is none, or one that is damaged or of something else."""
    try:
        with open(place, "rb") as file:
            head = file.read(len(_MARK) + 16)
            length, crc = (int.from_bytes(head[-16 + at : len(head) - 8 + at], "little") for at in (0, 8))
            if not head.startswith(_MARK) or length > os.fstat(file.fileno()).st_size:
                return None
            header = file.read(length)
            if zlib.crc32(header) != crc:
                return None
            values: Values = json.loads(header)
            start = file.tell()
            if values["key"] != key or os.fstat(file.fileno()).st_size != start + values["bytes"]:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            columns = {name: _column(file, mapped, start, of) for name, of in values["columns"].items()}
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return None
    return (values, columns) if all(column is not None for column in columns.values()) else None  # type: ignore[return-value]


def _column(file: IO[bytes], mapped: mmap.mmap, start: int, of: Values) -> np.ndarray | None:
    """A column, mapped; None where it is damaged. It is checked by reading, which takes no memory of the process."""
    kind, count = np.dtype(of["type"]), int(np.prod(of["shape"], dtype=np.int64))
    if of["type"] not in _TYPES:
        return None
    file.seek(start + of["start"])
    left, crc = count * kind.itemsize, 0
    while left and (block := file.read(min(left, _BLOCK))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    if left or crc != of["crc"]:
        return None
    if not count:
        return np.zeros(of["shape"], kind)
    return np.frombuffer(mapped, kind, count, start + of["start"]).reshape(of["shape"])


def _touch(place: Path) -> None:
    try:
        os.utime(place)
    except OSError:
        return  # it is kept by others


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < time.time() - UNUSED:
                path.unlink()
        except OSError:
            continue  # another process has removed it
