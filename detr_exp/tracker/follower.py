"""The thread that copies what a run folder holds into the views, and never disturbs the training.

There is no queue: the files are the queue. The thread remembers how far each view has come, reads on from there, and
sends; what a view refuses stays where it is and is sent again later.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from detr_exp.tracker.base import RunRecord, View
from detr_exp.tracker.jsonl import Reader
from detr_exp.tracker.secrets import masked

METRICS = "metrics.jsonl"
ARTIFACTS = "artifacts.jsonl"
FAILURES_BEFORE_NOTE = 3
PAUSE, CLOSING_PAUSE, LONGEST_PAUSE = 5.0, 1.0, 300.0

logger = logging.getLogger("detr_exp.tracker")


class Tail:
    """One view, and how far it has come.

    Args:
        view: where to copy to.
        folder: the run folder.
        record: of the run.
        pause: seconds to wait after a failure; doubled with every further one.
    """

    def __init__(self, view: View, folder: Path, record: RunRecord, pause: float = PAUSE) -> None:
        self.view, self.folder, self.record = view, folder, record
        self.metrics, self.artifacts = Reader(folder / METRICS), Reader(folder / ARTIFACTS)
        self.pause = pause
        self.failures = 0
        self.not_before = 0.0
        self.opened = self.closed = False

    def advance(self, closing: bool = False) -> None:
        """Send what is there, and end the run if it is `closing`; after a failure nothing is sent for a while."""
        if self.closed or time.monotonic() < self.not_before:
            return
        try:
            self._send()
            if closing:
                self.view.close(self.record)
                self.closed = True
        except Exception as error:  # whatever a view does, training goes on
            self.failures += 1
            self.not_before = time.monotonic() + min(self.pause * 2.0 ** (self.failures - 1), LONGEST_PAUSE)
            if self.failures == FAILURES_BEFORE_NOTE:
                logger.warning(
                    "%s cannot be reached (%s); training goes on, %s holds everything and is sent again at the end",
                    type(self.view).__name__,
                    masked(str(error)).splitlines()[0][:300] if str(error) else type(error).__name__,
                    self.folder / METRICS,
                )
        else:
            self.failures = 0

    def _send(self) -> None:
        if not self.opened:
            self.view.open(self.folder, self.record)
            self.opened = True
        while True:
            lines, position = self.metrics.peek()
            if not lines:
                break
            self.view.metrics(lines)
            self.metrics.position = position
        while True:
            entries, position = self.artifacts.peek()
            if not entries:
                break
            for entry in entries:
                path = self.folder / entry["path"]
                if not path.exists():
                    continue
                if "image" in entry:
                    self.view.image(path, entry["image"], entry["step"])
                elif "model" in entry:
                    self.view.model(path, entry["model"])
                else:
                    self.view.artifact(path)
            self.artifacts.position = position


class Follower:
    """Runs the tails of all views in one daemon thread.

    Args:
        tails: what to keep up to date.
        interval: seconds between looks at the files.
    """

    def __init__(self, tails: list[Tail], interval: float = 2.0) -> None:
        self.tails, self.interval = tails, interval
        self.closing = threading.Event()
        self.deadline = 0.0
        self.thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    def start(self) -> None:
        if self.thread.ident is None:
            self.thread.start()

    def close(self, patience: float) -> list[Tail]:
        """Let the views catch up for at most `patience` seconds; those that could not."""
        self.start()
        self.deadline = time.monotonic() + patience
        self.closing.set()
        self.thread.join(patience)
        return [tail for tail in self.tails if not tail.closed]

    def _run(self) -> None:
        while not self.closing.is_set():
            for tail in self.tails:
                tail.advance()
            self.closing.wait(self.interval)
        for tail in self.tails:
            tail.not_before, tail.pause = 0.0, CLOSING_PAUSE
        while time.monotonic() < self.deadline:
            for tail in self.tails:
                tail.advance(closing=True)
            if all(tail.closed for tail in self.tails):
                return
            time.sleep(0.1)
