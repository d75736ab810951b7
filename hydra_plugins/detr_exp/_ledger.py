"""What is known of a sweep's runs: `sweep.jsonl` in its folder, one line for every run that ended.

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

from detr_exp.tracker.jsonl import JsonLines
from detr_exp.tracker.secrets import masked

LEDGER = "sweep.jsonl"
FINISHED = ("ok", "pruned")
UNFINISHED = ("killed",)  # its state was saved; every other ending is a failure


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
        number: its place in the order of the combinations.
        overrides: all words of its command line.
        swept: those that differ between the runs.
        hash: of the swept words; the name of its folder.
    """

    number: int
    overrides: list[str]
    swept: list[str]
    hash: str


class Entry(NamedTuple):
    """One line of the ledger: how a run ended.

    Attributes:
        overrides: the swept words.
        status: `ok`, `pruned`, `oom`, `nan`, `failed` or `killed`.
        metric: what the run returned; None if nothing was evaluated or the run failed.
        seconds: how long it took this time.
        reason: why it failed or was given up.
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
        """All lines, oldest first; one that a crash has cut off is left out."""
        found = []
        for line in JsonLines.read(self.path):
            with contextlib.suppress(TypeError):  # of another version
                found.append(Entry(**line))
        return found

    def latest(self) -> dict[str, Entry]:
        """The last line of every run, by hash."""
        return {entry.hash: entry for entry in self.entries()}

    def append(self, entry: Entry) -> None:
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(".ledger.lock")), open(self.path, "ab") as file:
            whole = self.path.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)  # a line that a crash has cut off
            file.write(json.dumps(entry._asdict(), ensure_ascii=False).encode() + b"\n")

    def record(
        self, job: Job, started: float, status: str, metric: float | None = None, reason: str | None = None
    ) -> None:
        """Write down how a job ended that was started at `started` of `time.monotonic()`."""
        seconds = round(time.monotonic() - started, 2)
        self.append(Entry(job.number, masked(job.swept), job.hash, status, metric, seconds, masked(reason)))


def judged(value: object) -> tuple[str, float | None, str | None]:
    """Status, metric and reason of a run by what it returned."""
    if value is not None and not isinstance(value, int | float):
        return "failed", None, f"it returned {type(value).__name__} instead of a number"
    if value is not None and not math.isfinite(value):
        return "nan", None, f"its result is {value}"
    return "ok", None if value is None else float(value), None


def first_line(error: BaseException) -> str:
    """What an error says, and its kind where it is not one of ours."""
    kind = "" if type(error).__module__.startswith(("detr_exp", "hydra_plugins")) else type(error).__name__
    lines = str(error).strip().splitlines()[:1]
    return ": ".join(filter(None, [kind, *lines]))[:500]


def best_first(jobs: Sequence[Job], entries: Mapping[str, Entry]) -> list[tuple[Job, Entry | None]]:
    """Jobs with what the ledger knows of them: finished ones by their metric, then the others by number."""
    found = [(job, entries.get(job.hash)) for job in jobs]
    return sorted(found, key=lambda pair: (-score(pair[1]), pair[0].number))


def score(entry: Entry | None) -> float:
    """For ranking; minus infinity for a run that was not finished, or whose result is no finite number."""
    if entry is None or entry.status not in FINISHED or entry.metric is None or not math.isfinite(entry.metric):
        return -math.inf
    return entry.metric
