"""Write a split as shards; see `shards`. Shards that are complete are not written again."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from detr_exp.data import index
from detr_exp.data.shards import KEY
from detr_exp.data.table import TableSplit
from detr_exp.values import Values
from detr_exp.writing import remove_left_overs, write


class Entry(NamedTuple):
    """Where an image is in its shard: first byte and number of bytes, and their checksum."""

    offset: int
    length: int
    crc: int


def write_shards(split: TableSplit, name: str, folder: Path, most_bytes: int, say: Callable[[str], None]) -> None:
    """Write the images of a split, then their index, without which nothing of it is used.

    A shard is written under another name and renamed when it is on disk; then it is read again and compared with the
    files of its images. So is one that is there already, and kept if it has the same content.

    Args:
        split: to write.
        name: of the split.
        folder: for the shards, existing.
        most_bytes: of a shard, more only if a single image is larger.
        say: receives a line about each shard.

    Raises:
        ValueError: an image cannot be read, or a shard cannot be written.
    """
    remove_left_overs(folder / f"{name}-")
    columns: dict[str, list[int]] = {"shard": [], "offset": [], "length": [], "crc": []}
    written: list[Values] = []
    for number, images in enumerate(_groups(split, most_bytes)):
        path = folder / f"{name}-{number:05d}.tar"
        entries = _verified(path, split, images)
        state = "kept"
        if entries is None:
            write(path, partial(_fill, split, images))
            entries, state = _verified(path, split, images), "written"
        if entries is None:
            raise ValueError(
                f"{path} does not hold what was written; its disk is damaged, or an image changed meanwhile: run "
                "python -m detr_exp.shard again, or with another out=..."
            )
        columns["shard"] += [number] * len(images)
        for key in Entry._fields:
            columns[key] += [getattr(entry, key) for entry in entries]
        written.append({"name": path.name, "bytes": path.stat().st_size})
        say(f"{path}: {len(images)} images, {state}")
    table = {**split.columns, "paths": split.paths.data, "path_ends": split.paths.ends}
    values: Values = {"key": KEY, "shards": written, "fingerprint": split.fingerprint, "account": split.account}
    values["categories"] = [asdict(category) for category in split.categories]
    own = {key: np.array(column, np.int64) for key, column in columns.items()}
    write(folder / f"{name}.index", index.filling(values, {**table, **own}))


def _groups(split: TableSplit, most_bytes: int) -> Iterator[range]:
    """The images of each shard."""
    first, total = 0, 0
    for i, path in enumerate(split.paths):
        size = os.stat(path).st_size if os.path.exists(path) else 0  # reading it says what is wrong
        if i > first and total + size > most_bytes:
            yield range(first, i)
            first, total = i, 0
        total += size
    if len(split):
        yield range(first, len(split))


def _member(split: TableSplit, image: int) -> str:
    """The name of an image in its shard."""
    return f"{image:09d}{os.path.splitext(split.paths[image])[1].lower()}"


def _fill(split: TableSplit, images: range, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            content = _file(split.paths[image])
            head = tarfile.TarInfo(_member(split, image))  # no times and owners: the same images give the same bytes
            head.size = len(content)
            tar.addfile(head, io.BytesIO(content))


def _verified(path: Path, split: TableSplit, images: range) -> list[Entry] | None:
    """Where the images are in a shard; None if it is absent, or does not hold exactly these files."""
    entries = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
            if [member.name for member in members] != [_member(split, image) for image in images]:
                return None
            for member, image in zip(members, images):
                content = os.pread(file.fileno(), member.size, member.offset_data)
                if content != _file(split.paths[image]):
                    return None
                entries.append(Entry(member.offset_data, member.size, zlib.crc32(content)))
    except (OSError, tarfile.TarError):
        return None
    return entries


def _file(path: str) -> bytes:
    """The content of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); fix it, or drop it from the data") from error
