"""The record of a run, and the interface of views."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from detr_exp.values import Values, measured
from detr_exp.writing import write

RECORD = "run.json"
FINISHED = ("ok", "pruned")  # statuses of runs with a result
NOT_METRICS = ("step", "time/unix")
NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?(e[+-]?\d{1,2})?")
SLOWEST = 1 << 20  # bytes per second of an upload, below which it counts as stuck

# A loader worker that is forked while another thread imports a module inherits the lock of that module, which is then
# never released. Views import their packages under this lock, and forks wait for it.
IMPORT_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=IMPORT_LOCK.acquire, after_in_parent=IMPORT_LOCK.release, after_in_child=IMPORT_LOCK.release
    )


def metrics_of(line: Values) -> Values:
    """What a line of `metrics.jsonl` has for views, without step, time, and what could not be measured."""
    return {name: value for name, value in measured(line).items() if name not in NOT_METRICS}


def number_in(text: str) -> float | str:
    """A parameter as a number where it is one: charts order numbers, and not their texts."""
    return json.loads(text) if NUMBER.fullmatch(text) else text


@dataclass
class RunRecord:
    """Description of a run, saved as `run.json` in its folder from the start.

    Attributes:
        id: random; a resumed run has the same id, and views find their copy of the run by it.
        project: name of the project.
        name: name of the run for display.
        views: settings of the views, sufficient to open them again later.
        tags: chosen options, code, data, versions; for filtering.
        params: values for comparing runs.
        words: overrides of the command line, without secrets.
        parent: id of the parent run of a sweep in the MLflow store, or None.
        status: `running`, then `ok`, `pruned`, `oom`, `nan`, `failed` or `killed`.
        message: why it ended as it did, or None.
        seconds: run time so far, without processes that were killed by SIGKILL.
    """

    id: str
    project: str
    name: str
    views: Values = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    parent: str | None = None
    status: str = "running"
    message: str | None = None
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        write(folder / RECORD, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Raises: ValueError when `folder` is not a run folder."""
        path = folder / RECORD
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
            if wrong := [name for name, kind in KINDS.items() if not isinstance(getattr(record, name), kind)]:
                raise TypeError(f"{', '.join(wrong)} have the wrong type")
            if not all(
                isinstance(text, str) for text in (*record.tags.values(), *record.params.values(), *record.words)
            ):
                raise TypeError("tags, params and words must be strings")
            return record
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give the folder of a run: run=outputs/...") from error


KINDS: Values = {
    "id": str,
    "project": str,
    "name": str,
    "views": dict,
    "tags": dict,
    "params": dict,
    "words": list,
}
KINDS |= {"status": str, "seconds": (int, float)}


class RefusedError(ValueError):
    """A view cannot store the run, now or later."""


class View(Protocol):
    """A copy of the run in another place. Only the thread of the tracker calls it; it may be slow and it may raise.

    After an exception the same call is repeated later, so every call must be repeatable even if it was partly done;
    after a `RefusedError` there are no more calls.
    """

    def open(self, folder: Path, record: RunRecord) -> None:
        """Start the copy of the run, or continue the existing copy with this id."""

    def metrics(self, lines: list[Values]) -> None:
        """Add lines of `metrics.jsonl`."""

    def artifact(self, path: Path) -> None:
        """Add a file."""

    def image(self, path: Path, name: str, step: int) -> None:
        """Add an image of the series `name`."""

    def model(self, path: Path, name: str) -> None:
        """Add a checkpoint as a version of the registered model `name`."""

    def close(self, record: RunRecord) -> None:
        """End the copy of the run with the status of the record."""
