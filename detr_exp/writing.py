"""The one way in which a file that another command reads is written: aside, then renamed."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

DEVICES = (Path("/dev"), Path("/dev/fd"))  # `/dev/stdout` may be a file that somebody else goes on writing in
HEX = 12
LOCK = ".lock"  # in a folder that one process at a time works in
SHOWN = 40  # characters of a file's name in that of the file aside, which may not be longer than the system allows


def write(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at every instant what lies under `path` is the old file or the new one, whole and on disk.

    A link is followed. What is no regular file (`/dev/stdout`, a named pipe) is written to as it is.

    Args:
        path: in a folder that is there.
        content: text (UTF-8), bytes, or what writes them into an open file.

    Raises:
        ValueError: it cannot be written (read-only, disk full); the previous file is untouched.
    """
    if isinstance(content, str):
        content = content.encode()
    fill = content if callable(content) else lambda file: file.write(content)
    path = Path(path)
    home = path.resolve()
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
        # torch speaks of a wrong position in its archive where the disk was full
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise ValueError(f"{path} could not be written ({reason}){kept}; free space or set hydra.run.dir") from error


def remove_left_overs(place: Path) -> None:
    """Delete what processes that were killed while they wrote have left, where nobody else writes now.

    Args:
        place: a file that would have been written; or a folder that is held, with the folders in it that have no lock
            of their own.
    """
    folders, name = [place.parent], glob.escape(place.name[:SHOWN])
    if place.is_dir():
        inside = [path for path in place.iterdir() if path.is_dir() and not (path / LOCK).exists()]
        folders, name = [place, *inside], "*"
    for folder in folders:
        for path in folder.glob(f".{name}.{'[0-9a-f]' * HEX}.part"):
            path.unlink(missing_ok=True)


def _keep_names(folder: Path) -> None:
    """Have the system keep the names of a folder's files when the power goes."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
