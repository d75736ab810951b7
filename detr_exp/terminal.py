"""What reaches a terminal, a log or a reader of either: without secrets, and without what would steer the terminal.

File names, class names and messages of other programs come from outside; an escape sequence in one could clear the
screen, rename the window or hide what stands before it.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import TextIO

from detr_exp.streams import keep_open
from detr_exp.tracker.secrets import masked

# control characters but for tab and newline, marks that turn the direction of writing, halves of characters
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` without secrets, and with control characters as Python writes them (`\\x1b`)."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(masked(str(text))))


def say(*texts: object, file: TextIO | None = None) -> None:
    """Print lines at once.

    Args:
        texts: one or more lines each.
        file: standard output unless given.
    """
    print(*map(printable, texts), sep="\n", file=file, flush=True)


def guard_messages() -> None:
    """Have every warning and every record of every logger pass through `printable`, whoever wrote it.

    What cannot be written is dropped without a word: a log on a full disk is no reason to stop.
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
        except Exception:  # arguments that do not fit the message: logging says so itself
            return record
        return record

    guarded.is_guarded = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(guarded)
    warnings.formatwarning = lambda message, *where, **line: f"warning: {printable(message)}\n"
