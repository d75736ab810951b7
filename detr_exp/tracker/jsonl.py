"""Files of JSON lines for metrics, which stay readable after a crash."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import SupportsFloat

from detr_exp.values import Values
from detr_exp.writing import write

CHUNK = 1 << 15  # a view sends some thousand numbers at once; at the end of a run the wait time counts per piece

logger = logging.getLogger("detr_exp.tracker")


class JsonLines:
    """Appends JSON objects to a file, each with its `step`, each is passed to the operating system immediately.

    A line costs about 20 microseconds. An incomplete last line, left by a crash, is removed when the file is reopened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = _keep(path, _is_whole) if path.exists() else 0
        self.file = open(path, "ab")  # noqa: SIM115  (open for the life of the run)

    @staticmethod
    def read(path: Path) -> list[Values]:
        """All complete lines of a file, none if it does not exist; unreadable lines are skipped with a warning."""
        return _parsed(path.read_bytes() if path.exists() else b"", path)

    def append(self, step: int, values: Values) -> None:
        """Write one line; numbers that JSON does not know (NaN, infinities) become null."""
        line = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self.file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self.file.flush()
        self.count += 1

    def rewind(self, step: int, count: int | None = None) -> None:
        """Delete all lines after `step`, and all after the first `count`."""
        self.file.close()
        self.count = _keep(self.path, lambda line: _object(line).get("step", math.inf) <= step, count)
        self.file = open(self.path, "ab")  # noqa: SIM115

    def close(self) -> None:
        self.file.close()


class Reader:
    """Reads a growing file of JSON lines piece by piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def peek(self) -> tuple[list[Values], int]:
        """The next complete lines, and the position to set after they are processed."""
        if not self.path.exists():
            return [], self.position
        with open(self.path, "rb") as file:
            file.seek(self.position)
            data = file.read(CHUNK)
            if b"\n" not in data:
                data += file.readline()
        data = data[: data.rfind(b"\n") + 1]
        return _parsed(data, self.path), self.position + len(data)


def _plain(value: SupportsFloat | str | None) -> float | str | None:
    if isinstance(value, str | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n")


def _object(line: bytes) -> Values:
    """The JSON object of a line; empty if the line is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _parsed(data: bytes, path: Path) -> list[Values]:
    lines = list(filter(_is_whole, data.splitlines(keepends=True)))
    found = list(filter(None, map(_object, lines)))
    if len(found) < len(lines):
        logger.warning("%s: %d of %d lines cannot be read and are skipped", path, len(lines) - len(found), len(lines))
    return found


def _keep(path: Path, keep: Callable[[bytes], bool], most: int | None = None) -> int:
    """Replace a file atomically by the lines to keep among its first `most` lines; returns their number."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines[:most] if keep(line)]
    if len(kept) < len(lines):
        write(path, b"".join(kept))
    return len(kept)
