"""Standard streams that cannot end a command, whatever becomes of those who read them."""

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
    """Drops what cannot be written: its reader has left, its terminal was closed, its disk is full."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            while (written := super().write(data)) is None:  # somebody has made it non-blocking
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


def name_files_in_utf8() -> None:
    """Begin this process anew where its locale knows ASCII only (`LC_ALL=C PYTHONUTF8=0`): not so names."""
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", "ascii:backslashreplace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_open() -> None:
    """Make the standard streams of this process ones that never fail.

    A stream that was closed leads nowhere; its number would go to the next file that is opened, and what libraries
    print into that file. Characters that the reader's encoding does not have are written as escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (open for the life of the process)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else's, such as a notebook's
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
