"""Mistakes in a data set, gathered so that one pass reports all of them."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)
SHOWN = 20


class Problems:
    """What is wrong with one annotation file or folder.

    Errors end the reading in one `ValueError`; warnings are logged, each kind at most `SHOWN` times.

    Args:
        source: the file or folder that is being read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.errors: list[str] = []
        self.warnings: dict[str, list[str]] = {}

    def error(self, sentence: str) -> None:
        self.errors.append(sentence)

    def warn(self, kind: str, sentence: str) -> None:
        """`kind` names the sort of problem and what was done about it; `sentence` the case."""
        self.warnings.setdefault(kind, []).append(sentence)

    def report(self) -> None:
        """Log the warnings, then raise if there were errors."""
        for kind, cases in self.warnings.items():
            log.warning("%s: %s (%d): %s", self.source, kind, len(cases), _listed(cases, "; "))
        if self.errors:
            what = "1 problem" if len(self.errors) == 1 else f"{len(self.errors)} problems"
            raise ValueError(f"{self.source}: {what}:\n  " + _listed(self.errors, "\n  "))


def _listed(cases: list[str], separator: str) -> str:
    more = len(cases) - SHOWN
    return separator.join(cases[:SHOWN]) + (f"{separator}... and {more} more" if more > 0 else "")
