"""Output on the terminal while a run trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from detr_exp.terminal import say

BARS = ("rich", "tqdm", "none")


class Meter(Protocol):
    """Counts steps, and shows a short status text next to the count."""

    def __call__(self, status: str = "", advance: int = 1) -> None: ...


class Console:
    """Progress bars and tables on a terminal, plain lines elsewhere.

    Args:
        progress_bar: `rich`, `tqdm` or `none`; true means `rich`, false and null mean `none`.
        is_enabled: whether to print; false on ranks other than the first.

    Raises:
        ValueError: for another value.
    """

    def __init__(self, progress_bar: str | bool | None, is_enabled: bool = True) -> None:
        name = {True: "rich", False: "none", None: "none"}.get(progress_bar, progress_bar)  # type: ignore[arg-type]
        if name not in BARS:
            raise ValueError(f"trainer.progress_bar is {progress_bar!r}; use {', '.join(BARS)}, true or false")
        self.is_enabled = is_enabled
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.bar = name if self.terminal else "none"

    def line(self, text: str) -> None:
        if self.is_enabled:
            say(text)

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """A title and aligned `name  value` lines."""
        width = max(len(name) for name in rows)
        self.line(f"\n{title}")
        for name, value in rows.items():
            self.line(f"  {name:<{width}}  {value}")
        self.line("")

    def metrics(self, title: str, columns: Mapping[str, float]) -> None:
        """One evaluation as a table of AP values in 0..1 (a plain line if the output is not a terminal)."""
        if not self.is_enabled:
            return
        shown = {name: "-" if value < 0 else f"{value:.3f}" for name, value in columns.items()}
        if not self.terminal:
            self.line(f"{title}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))
            return
        from rich.console import Console as Rich
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold")
        for name in shown:
            table.add_column(name, justify="right")
        table.add_row(*shown.values())
        Rich().print(table)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Meter]:
        """A progress bar with the remaining time; without a terminal, a line at most every 30 seconds."""
        if not self.is_enabled:
            yield _LineMeter(title, total, quiet=True)
        elif self.bar == "rich":
            with _rich_bar(title, total) as meter:
                yield meter
        elif self.bar == "tqdm":
            with _tqdm_bar(title, total) as meter:
                yield meter
        else:
            yield _LineMeter(title, total, quiet=self.terminal)


class _LineMeter:
    def __init__(self, title: str, total: int, quiet: bool) -> None:
        self.title, self.total, self.quiet = title, total, quiet
        self.done, self.started = 0, time.monotonic()
        self.last_printed = self.started

    def __call__(self, status: str = "", advance: int = 1) -> None:
        self.done += advance
        now = time.monotonic()
        if self.quiet or now - self.last_printed < 30:
            return
        self.last_printed = now
        left = (now - self.started) / max(self.done, 1) * (self.total - self.done)
        say(f"{self.title}  {self.done}/{self.total}  {status}  {left:.0f} s left")


@contextmanager
def _rich_bar(title: str, total: int) -> Iterator[Meter]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(title, total=total, status="")

        def meter(status: str = "", advance: int = 1) -> None:
            progress.update(task, advance=advance)
            if status:
                progress.update(task, status=status)

        yield meter


@contextmanager
def _tqdm_bar(title: str, total: int) -> Iterator[Meter]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise ValueError(
            "trainer.progress_bar is tqdm, which is not installed; pip install tqdm or set trainer.progress_bar=rich"
        ) from None
    with tqdm(total=total, desc=title, leave=False) as bar:

        def meter(status: str = "", advance: int = 1) -> None:
            if status:
                bar.set_postfix_str(status, refresh=False)
            bar.update(advance)

        yield meter
