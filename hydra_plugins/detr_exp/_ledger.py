"""The ledger of a sweep: `sweep.jsonl` in its folder, one line for every run that ended.

The names of these modules begin with an underscore so that Hydra does not take them for plugins.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from detr_exp.locks import lock
from detr_exp.tracker.jsonl import JsonLines
from detr_exp.tracker.secrets import masked

LEDGER = "sweep.jsonl"
FINISHED = ("ok", "pruned")
UNFINISHED = ("killed",)  # its state was saved; every other ending is a failure


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
        number: its index among the combinations.
        overrides: all overrides of its command line.
        swept: the overrides that differ between the runs.
        hash: of the swept overrides; the name of its folder.
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

    def entries(self) -> list[Entry]:
        """All lines, oldest first; a line truncated by a crash is ignored."""
        entries = []
        for line in JsonLines.read(self.path):
            with contextlib.suppress(TypeError):  # of another version
                entries.append(Entry(**line))
        return entries

    def latest(self) -> dict[str, Entry]:
        """The last line of every run, by hash."""
        return {entry.hash: entry for entry in self.entries()}

    def append(self, entry: Entry) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_name(".ledger.lock")), open(self.path, "ab") as file:
            whole = self.path.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)  # remove a line that a crash has truncated
            file.write(json.dumps(entry._asdict(), ensure_ascii=False).encode() + b"\n")

    def record(
        self, job: Job, started: float, status: str, metric: float | None = None, reason: str | None = None
    ) -> None:
        """Record the end of a job that was started at `started` of `time.monotonic()`."""
        seconds = round(time.monotonic() - started, 2)
        self.append(Entry(job.number, masked(job.swept), job.hash, status, metric, seconds, masked(reason)))


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


def score(entry: Entry | None) -> float:
    """For ranking; minus infinity for a run that is not finished, or whose result is not finite."""
    if entry is None or entry.status not in FINISHED or entry.metric is None or not math.isfinite(entry.metric):
        return -math.inf
    return entry.metric
