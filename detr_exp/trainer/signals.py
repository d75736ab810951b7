"""Ending a run from outside without losing anything."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):
    EXIT_STATUS[signal.SIGUSR1] = 75  # EX_TEMPFAIL: schedulers read it as "please requeue"


class Interrupted(Exception):
    """The run was asked to end; its state is saved.

    Attributes:
        exit_status: 143 for SIGTERM, 130 for SIGINT, 75 for SIGUSR1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number
        self.exit_status = EXIT_STATUS[signal.Signals(number)]

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Interrupted, (self.number,)


class Interrupt:
    """While it is entered, the first signal is noted in `.number` and the second ends the process at once.

    Files are safe either way: they are renamed into place only when whole.

    Args:
        is_rank: the second signal is ignored: a terminal and the process that started the ranks send the same one, and
            the latter ends ranks that do not end themselves.
    """

    def __init__(self, is_rank: bool = False) -> None:
        self.is_rank = is_rank
        self.number: int | None = None

    def __enter__(self) -> Interrupt:
        # only the main thread may handle signals; elsewhere (a notebook's worker, a test) there are none to catch
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in EXIT_STATUS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number is not None and not self.is_rank:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
