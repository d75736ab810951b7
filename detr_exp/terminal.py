"""Text for terminals and logs, without secrets and without control sequences.

File names, class names and messages of other programs may contain escape sequences, which could clear the screen,
rename the window or hide text.
"""

from __future__ import annotations

import logging
import re
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
    """Print lines, and flush.

    Args:
        texts: one or more lines each.
        file: None: standard output.
    """
    print(*map(printable, texts), sep="\n", file=file, flush=True)


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
    warnings.formatwarning = lambda message, *where, **line: f"warning: {printable(message)}\n"
