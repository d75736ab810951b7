"""The ledger of a sweep: `sweep.jsonl` in its folder, one line for every run that ended.

The names of these modules begin with an underscore so that Hydra does not take them for plugins.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from detr_exp.locks import lock
from detr_exp.tracker.base import FINISHED
from detr_exp.tracker.jsonl import Reader
from detr_exp.tracker.secrets import masked

LEDGER = "sweep.jsonl"
BLOCK = 4096  # bytes that are searched at once for the end of a line
UNFINISHED = ("killed",)  # its state was saved; every other ending is a failure


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
        number: its index among the combinations.
        overrides: all overrides of its command line.
        swept: the overrides that differ between the runs.
        hash: of the swept overrides; the name of its folder ends with it.
    """

    number: int
    overrides: list[str]
    swept: list[str]
    hash: str


class Entry(NamedTuple):
    """One line of the ledger: how a run ended.

    Attributes:
        overrides: the swept overrides.
        status: `ok`, `pruned`, `oom`, `nan`, `failed` or `killed`.
        metric: the value that the run returned; None if nothing was evaluated or the run failed.
        seconds: duration since its last start.
        reason: why it failed or was pruned.
    """

    number: int
    overrides: list[str]
    hash: str
    status: str
    metric: float | None
    seconds: float
    reason: str | None


class Ledger:
    """Appends to and reads the ledger of a sweep folder; any process may, at any time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self.reader, self.known = Reader(self.path), list[Entry]()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Ledger, (self.path.parent,)  # what was read stays here

    def entries(self) -> Sequence[Entry]:
        """All lines, oldest first; a line truncated by a crash is ignored. Only new lines are read."""
        if not self.path.exists() or self.path.stat().st_size < self.reader.position:  # it was removed
            self.reader, self.known = Reader(self.path), []
        while True:
            lines, position = self.reader.peek()
            if position == self.reader.position:
                return self.known
            self.reader.position = position
            for line in lines:
                with contextlib.suppress(TypeError):  # of another version
                    self.known.append(Entry(**line))

    def latest(self) -> dict[str, Entry]:
        """The last line of every run, by hash."""
        return {entry.hash: entry for entry in self.entries()}

    def append(self, entry: Entry) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_name(".ledger.lock")), open(self.path, "ab") as file:
            file.truncate(end_of_lines(self.path))  # remove a line that a crash has truncated
            file.write(json.dumps(entry._asdict(), ensure_ascii=False).encode() + b"\n")

    def record(
        self, job: Job, started: float, status: str, metric: float | None = None, reason: str | None = None
    ) -> None:
        """Record the end of a job that was started at `started` of `time.monotonic()`."""
        seconds = round(time.monotonic() - started, 2)
        self.append(Entry(job.number, masked(job.swept), job.hash, status, metric, seconds, masked(reason)))


def end_of_lines(path: Path) -> int:
    """The position after the last complete line of a file."""
    with open(path, "rb") as file:
        position = file.seek(0, 2)
        while position:
            start = max(0, position - BLOCK)
            file.seek(start)
            if (found := file.read(position - start).rfind(b"\n")) >= 0:
                return start + found + 1
            position = start
    return 0


def judged(value: object) -> tuple[str, float | None, str | None]:
    """Status, metric and reason of a run from the value it returned."""
    if value is not None and not isinstance(value, int | float):
        return "failed", None, f"it returned {type(value).__name__} instead of a number"
    if value is not None and not math.isfinite(value):
        return "nan", None, f"its result is {value}"
    return "ok", None if value is None else float(value), None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, after its type where it is no error of this project."""
    kind = "" if type(error).__module__.startswith(("detr_exp", "hydra_plugins")) else type(error).__name__
    lines = str(error).strip().splitlines()[:1]
    return ": ".join(filter(None, [kind, *lines]))[:500]


def best_first(jobs: Sequence[Job], entries: Mapping[str, Entry]) -> list[tuple[Job, Entry | None]]:
    """Jobs with their ledger entries: finished ones by metric, then the others by number."""
    pairs = [(job, entries.get(job.hash)) for job in jobs]
    return sorted(pairs, key=lambda pair: (-score(pair[1]), pair[0].number))


def by_point(entries: Iterable[Entry], raced: bool = False) -> list[list[Entry]]:
    """Runs with a result that differ by their seed alone together, best mean first.

    Args:
        entries: the newest of every run.
        raced: points that fell behind were given fewer seeds, so that means compare only where there are equally many.

    Returns:
        points with their runs, best run first.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if math.isfinite(score(entry)):
            groups.setdefault(setting_of(entry), []).append(entry)
    ranked = [sorted(group, key=score, reverse=True) for group in groups.values()]
    return sorted(ranked, key=lambda group: (-len(group) * raced, -mean(map(score, group))))


def setting_of(entry: Entry) -> str:
    """The swept overrides but for the seed."""
    return " ".join(one for one in entry.overrides if not one.startswith("seed="))


def score(entry: Entry | None) -> float:
    """For ranking; minus infinity for a run that is not finished, or whose result is not finite."""
    if entry is None or entry.status not in FINISHED or entry.metric is None or not math.isfinite(entry.metric):
        return -math.inf
    return entry.metric
