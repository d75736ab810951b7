"""Output on the terminal while a run trains."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Protocol

from rich.cells import cell_len

from detr_exp.terminal import duration, is_drawable, is_terminal, say, width_of
from detr_exp.trainer.notebook import Line, is_notebook
from detr_exp.values import Values

BARS = ("rich", "tqdm", "none")
REDRAWN = 0.2  # seconds between two status texts
PRINTED = 30.0  # seconds between two lines without a terminal
WIDE = 120  # columns from which a bar has its full length

LONGEST_NAME = 32
CLASS_COLUMNS = {  # keys of a class's row, and their titles
    "objects": "objects",
    "AP": "AP",
    "AP50": "AP50",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "threshold": "threshold",
}

ABSENT = -1.0  # what COCO's metrics give for sizes and classes that do not occur

Status = Callable[[], Sequence[str]]


class Meter(Protocol):
    """Counts steps, and shows a status next to the count: texts, the most important first, called for when drawn."""

    def __call__(self, status: Status | None = None, advance: int = 1) -> None: ...


class Console:
    """Progress bars on a terminal, a line that changes in a notebook, plain lines elsewhere.

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
        self.is_quiet = name == "none" and is_terminal(sys.stdout)  # elsewhere lines show that it is alive
        self.bar = name if is_drawable(sys.stdout) else "none"
        self.notebook = Line() if name != "none" and is_notebook() else None

    def line(self, text: str) -> None:
        if self.is_enabled:
            say(text)

    def fields(self, title: str, fields: Sequence[str]) -> None:
        """A line of short texts, which stay whole."""
        self.line(in_lines(title, fields))

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """A title and aligned `name  value` lines."""
        self.line(f"\n{title}")
        self.table([[name, value] for name, value in rows.items()], left=2)

    def table(self, rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """Indented rows with aligned cells, and an empty line; the first `left` columns are aligned to the left."""
        widths = [max(map(cell_len, column)) for column in zip(*rows)]
        for row in rows:
            blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths)]
            cells = [cell + blank if k < left else blank + cell for k, (cell, blank) in enumerate(zip(row, blanks))]
            self.line("  " + "  ".join(cells).rstrip())
        self.line("")

    def metrics(self, title: str, values: Mapping[str, float]) -> None:
        """The values of one evaluation in a line."""
        self.fields(title, metric_fields(values))

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Meter]:
        """A progress bar, or a notebook's line, with the remaining time; elsewhere a line at most every 30 seconds."""
        if not self.is_enabled:
            yield _LineMeter(title, total, every=math.inf)
        elif self.bar == "rich":
            with _rich_bar(title, total) as meter:
                yield meter
        elif self.bar == "tqdm":
            with _tqdm_bar(title, total) as meter:
                yield meter
        elif self.notebook is not None:
            line = _LineMeter(title, total, every=REDRAWN, show=self.notebook.show)
            yield line
            line.show_status(None)
        else:
            yield _LineMeter(title, total, every=math.inf if self.is_quiet else PRINTED)


def in_lines(title: str, fields: Sequence[str]) -> str:
    """A line of short texts; on a terminal that is too narrow, several lines, broken between them."""
    width = width_of(sys.stdout)
    lines = [title]
    for field in fields:
        longer = f"{lines[-1]}  {field}"
        if width is not None and cell_len(longer) > width:
            lines.append(f"    {field}")
        else:
            lines[-1] = longer
    return "\n".join(lines)


def metric_fields(values: Mapping[str, float]) -> list[str]:
    """`name value` of metrics in 0..1; a dash for one that has no value, such as the AP of sizes that do not occur."""
    return [f"{name} {number(value)}" for name, value in values.items()]


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or value == ABSENT else f"{value:.{digits}f}"


def class_table(kind: str, rows: Sequence[Values]) -> list[list[str]]:
    """A head and a row per class that has objects: AP, and the threshold with its best F1.

    Args:
        kind: of the evaluation: `bbox`, `segm` or `keypoints`.
        rows: of a metric; see `protocols.PerClass`.
    """
    columns = [name for name in CLASS_COLUMNS if rows and name in rows[0]]
    return [
        [kind, *(CLASS_COLUMNS[name] for name in columns)],
        *(
            [short(row["class"]), *(str(row[name]) if name == "objects" else number(row[name]) for name in columns)]
            for row in rows
            if row["objects"]
        ),
    ]


def short(name: str) -> str:
    """A name for a column."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


class _LineMeter:
    def __init__(self, title: str, total: int, every: float, show: Callable[[str], object] = say) -> None:
        self.title, self.total, self.every, self.show = title, total, every, show
        self.done, self.started = 0, time.monotonic()
        self.shown_at = self.started

    def __call__(self, status: Status | None = None, advance: int = 1) -> None:
        self.done += advance
        if time.monotonic() - self.shown_at >= self.every:
            self.shown_at = time.monotonic()
            self.show_status(status)

    def show_status(self, status: Status | None) -> None:
        shown = [_left(self.started, self.done, self.total)] if status is None else status()
        self.show(in_lines(f"{self.title}  {self.done}/{self.total or '?'}", shown))


def _left(started: float, done: int, total: int) -> str:
    """How long the rest takes at the pace so far; without a known end the pace."""
    if not total:
        return f"{done / max(1e-9, time.monotonic() - started):.1f} a second"
    return f"{duration((time.monotonic() - started) / max(1, done) * (total - done))} left"


def _that_fit(texts: Sequence[str], room: int) -> str:
    """The first texts, as many as have room; a longer line would make the bar unreadable."""
    shown = ""
    for text in texts:
        longer = f"{shown}  {text}" if shown else text
        if cell_len(longer) > room:
            break
        shown = longer
    return shown


@contextmanager
def _rich_bar(title: str, total: int) -> Iterator[Meter]:
    from rich.console import Console as Rich
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Rich()
    length = 28 if console.width >= WIDE else 10
    room = console.width - cell_len(title) - length - 2 * len(str(total)) - 5
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=length),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    started = shown_at = time.monotonic()
    # a log that standard error is sent to keeps its lines
    with Progress(*columns, console=console, transient=True, redirect_stderr=is_terminal(sys.stderr)) as progress:
        task = progress.add_task(title, total=total or None, status="")

        def meter(status: Status | None = None, advance: int = 1) -> None:
            nonlocal shown_at
            progress.update(task, advance=advance)
            if time.monotonic() - shown_at >= REDRAWN:
                shown_at = time.monotonic()
                done = round(progress.tasks[task].completed)
                shown = [_left(started, done, total)] if status is None else status()
                progress.update(task, status=_that_fit(shown, room))

        yield meter


@contextmanager
def _tqdm_bar(title: str, total: int) -> Iterator[Meter]:
    try:
        from tqdm import tqdm
        from tqdm.contrib import DummyTqdmFile
    except ModuleNotFoundError:
        raise ValueError(
            "trainer.progress_bar is tqdm, which is not installed; pip install tqdm or set trainer.progress_bar=rich"
        ) from None
    shown_at, screen = time.monotonic(), sys.stderr
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if is_terminal(stream):  # lines are printed above the bar, as rich does
                stack.enter_context(redirect(DummyTqdmFile(stream)))
        bar = stack.enter_context(tqdm(total=total or None, desc=title, leave=False, dynamic_ncols=True, file=screen))

        def meter(status: Status | None = None, advance: int = 1) -> None:
            nonlocal shown_at
            if status is not None and time.monotonic() - shown_at >= REDRAWN:
                shown_at = time.monotonic()
                bar.set_postfix_str("  ".join(status()), refresh=False)
            bar.update(advance)

        yield meter
