"""Lock files: the only way to let one process at a time, on any machine, do something.

A lock is the system's (`flock`), which ends with its process. Some disks refuse it: network disks without a lock
service, Lustre without `flock`, some FUSE mounts. Windows has none. There a file `<lock>.held`, which only one process
can create, stands for it while its content changes every few seconds. This is weaker: after the death of a machine
others wait for `SILENCE`, and a process that was stopped for as long loses its lock, and ends.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detr_exp.signals import REQUEUE, end_at_once

try:
    import fcntl
except ImportError:  # Windows: files stand for all locks
    fcntl = None  # type: ignore[assignment]

BEAT = 5.0  # seconds between changes of the file that stands for a lock
SILENCE = 60.0  # seconds without a change after which its process counts as dead
POLL = 0.05  # seconds between attempts
CONTENTION = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # another process has the lock

logger = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """Another process has the lock."""


@contextmanager
def lock(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Have a lock during the block.

    Args:
        path: of the lock file, in an existing folder; the file stays there.
        timeout: seconds to wait for other processes; None: without limit. On a disk without locks it can take
            `SILENCE` longer to find out that a process of another machine is dead.

    Raises:
        LockedError: another process had it all the time.
        OSError: the file cannot be created.
    """
    until, mark = None if timeout is None else time.monotonic() + timeout, _Mark(path)
    while (number := _locked_file(path, mark)) is None:
        if until is not None and time.monotonic() >= until:
            raise LockedError(f"another process has locked {path}")
        time.sleep(POLL)
    try:
        yield
    finally:
        mark.remove()
        os.close(number)  # which ends the system's lock


def is_locked(path: Path) -> bool:
    """Whether a process has a lock."""
    if not path.exists():
        return False
    try:
        with lock(path, timeout=0):
            return False
    except LockedError:
        return True


def refusal_of_ranges(path: Path) -> str:
    """Why the disk of an existing file refuses locks of parts of files, which SQLite needs; "": it does not."""
    if fcntl is None:  # there SQLite has others
        return ""
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return "" if error.errno in CONTENTION else str(error.strerror)
    return ""


def _locked_file(path: Path, mark: _Mark) -> int | None:
    """Try to get a lock; returns the number of its open file, or None: another process has it."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(number)
    except OSError as error:
        if error.errno not in CONTENTION and mark.is_created(error):
            return number
    else:
        if os.fstat(number).st_nlink == 0:  # the process that had the lock has removed the file
            os.close(number)
            return _locked_file(path, mark)
        if mark.is_free():  # else the disk has refused to the other process what it grants to this one
            return number
    os.close(number)
    return None


def _flock(number: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _Mark:
    """The file that stands for a lock on a disk without locks.

    Its content is one line: name of the machine, identity of the machine, process, start of the process, identity of
    the lock, a count.

    Args:
        lock: path of the lock file.
    """

    is_explained = False  # once per process

    def __init__(self, lock: Path) -> None:
        self.path, self.process = lock.with_name(f"{lock.name}.held"), os.getpid()
        self.owner = f"{' '.join(_machine())} {self.process} {_start_of(self.process)} {uuid.uuid4().hex}"
        self.ended: threading.Event | None = None

    def is_created(self, reason: OSError) -> bool:
        """Create the file, unless a living process has; returns whether this process has created it."""
        if not self.is_free():
            return False
        try:
            self._create(0)
        except FileExistsError:
            return False
        self.ended = threading.Event()
        threading.Thread(target=self._beat, args=(self.ended,), name="lock", daemon=True).start()
        if not _Mark.is_explained:
            _Mark.is_explained = True
            logger.warning(
                "the disk of %s has no locks (%s); files *.held guard it instead, which is weaker: after the death of "
                "a machine others wait %.0f s",
                self.path.parent,
                reason.strerror,
                SILENCE,
            )
        return True

    def is_free(self) -> bool:
        """Whether no process has the lock by this file; waits until that is sure, and removes that of a dead one."""
        first = last = self._content()
        if first is None:
            return True
        is_dead, asked = _is_dead(first), time.monotonic()
        while is_dead is None and last == first:
            time.sleep(POLL)
            last = self._content()
            is_dead = True if time.monotonic() - asked >= SILENCE else None
        return last is None or (last == first and bool(is_dead) and self._is_removed(first))

    def remove(self) -> None:
        """End the lock; not in a forked process."""
        if self.ended is not None and self.process == os.getpid():
            self.ended.set()
            with suppress(OSError):
                if (self._content() or "").startswith(self.owner):
                    self.path.unlink()

    def _content(self) -> str | None:
        """Opened each time, because network disks cache what is known of a file that is open."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _create(self, count: int) -> None:
        with open(self.path, "x", encoding="utf-8") as file:
            file.write(f"{self.owner} {count}\n")

    def _is_removed(self, content: str) -> bool:
        """Remove the file if it has this content; several processes may try at the same time."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True
        is_meant = aside.read_text(encoding="utf-8", errors="replace") == content
        if not is_meant:  # another process was sooner, and has the lock
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()
        return is_meant

    def _beat(self, ended: threading.Event) -> None:
        """Change the file until the end of the lock."""
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with suppress(OSError):  # if the disk does not answer, it does not tell others that this process is silent
                content = self._content()
                if content is None and not ended.is_set():
                    self._create(count)
                elif content is not None and content.startswith(self.owner):
                    with open(self.path, "r+", encoding="utf-8") as file:
                        file.write(f"{self.owner} {count}\n")
                elif content:
                    name, _, process, *_ = [*content.split(), "", "", ""]
                    end_at_once(
                        f"error: this process was stopped, and process {process} of {name} has taken over "
                        f"{self.path.with_suffix('')}; end it, or use another folder: hydra.run.dir=...",
                        REQUEUE,
                    )


def _machine() -> tuple[str, str]:
    """Name and identity of the machine and its processes (of the container); without /proc a new identity each time."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return socket.gethostname(), f"{start}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname(), uuid.uuid4().hex


def _start_of(process: int) -> str | None:
    """When a process of this machine was started; None: it does not run."""
    try:
        line = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *others = line.rpartition(")")[2].split()  # the name before it may contain anything
    return None if state in ("Z", "X") else others[18]


def _is_dead(content: str) -> bool | None:
    """Whether the process that has written this is dead; None: only its silence can show."""
    fields = content.split()
    if len(fields) != 6 or not content.endswith("\n") or (fields[0], fields[1]) != _machine():
        return None
    return _start_of(int(fields[2])) != fields[3]
