"""What a run says about itself, and what a view of it can do."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from detr_exp.values import Values
from detr_exp.writing import write

RECORD = "run.json"

# A loader worker that is forked while another thread is in the middle of an import inherits that module's lock, held
# for ever. Views import their packages under this lock, and forks wait for it.
IMPORT_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=IMPORT_LOCK.acquire, after_in_parent=IMPORT_LOCK.release, after_in_child=IMPORT_LOCK.release
    )


@dataclass
class RunRecord:
    """Description of a run, kept as `run.json` in its folder from the start.

    Attributes:
        id: drawn once; a run that is resumed keeps it, and views find their copy of the run by it.
        project: what the run belongs to.
        name: for people.
        views: settings of the views, enough to open them again later.
        tags: chosen options, code, data, versions; words to filter by.
        params: values to compare runs by.
        words: of the command line, without secrets.
        parent: id of the sweep's own run in the MLflow store, or None.
        status: `running`, then `ok`, `pruned`, `oom`, `nan`, `failed` or `killed`.
        message: why it ended as it did, or None.
        seconds: spent so far, without those of a process that was killed outright.
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
        """Raises: ValueError when `folder` is no run folder."""
        path = folder / RECORD
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
            if wrong := [name for name, kind in KINDS.items() if not isinstance(getattr(record, name), kind)]:
                raise TypeError(f"{', '.join(wrong)} are no such values as a run has")
            if not all(
                isinstance(text, str) for text in (*record.tags.values(), *record.params.values(), *record.words)
            ):
                raise TypeError("tags, params and words are texts")
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
    """A view says that it cannot take the run, now or later."""


class View(Protocol):
    """A copy of the run somewhere else. Only the tracker's thread calls it; it may be slow and it may raise.

    After an exception the same call comes again later, so every call must be able to repeat what it has done in part;
    after a `RefusedError` none does.
    """

    def open(self, folder: Path, record: RunRecord) -> None:
        """Start the copy of the run, or go on with the one that has this record's id."""

    def metrics(self, lines: list[Values]) -> None:
        """Take lines of `metrics.jsonl`."""

    def artifact(self, path: Path) -> None:
        """Take a file."""

    def image(self, path: Path, name: str, step: int) -> None:
        """Take a picture of the series `name`."""

    def model(self, path: Path, name: str) -> None:
        """Take a checkpoint as a version of the registered model `name`."""

    def close(self, record: RunRecord) -> None:
        """End the copy of the run with the record's status."""
