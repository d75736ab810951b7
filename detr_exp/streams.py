"""Standard streams whose failures cannot end a command."""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Lenient(io.FileIO):
    """Drops output that cannot be written: the reader has ended, the terminal was closed, the disk is full."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            while (written := super().write(data)) is None:  # another process has made it non-blocking
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


def name_files_in_utf8() -> None:
    """Restart this process in UTF-8 mode where its locale has ASCII only (`LC_ALL=C PYTHONUTF8=0`), for file names."""
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", "ascii:backslashreplace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_open() -> None:
    """Replace the standard streams of this process by ones that never fail.

    A closed stream is replaced by the null device; else the next opened file would get its number, and libraries would
    print into that file. Characters that the encoding does not have are written as escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (open for the life of the process)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # replaced by another program, such as a notebook
        with suppress(OSError, AttributeError):
            stream.flush()
        lenient = io.TextIOWrapper(
            io.BufferedWriter(_Lenient(number, "wb", closefd=False)),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=name == "stderr" or getattr(stream, "line_buffering", False),
            write_through=getattr(stream, "write_through", False),
        )
        setattr(sys, name, lenient)
