"""The only way to write a file that another command reads: to a temporary file, which is then renamed."""

from __future__ import annotations

import glob
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

DEVICES = (Path("/dev"), Path("/dev/fd"))  # `/dev/stdout` may be a file to which another process still writes
HEX = 12
LOCK = ".lock"  # in a folder that only one process at a time may use
SHOWN = 40  # characters of a file's name in that of its temporary file: the length of names is limited


def caches() -> Path:
    """The folder of this user's caches, as the XDG specification defines it; for a user without a home, which some
    containers have, one among the temporary files."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"


def write(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: at any time `path` is the complete old file or the complete new one, on disk.

    Links are followed. Other than regular files (`/dev/stdout`, a named pipe) are written directly.

    Args:
        path: in an existing folder.
        content: text (UTF-8), bytes, or a function that writes to an open file.

    Raises:
        ValueError: it cannot be written (read-only, disk full); the previous file is untouched.
    """
    if isinstance(content, str):
        content = content.encode()
    fill = content if callable(content) else lambda file: file.write(content)
    path = Path(path)
    home = Path(os.path.realpath(path))  # a link in a circle leads to no file and is replaced
    aside = home.with_name(f".{home.name[:SHOWN]}.{uuid.uuid4().hex[:HEX]}.part")
    try:
        if (path.exists() and not path.is_file()) or path.parent in DEVICES:
            with open(path, "wb") as file:
                fill(file)
            return
        with open(aside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, home)
        _keep_names(home.parent)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        kept = f"; the previous {path.name} is untouched" if path.exists() else ""
        # on a full disk torch reports a wrong position in its archive
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise ValueError(f"{path} could not be written ({reason}){kept}; free space or set hydra.run.dir") from error


def remove_left_overs(place: Path) -> None:
    """Delete temporary files of processes that were killed while writing; no other process may write there now.

    Args:
        place: a file that was to be written; or a folder whose lock is held, with its subfolders without a lock.
    """
    folders, name = [place.parent], glob.escape(place.name[:SHOWN])
    if place.is_dir():
        inside = [path for path in place.iterdir() if path.is_dir() and not (path / LOCK).exists()]
        folders, name = [place, *inside], "*"
    for folder in folders:
        for path in folder.glob(f".{name}.{'[0-9a-f]' * HEX}.part"):
            path.unlink(missing_ok=True)


def _keep_names(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that renamed files survive a power failure."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
