"""The running jobs as a table that is updated in place; only lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live as RichLive
from rich.markup import escape
from rich.table import Table

from detr_exp.terminal import duration, is_drawable, printable, say

END_OF_LOG = 4096  # bytes that are searched for the last line
MOST_SHOWN = 50


class Live:
    """Lines of events above a table of the running jobs."""

    def __enter__(self) -> Live:
        self.rich, self.updated = None, 0.0
        if is_drawable(sys.stdout):
            self.rich = RichLive(console=Console(), auto_refresh=False, transient=True)
            self.rich.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.rich is not None:
            self.rich.stop()

    def line(self, text: str) -> None:
        """Print a permanent line."""
        if self.rich is None:
            say(text)
        else:
            self.rich.console.print(escape(printable(text)), highlight=False)

    def show(self, running: Sequence[Any]) -> None:
        """Update the table, twice a second at most.

        Args:
            running: jobs with `number`, `place`, `shown`, `started` and `log`.
        """
        if self.rich is None or time.monotonic() - self.updated < 0.5:
            return
        self.updated = time.monotonic()
        table = Table(box=None, expand=True)
        for name, width in (("#", 4), ("where", 8), ("time", 7)):
            table.add_column(name, min_width=width, no_wrap=True)
        table.add_column("overrides", ratio=1, no_wrap=True)
        table.add_column("last line of its log", ratio=2, no_wrap=True)
        for run in running[:MOST_SHOWN]:
            seconds = duration(time.monotonic() - run.started)
            table.add_row(
                str(run.number), run.place, seconds, escape(printable(run.shown)), escape(printable(last_line(run.log)))
            )
        if len(running) > MOST_SHOWN:
            table.caption = f"and {len(running) - MOST_SHOWN} more"
        self.rich.update(table, refresh=True)


def last_line(log: Path) -> str:
    """The newest line of a file that is not empty."""
    with open(log, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - END_OF_LOG))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
