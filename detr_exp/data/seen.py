"""What the reading of a data set has seen of the file system, to tell later whether it would see the same again."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from detr_exp.tensor_files import sha256_of
from detr_exp.values import Values

SETTLED = 2 * 10**9  # nanoseconds: a change within the coarsest time stamps of file systems leaves them as they are
_MISSING, _OTHER, _UNSETTLED = -1, -2, -3  # in place of a size: no such file; no regular file; changed just now
Stamp = tuple[int, int, int]  # size; times in nanoseconds at which content, and anything, changed


class Seen:
    """What one reading has seen. Every fact is recorded before what it stands for is read.

    The time at which anything of a file changed is the system's and cannot be set, so other content of the same size
    and with the old time of its content is noticed, too.
    """

    def __init__(self) -> None:
        self.plain: defaultdict[str, list[str]] = defaultdict(
            list
        )  # folder -> regular files in it, of which only their being there matters
        self.stamps: dict[str, Stamp] = {}
        self.contents: dict[str, tuple[Stamp, str]] = {}  # large file -> its stamp and SHA-256
        self.listings: dict[str, str] = {}  # folder -> digest of its entries
        self.targets: dict[str, str] = {}  # path -> with links followed

    def file(self, path: str | os.PathLike[str]) -> None:
        """A file that is to be read, or that does not exist."""
        if (name := os.fspath(path)) not in self.stamps and "\0" not in name:  # no file can have such a name
            self.stamps[name] = stamp_of(path)

    def facts(self) -> tuple[Values, np.ndarray]:
        """All that was seen, as values of JSON and `[n, 3]` int64."""
        values = {
            "plain": {folder: "/".join(names) for folder, names in self.plain.items() if names},
            "stamped": "\0".join(self.stamps),
            "contents": self.contents,
            "listings": self.listings,
            "targets": self.targets,
        }
        return values, np.array([*self.stamps.values()], np.int64).reshape(-1, 3)


def holds(facts: Values, stamps: np.ndarray) -> bool:
    """Whether a reading would see now what `Seen.facts` tells."""
    try:
        return (
            all(os.path.realpath(path) == real for path, real in facts["targets"].items())
            and all(_has_content(path, *wanted) for path, wanted in facts["contents"].items())
            and all(listing(path)[1] == wanted for path, wanted in facts["listings"].items())
            and all(_files(folder).issuperset(names.split("/")) for folder, names in facts["plain"].items())
            and _have_stamps(facts["stamped"].split("\0") if len(stamps) else (), stamps)
        )
    except OSError:
        return False


def listing(folder: str | os.PathLike[str]) -> tuple[list[os.DirEntry[str]], str]:
    """The entries of a folder by name, and a digest of their names and kinds.

    Raises:
        OSError: it cannot be read.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    digest = hashlib.sha256()
    for entry in entries:
        linked = entry.is_symlink()  # perhaps to itself
        kind = 2 * (os.path.isdir(entry) if linked else entry.is_dir()) + linked
        digest.update(f"{entry.name}\0{kind}\0".encode(errors="surrogatepass"))
    return entries, digest.hexdigest()


def _files(folder: str) -> set[str]:
    with os.scandir(folder) as found:
        return {entry.name for entry in found if entry.is_file(follow_symlinks=False)}


def _have_stamps(paths: Iterable[str], stamps: np.ndarray) -> bool:
    wanted = map(tuple, stamps.tolist())
    return all(now == then and now[0] != _UNSETTLED for now, then in zip(map(stamp_of, paths), wanted, strict=True))


def _has_content(path: str, stamp: Stamp, sha256: str) -> bool:
    """Whether a file has its old stamp, or at least its old content."""
    now = stamp_of(path)
    return (now == tuple(stamp) and now[0] >= 0) or (
        now[0] not in (_MISSING, _OTHER) and sha256_of(Path(path)) == sha256
    )


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """Size and times of a file, by which it is recognised as unchanged."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return _MISSING, 0, 0
    if not stat.S_ISREG(found.st_mode):
        return _OTHER, 0, 0
    if not found.st_ctime_ns < time.time_ns() - SETTLED:  # nor if the clock of a file server is ahead, or ours set back
        return _UNSETTLED, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
