"""Text for terminals and logs, without secrets and without control sequences.

File names, class names and messages of other programs may contain escape sequences, which could clear the screen,
rename the window or hide text.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from typing import TextIO

from detr_exp.streams import keep_open
from detr_exp.tracker.secrets import masked

# control characters except tab and newline, marks that change the text direction, surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` without secrets, and with control characters as Python writes them (`\\x1b`)."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(masked(str(text))))


def say(*texts: object, file: TextIO | None = None) -> None:
    """Print lines, and flush; long sentences are wrapped at words on a terminal.

    Args:
        texts: one or more lines each.
        file: None: standard output.
    """
    file = sys.stdout if file is None else file
    print(*(wrapped(printable(text), file) for text in texts), sep="\n", file=file, flush=True)


def wrapped(text: str, file: TextIO) -> str:
    """`text` for a file: on a terminal, lines that are longer than it is wide are broken between words.

    Indented lines are rows of tables, paths and commands, which are copied, and stay whole; items of lists ("- ...") do
    not.
    """
    columns = width_of(file)
    if columns is None:
        return text
    return "\n".join(
        textwrap.fill(line, columns, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        if len(line) > columns and (line[:1] != " " or line.lstrip().startswith("- "))
        else line
        for line in text.split("\n")
    )


def width_of(file: TextIO | None) -> int | None:
    """Columns of a terminal; None for any other file, whose lines may have any length."""
    return shutil.get_terminal_size().columns if is_terminal(file) else None


def is_terminal(file: TextIO | None) -> bool:
    """Whether somebody reads `file` on a screen."""
    return file is not None and file.isatty()


def is_drawable(file: TextIO | None) -> bool:
    """Whether `file` is a terminal that can move its cursor, as progress bars need."""
    return is_terminal(file) and os.environ.get("TERM", "") not in ("dumb", "unknown")


def python() -> str:
    """The word that starts this Python, with its packages, in the user's shell."""
    found = shutil.which("python")
    return "python" if found is not None and os.path.abspath(found) == sys.executable else sys.executable


def counted(number: float, noun: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """`8.2 s`, `3:05` or `2:10:33`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class ConsoleHandler(logging.Handler):
    """Prints records on what is standard error at that time: a progress bar replaces it while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def guard_messages() -> None:
    """Pass all warnings and all records of all loggers through `printable`.

    Records that cannot be written are dropped silently: a log on a full disk must not stop a run.
    """
    keep_open()
    logging.raiseExceptions = False
    make = logging.getLogRecordFactory()
    if getattr(make, "is_guarded", False):
        return

    def guarded(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            record.msg, record.args = printable(record.getMessage()), ()
        except Exception:  # arguments that do not fit the message, which logging reports itself
            return record
        return record

    guarded.is_guarded = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(guarded)
    warnings.formatwarning = lambda message, *where, **line: (
        wrapped(f"warning: {printable(message)}", sys.stderr) + "\n"
    )
