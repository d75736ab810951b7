"""Shards: tar files of images with an index per split, read by offset and length; in a folder, or at any address of
`fsspec`. `shard_writing` writes them.

An index (`train.index`, a file of `index`) holds the annotations and, of each image, its shard, offset, length and
checksum. An image is read on its own, so that order, resuming and ranks are as with files.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr_exp.data import index
from detr_exp.data.content import SPLITS, Category, Content, Objects
from detr_exp.data.image import ImageError, read_image
from detr_exp.data.problems import DataError, Problems
from detr_exp.data.table import Flat, TableSplit, Texts
from detr_exp.values import Values
from detr_exp.writing import write

KEY: Values = {"format": "detr_exp shards", "version": 1}
THREADS = 16  # reads at the same time, of one process, from afar
OWN = ("shard", "offset", "length", "crc")  # columns of the index beside those of a `TableSplit`


class Place:
    """A folder, or an address of `fsspec`: `s3://bucket/folder`, `gs://...`, `https://...`, `memory://...`.

    Args:
        root: of it.
    """

    def __init__(self, root: str) -> None:
        self.root, self.is_remote = root.rstrip("/"), "://" in root
        self._opened: tuple[int, Any, str] | None = None  # a file system belongs to one process

    def __reduce__(self) -> tuple[type[Place], tuple[str]]:
        return Place, (self.root,)

    def sizes(self) -> dict[str, int]:
        """Names of the files and their sizes in bytes.

        Raises:
            ValueError: it cannot be listed.
        """
        try:
            if not self.is_remote:
                with os.scandir(Path(self.root).expanduser()) as entries:
                    return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            system, path = self._system()
            with _as_os_errors():
                files = [one for one in system.ls(path, detail=True) if one["type"] == "file"]
                untold = [one["name"] for one in files if one["size"] is None]  # pages of http servers list names only
                told = dict(zip(untold, system.sizes(untold)))
            found = {str(one["name"]): told.get(one["name"], one["size"]) for one in files}
            return {name.rpartition("/")[2]: int(size or 0) for name, size in found.items()}
        except OSError as error:
            raise ValueError(
                f"data.root is {self.root!r}, which cannot be listed ({error}); give a folder of shards: data.root=..."
            ) from error

    def read(self, name: str, start: int, length: int) -> bytes:
        """A part of a file; shorter where the file ends.

        Raises:
            OSError: it cannot be read.
        """
        if self.is_remote:
            system, path = self._system()
            with _as_os_errors():
                content = system.cat_file(f"{path}/{name}", start=start, end=start + length)
            if len(content) > length:
                raise OSError(f"it gives {len(content)} bytes where {length} are asked for: a server needs byte ranges")
            return content
        with open(Path(self.root).expanduser() / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)

    def local(self, name: str, size: int) -> Path:
        """A file as one on this machine; one from afar is copied into the user's cache.

        Raises:
            OSError: it cannot be read.
        """
        if not self.is_remote:
            return Path(self.root).expanduser() / name
        folder = index.cache_folder().with_name("shards") / hashlib.sha256(self.root.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name, self.read(name, 0, size))
        return folder / name

    def _system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                system, path = url_to_fs(self.root, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                scheme = self.root.partition("://")[0]
                raise ValueError(
                    f"data.root is {self.root!r}, which this installation cannot read ({error}); install what "
                    f"{scheme}:// needs: pip install fsspec {'s3fs' if scheme == 's3' else 'gcsfs, adlfs ...'}"
                ) from error
            self._opened = os.getpid(), system, path
        return self._opened[1], self._opened[2]


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn errors of libraries behind a file system, each of which has its own, into an `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def shards(root: str | None, places: Values) -> Content:
    """Shards that `python -m detr_exp.shard` wrote, as a source for `DataSet`.

    Args:
        root: their folder or address.
        places: not used: the indices name the splits.

    Raises:
        ValueError: there are no shards, or an index is damaged.
    """
    if not root or any(places.get(name) for name in SPLITS):
        raise ValueError(
            f"data=shards needs a folder or address of shards and no data.train, val, test; data.root is {root!r}: "
            "data.root=/data/shards or data.root=s3://bucket/shards"
        )
    place = Place(str(root))
    sizes = place.sizes()
    if "train.index" not in sizes:
        found = ", ".join(sorted(sizes)[:8]) or "nothing"
        raise ValueError(
            f"data.root is {str(root)!r}, but there is no train.index (found: {found}); "
            "write shards: python -m detr_exp.shard data.root=FOLDER out=SHARDS"
        )
    opened = {name: _index(place, f"{name}.index", sizes) for name in SPLITS if f"{name}.index" in sizes}
    categories = [index.category_of(values) for values in opened["train"][0]["categories"]]
    read = {name: partial(_split, place, name, *found, categories, sizes) for name, found in opened.items()}
    return Content("shards", f"{place.root}/train.index", categories, read)


def _index(place: Place, name: str, sizes: dict[str, int]) -> tuple[Values, index.Columns]:
    try:
        found = index.opened(place.local(name, sizes[name]), KEY)
    except OSError as error:
        raise ValueError(f"{place.root}/{name} cannot be read ({error}); check the address and its rights") from error
    if found is None:
        raise DataError(
            f"{place.root}/{name} is damaged, or of another version; write it again, which keeps sound shards: "
            "python -m detr_exp.shard data.root=FOLDER out=SHARDS"
        )
    return found


def _split(
    place: Place, name: str, values: Values, columns: index.Columns, categories: list[Category], sizes: dict[str, int]
) -> ShardSplit:
    """A split whose shards are all there.

    Raises:
        DataError: names those that are lost or have another size.
    """
    problems = Problems(f"{place.root}/{name}.index")
    for one in values["shards"]:
        found = sizes.get(one["name"])
        if found != one["bytes"]:
            state = "is lost" if found is None else f"has {found} bytes instead of {one['bytes']}"
            problems.error(
                "shards that cannot be used; copy them again, or write them: python -m detr_exp.shard",
                f"{one['name']} {state}",
            )
    problems.report()
    own = {key: columns[key] for key in OWN}
    rest = {key: column for key, column in columns.items() if key not in (*OWN, "paths", "path_ends")}
    paths = Texts(columns["paths"], columns["path_ends"])
    table = TableSplit(paths, rest, categories, values["fingerprint"], values["account"])
    return ShardSplit(place, [one["name"] for one in values["shards"]], own, table)


class ShardSplit:
    """Images in shards with their annotations; see `content.Split`.

    Args:
        place: of the shards.
        names: of the shards.
        where: columns `[I]` of the images: `shard`, `offset`, `length`, `crc`.
        table: the annotations.
    """

    def __init__(self, place: Place, names: Sequence[str], where: index.Columns, table: TableSplit) -> None:
        self.place, self.names, self.where, self.table = place, list(names), dict(where), table
        self.has_masks, self.has_keypoints = table.has_masks, table.has_keypoints
        self.fingerprint = table.fingerprint
        self._coming: dict[int, Future[bytes]] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # threads belong to one process

    def __getstate__(self) -> Values:
        return {**vars(self), "_coming": {}, "_pool": None}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def image_ids(self) -> Sequence[int]:
        return self.table.image_ids

    @property
    def most_objects(self) -> int:
        return self.table.most_objects

    def name(self, index: int) -> str:
        return f"{self.names[int(self.where['shard'][index])]}/{self.table.name(index).rpartition('/')[2]}"

    def size(self, index: int) -> tuple[int, int]:
        return self.table.size(index)

    def objects(self, index: int) -> Objects:
        return self.table.objects(index)

    def flat(self) -> Flat:
        return self.table.flat()

    def truth(self) -> Values:
        return self.table.truth()

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        coming = self._coming.pop(index, None)
        try:
            content = self.content(index) if coming is None else coming.result()
            suffix = os.path.splitext(self.table.name(index))[1]
            return read_image(content, self.size(index), smallest, suffix=suffix, channels=self.table.channels)
        except ImageError as error:
            raise ImageError(f"{self.place.root}/{self.name(index)}: {error}") from None

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def content(self, index: int) -> bytes:
        """The file of an image.

        Raises:
            ImageError: its shard is lost or damaged.
        """
        name = self.names[int(self.where["shard"][index])]
        start, length = int(self.where["offset"][index]), int(self.where["length"][index])
        try:
            content = self.place.read(name, start, length)
        except OSError as error:
            raise ImageError(f"shard {name} cannot be read ({error}); copy it again") from error
        if len(content) != length or zlib.crc32(content) != int(self.where["crc"][index]):
            raise ImageError(f"shard {name} is damaged at byte {start}; copy it again, or write it: detr_exp.shard")
        return content

    def identity(self, index: int) -> str:
        values = (int(self.where[key][index]) for key in ("offset", "length", "crc"))
        return f"{self.place.root}/{self.name(index)} {' '.join(map(str, values))}"

    def ahead(self, indices: Sequence[int]) -> None:
        """Begin to read images from afar, which `image` then returns: their latencies pass at the same time."""
        if not self.place.is_remote:
            return
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool, self._coming = (os.getpid(), ThreadPoolExecutor(THREADS)), {}
        self._coming = {i: self._coming.get(i) or self._pool[1].submit(self.content, i) for i in indices}
