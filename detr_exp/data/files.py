"""Paths named in annotation files: inside the data set's folder, there, and regular files."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Sequence
from pathlib import Path


class Folder:
    """A data set's folder, and which other folders its files may lie in.

    Args:
        root: the folder.
        extra_roots: folders that links and paths may lead to besides it.

    Raises:
        ValueError: the folder is not there.
    """

    def __init__(self, root: str | os.PathLike[str] | None, extra_roots: Sequence[str] = ()) -> None:
        if not root:
            raise ValueError("data.root is not set; give the folder of the data set: data.root=/path/to/data")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"data.root is {str(root)!r}, which is not a folder; give an existing one: data.root=...")
        self.allowed = [
            Path(os.path.realpath(path)) for path in (self.root, *(Path(e).expanduser() for e in extra_roots))
        ]
        self._inside: dict[str, bool] = {}

    def inside(self, path: Path) -> bool:
        """Whether `path`, links followed, lies in the folder or an extra one."""
        real = os.path.realpath(path)
        return any(os.path.commonpath((real, root)) == str(root) for root in self.allowed)

    def complaint(self, path: Path) -> str | None:
        """Why `path` cannot be read as a file of this data set; None if it can."""
        parent = str(path.parent)
        try:
            mode = os.lstat(path).st_mode
            linked = stat.S_ISLNK(mode)
            mode = os.stat(path).st_mode if linked else mode
            if parent not in self._inside:
                self._inside[parent] = self.inside(path.parent)
        except (OSError, ValueError):
            return f"{str(path)!r:.400} does not exist"
        if not self._inside[parent] or (linked and not self.inside(path)):
            return (
                f"{str(path)!r} lies outside data.root ({os.path.realpath(path)}); allow its folder with "
                "data.source.extra_roots=[...]"
            )
        return None if stat.S_ISREG(mode) else f"{str(path)!r} is not a regular file"

    def names(self, limit: int = 12) -> str:
        """What lies in the folder, for messages."""
        found = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in self.root.iterdir())
        return ", ".join(found[:limit]) + (f", ... ({len(found)} entries)" if len(found) > limit else "") or "nothing"


def decoded(data: bytes, path: Path) -> str:
    """UTF-8 text, or UTF-16 where a mark says so.

    Raises:
        ValueError: it is neither.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
