"""Collect the problems of a data set, so that one pass reports all of them."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)
SHOWN = 20
ON_ERROR = ("error", "skip")
_listeners: list[list[Problems]] = []


class Names(Protocol):
    """What messages call things, by their place."""

    def __getitem__(self, index: int, /) -> str: ...


class DataError(ValueError):
    """A file or folder that cannot be used; the message lists its problems."""


class Problems:
    """The problems of one annotation file or folder.

    A kind describes a sort of problem and how to fix it or how it was handled; a case names the annotation or line.
    Errors raise one `DataError` at the end; warnings and notes are logged at their levels. At most `SHOWN` cases of
    each kind are listed.

    Args:
        source: the file or folder that is being read.
        on_error: `error`, or `skip` to leave out images that cannot be read, with a warning.

    Raises:
        ValueError: another `on_error`.
    """

    def __init__(self, source: str, on_error: str = "error") -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error is {on_error!r}; use {' or '.join(ON_ERROR)}: data.on_error=error")
        self.source, self.skip = source, on_error == "skip"
        self.errors: dict[str, list[str]] = {}
        self.warnings: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}

    def error(self, kind: str, case: str) -> None:
        self.errors.setdefault(kind, []).append(case)

    def warn(self, kind: str, case: str) -> None:
        self.warnings.setdefault(kind, []).append(case)

    def note(self, kind: str, case: str) -> None:
        self.notes.setdefault(kind, []).append(case)

    def image(self, case: str) -> None:
        """Report an image that is missing or cannot be read: an error, or a warning with `skip`."""
        if self.skip:
            self.warn("images that cannot be read were left out, with their objects", case)
        else:
            self.error("images that cannot be read; fix or remove them, or skip them: data.on_error=skip", case)

    def report(self) -> None:
        """Log warnings and notes, then raise if there were errors."""
        for listener in _listeners:
            listener.append(self)
        if not _listeners:
            for level, kinds_of_it in ((logging.WARNING, self.warnings), (logging.INFO, self.notes)):
                for kind, cases in kinds_of_it.items():
                    log.log(level, "%s: %s (%d): %s", self.source, kind, len(cases), listed(cases, "; "))
        if self.errors:
            count = sum(map(len, self.errors.values()))
            what = "1 problem" if count == 1 else f"{count} problems"
            kinds = [
                f"\n  {kind} ({len(cases)}):\n    " + listed(cases, "\n    ") for kind, cases in self.errors.items()
            ]
            raise DataError(f"{self.source}: {what}:" + "".join(kinds))


@contextmanager
def collected() -> Iterator[list[Problems]]:
    """Collects everything reported inside the block, errors included; warnings are not logged."""
    found: list[Problems] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def listed(cases: list[str], separator: str) -> str:
    """The first cases, and the number of the others."""
    more = len(cases) - SHOWN
    return separator.join(cases[:SHOWN]) + (f"{separator}... and {more} more" if more > 0 else "")


def short(value: object, limit: int = 120) -> str:
    """A value for a message: escaped, on one line, shortened."""
    text = reprlib.repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
