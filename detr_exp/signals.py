"""Being ended from outside without losing anything.

A signal often comes to the whole process group (a terminal, `timeout`) or control group (service managers, schedulers):
the process that trains decides, those it has started leave it to that one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

EXIT_STATUS = {
    getattr(signal, name): status
    for name, status in (
        ("SIGTERM", 143),
        ("SIGINT", 130),
        ("SIGHUP", 129),
        ("SIGUSR1", 75),  # EX_TEMPFAIL: schedulers read it as "please requeue"
    )
    if hasattr(signal, name)
}
OWNED = "DETR_EXP_OWNED"  # environment of processes that another one asks to end, and ends if they do not
SAME = 1.0  # seconds in which signals are one request: `timeout` and closing terminals send theirs twice
WATCH = 5.0  # seconds between looks whether the parent still lives, and from its SIGTERM to the end


class Interrupted(BaseException):
    """The process was asked to end; what a training had done is saved. No `Exception`: nobody takes it for a fault.

    Attributes:
        exit_status: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP, 75 for SIGUSR1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number
        self.exit_status = EXIT_STATUS[signal.Signals(number)]

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Interrupted, (self.number,)


class Interrupt:
    """While it is entered, the first signal is noted in `.number`, and a second one ends the process at once.

    Files are safe either way: they are renamed into place only when whole. A SIGHUP that whoever started the process
    has had ignored (`nohup`) stays ignored.

    Args:
        raises: raise `Interrupted` at the first signal, wherever the process is: there is nothing to save.
        is_owned: a second signal is ignored: a terminal and the process that started this one send the same, and the
            latter ends this one if it does not end itself. None: as the environment says.
        at_once: called before a second signal ends the process.
    """

    asked = -SAME  # when the process was asked to end, whichever object was entered then

    def __init__(
        self, *, raises: bool = False, is_owned: bool | None = None, at_once: Callable[[], object] = lambda: None
    ) -> None:
        self.raises, self.at_once = raises, at_once
        self.is_owned = OWNED in os.environ if is_owned is None else is_owned
        self.number: int | None = None

    def __enter__(self) -> Interrupt:
        # only the main thread may handle signals; elsewhere (a notebook's worker, a test) there are none to catch
        self.previous = {}
        Interrupt.asked = time.monotonic() - SAME
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_STATUS:
                before = signal.getsignal(number)
                if before is not None and not (number.name == "SIGHUP" and before is signal.SIG_IGN):
                    self.previous[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_ending = self.is_owned and self.number is not None  # the other process may still ask for it
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if is_ending else handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number is None:
            if time.monotonic() - Interrupt.asked < SAME:
                return
            Interrupt.asked = time.monotonic()
            self.number = number
            if self.raises:
                raise Interrupted(number)
        elif not self.is_owned and time.monotonic() - Interrupt.asked >= SAME:
            self.at_once()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ended_by(exit_code: int) -> signal.Signals | None:
    """Which of the signals a process has ended by that has this exit code (negative: a signal's number)."""
    return next((number for number, status in EXIT_STATUS.items() if exit_code in (-number, status)), None)


@contextmanager
def held_back() -> Iterator[None]:
    """The signals wait until the end of the block; processes started in it are born with them held back for good.

    Nor does a library get to hear of it when one of these ends: torch would raise in the middle of a step, where it
    notices as well when it is asked for the next batch.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before, on_end = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_STATUS), signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if on_end is not None and signal.getsignal(signal.SIGCHLD) is not on_end:
            signal.signal(signal.SIGCHLD, on_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Let signals end this process only when its parent means it: after a SIGTERM from that one, or when it is gone.

    After, not at once: that one may have sent it to its whole group, and have use for this process until it ends.
    """
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_STATUS)
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    creator = multiprocessing.parent_process()
    senders = {parent, creator.pid if creator else parent}  # a fork server stands between the two
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, WATCH)
        if told is not None and told.si_pid in senders:
            time.sleep(WATCH)
            break
    os._exit(0)
