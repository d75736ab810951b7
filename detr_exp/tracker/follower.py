"""The thread that copies the content of a run folder to the views, without disturbing the training.

The files themselves are the queue. The thread stores the position of each view in them, and sends what follows; after a
failure the same content is sent again later.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_exp.tracker.base import SLOWEST, RefusedError, RunRecord, View
from detr_exp.tracker.jsonl import Reader
from detr_exp.tracker.secrets import masked
from detr_exp.values import Values

METRICS = "metrics.jsonl"
ARTIFACTS = "artifacts.jsonl"
FAILURES_BEFORE_NOTE = 3
PAUSE, CLOSING_PAUSE, LONGEST_PAUSE = 5.0, 1.0, 300.0

logger = logging.getLogger("detr_exp.tracker")


class Tail:
    """One view, and its position in the files.

    Args:
        view: where to copy to.
        folder: the run folder.
        record: of the run.
        pause: seconds to wait after a failure; doubled with every further one.
    """

    def __init__(self, view: View, folder: Path, record: RunRecord, pause: float = PAUSE) -> None:
        self.view, self.folder, self.record = view, folder, record
        self.name = type(view).__name__.removesuffix("View")  # for messages
        self.metrics, self.artifacts = Reader(folder / METRICS), Reader(folder / ARTIFACTS)
        self.files_of_piece = 0  # already sent of the current piece of the list of files
        self.pause = pause
        self.failures = 0
        self.refusal: str | None = None
        self.not_before = 0.0
        self.opened = self.closed = False
        self.moved = time.monotonic()  # time of the last successful call, or when the current one should have ended

    def advance(self, closing: bool = False) -> None:
        """Send new content, and end the run if it is `closing`; after a failure wait before sending again."""
        if self.closed or self.refusal or time.monotonic() < self.not_before:
            return
        try:
            self._send()
            if closing:
                self.view.close(self.record)
                self.closed = True
        except (RefusedError, ImportError) as error:  # trying again would not help
            self.refusal = str(error)
            logger.warning("%s; training continues, %s holds everything", masked(self.refusal), self.folder / METRICS)
        except Exception as error:  # errors of a view must not stop the training
            self.failures += 1
            self.not_before = time.monotonic() + min(self.pause * 2.0 ** (self.failures - 1), LONGEST_PAUSE)
            if self.failures == FAILURES_BEFORE_NOTE:
                logger.warning(
                    "%s cannot be reached (%s); training continues, %s holds everything and is sent again at the end",
                    self.name,
                    masked(str(error)).splitlines()[0][:300] if str(error) else type(error).__name__,
                    self.folder / METRICS,
                )
        else:
            self.failures = 0

    def _send(self) -> None:
        if not self.opened:
            self.view.open(self.folder, self.record)
            self.opened = True
            self.moved = time.monotonic()
        for lines in self._new(self.metrics):
            self.view.metrics(lines)
        for entries in self._new(self.artifacts):
            for entry in entries[self.files_of_piece :]:
                self._send_file(entry)
                self.files_of_piece += 1
                self.moved = time.monotonic()
            self.files_of_piece = 0

    def _new(self, reader: Reader) -> Iterator[list[Values]]:
        """New lines of a file in pieces; a piece counts as sent when the next one is requested."""
        while True:
            lines, position = reader.peek()
            if position == reader.position:
                return
            yield lines
            reader.position, self.moved = position, time.monotonic()

    def _send_file(self, entry: Values) -> None:
        path = self.folder / str(entry.get("path"))
        if not path.is_file():
            return
        if "image" in entry and not is_image(path):
            logger.warning("%s is damaged and is skipped", path)
            return
        with self._long(path.stat().st_size / SLOWEST):
            if "image" in entry:
                self.view.image(path, entry["image"], entry["step"])
            elif "model" in entry:
                self.view.model(path, entry["model"])
            else:
                self.view.artifact(path)

    @contextmanager
    def _long(self, seconds: float) -> Iterator[None]:
        """Let a call take so long, in which it shows no progress."""
        before = self.moved
        self.moved = time.monotonic() + seconds
        try:
            yield
        except BaseException:
            self.moved = before
            raise


def is_image(path: Path) -> bool:
    """Whether an image file can be read completely."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


class Follower:
    """Runs the tails of all views in one daemon thread.

    Args:
        tails: the views to update.
        interval: seconds between checks of the files.
    """

    def __init__(self, tails: list[Tail], interval: float = 2.0) -> None:
        self.tails, self.interval = tails, interval
        self.closing = threading.Event()
        self.given_up = threading.Event()
        self.thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    def start(self) -> None:
        if self.thread.ident is None:
            self.thread.start()

    def close(self, patience: float, longest: float = math.inf) -> list[Tail]:
        """Let the views receive the rest; returns those that could not.

        Args:
            patience: stop after so many seconds in which no view received anything.
            longest: stop after so many seconds in any case.
        """
        self.start()
        begun = time.monotonic()
        self.closing.set()
        while self.thread.is_alive():
            moved = max([begun, *(tail.moved for tail in self.tails)])
            left = min(moved + patience, begun + longest) - time.monotonic()
            if left <= 0:
                break
            self.thread.join(left)
        self.given_up.set()
        return [tail for tail in self.tails if not tail.closed]

    def _run(self) -> None:
        while not self.closing.is_set():
            for tail in self.tails:
                tail.advance()
            self.closing.wait(self.interval)
        for tail in self.tails:
            tail.not_before, tail.pause = 0.0, CLOSING_PAUSE
        while not self.given_up.wait(0.1) and not all(tail.closed or tail.refusal for tail in self.tails):
            for tail in self.tails:
                tail.advance(closing=True)
