"""Handle signals, so that a process that is ended from outside saves its state.

A signal is often sent to the whole process group (a terminal, `timeout`) or control group (service managers,
schedulers): the training process handles it, its child processes ignore it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn

REQUEUE = 75  # EX_TEMPFAIL: schedulers read it as "please requeue"
EXIT_STATUS = {
    getattr(signal, name): status
    for name, status in (
        ("SIGTERM", 143),
        ("SIGINT", 130),
        ("SIGHUP", 129),
        ("SIGUSR1", REQUEUE),
        ("SIGUSR2", REQUEUE),  # submitit asks SLURM to send it before the time limit
    )
    if hasattr(signal, name)
}
OWNED = "DETR_EXP_OWNED"  # environment variable of processes that another one signals, and kills if they do not end
SAME = 1.0  # seconds within which signals count as one: `timeout` and closing terminals send theirs twice
WATCH = 5.0  # seconds between checks that the parent is alive, and from its SIGTERM to the end


class Interrupted(BaseException):
    """A signal ended the process; a training has saved its state. Not an `Exception`: it is no error.

    Attributes:
        exit_status: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP, 75 for SIGUSR1 and SIGUSR2.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number
        self.exit_status = EXIT_STATUS[signal.Signals(number)]

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Interrupted, (self.number,)


class Interrupt:
    """Inside the block, the first signal is stored in `.number`, and a second one ends the process at once.

    Files are safe either way: they are renamed only when complete. A SIGHUP that was ignored when the process started
    (`nohup`) stays ignored.

    Args:
        raises: raise `Interrupted` at the first signal, anywhere in the code: there is nothing to save.
        is_owned: ignore a second signal: the terminal and the parent process both send it, and the parent kills this
            process if it does not end. None: from the environment.
        at_once: called before a second signal ends the process.
    """

    asked = -SAME  # time of the last signal, shared by all objects

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
        is_ending = self.is_owned and self.number is not None  # the other process may send its signal later
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
    """The signal that ended a process with this exit code (negative: a signal's number)."""
    return next((number for number, status in EXIT_STATUS.items() if exit_code in (-number, status)), None)


@contextmanager
def held_back() -> Iterator[None]:
    """Block the signals until the end of the block; processes started in it keep them blocked.

    A SIGCHLD handler that a library installs meanwhile is removed: torch's would raise in the middle of a step when a
    worker ends, which torch notices anyway when the next batch is requested.
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


def end_at_once(reason: str, status: int) -> NoReturn:
    """End this process from any thread, whatever its other threads wait for; nothing is saved.

    Args:
        reason: printed.
        status: exit status.
    """
    with suppress(OSError):
        os.write(2, f"{reason}\n".encode(errors="backslashreplace"))  # another thread may be printing to `sys.stderr`
    os._exit(status)


def leave_to_parent() -> None:
    """End this process only some seconds after a SIGTERM from its parent, or when the parent is gone.

    Not at once: the parent may have sent the signal to its whole group, and still need this process until it ends.
    """
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_STATUS)
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    creator = multiprocessing.parent_process()
    senders = {parent, creator.pid if creator else parent}  # a fork server stands between the two
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, WATCH)
        if received is not None and received.si_pid in senders:
            time.sleep(WATCH)
            break
    os._exit(0)
