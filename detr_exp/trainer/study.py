"""Where the trials of a search are stored: a journal in its folder, or any storage of Optuna that several machines use.

The sweeper hands the address to its jobs by an environment variable, because it may contain a password.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from detr_exp.config.mistakes import ConfigError
from detr_exp.locks import lock
from detr_exp.terminal import say
from detr_exp.tracker.database import dialect_of, is_on_server, missing_driver, patience, sole_access
from detr_exp.tracker.secrets import masked

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

ADDRESS_VARIABLE = "DETR_EXP_STORAGE"
JOURNAL = "study.journal"
STUDY = "sweep"  # name of the only study of a journal in a sweep folder
PATIENCE = 300.0  # seconds for which a storage may be away, e.g. to be restarted
PAUSE = 2.0
SQLITE_PATIENCE = 60  # seconds to wait for the transactions of other processes
# names of errors of SQLAlchemy, its drivers, redis and gRPC when a server is away
OUTAGES = {"OperationalError", "InterfaceError", "ConnectionError", "TimeoutError", "DisconnectionError"}
OUTAGES |= {"_InactiveRpcError"}
T = TypeVar("T")


class StorageError(RuntimeError):
    """The storage of a study cannot be reached."""


def storage(folder: Path, address: str | None) -> BaseStorage:
    """The storage of a study.

    Args:
        folder: of the sweep.
        address: None: a journal in the folder. A path: a journal. Else of a database (SQLAlchemy), `redis://...`, or
            `grpc://host:port` of Optuna's proxy.

    Raises:
        ConfigError: it is no address of a storage, or a package for it is missing.
        StorageError: it cannot be reached.
    """
    from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalRedisBackend
    from sqlalchemy import NullPool

    if address is None or "://" not in address:
        file = str(folder / JOURNAL if address is None else Path(address).expanduser().absolute())
        return JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
    if (missing := missing_driver(address)) is not None:
        raise ConfigError(f"hydra.sweeper.storage={masked(address)} cannot be used: {missing}")
    scheme, place = dialect_of(address), urlsplit(address)
    with reached(address), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are called experimental
        if scheme in ("redis", "rediss"):
            return JournalStorage(JournalRedisBackend(address))
        if scheme == "grpc":
            return GrpcStorageProxy(host=place.hostname or "localhost", port=place.port or 13000)
        with _sole_creation(address):
            # no pool: a connection that is open during a training takes one of the server's, and is cut at times
            return RDBStorage(address, {"poolclass": NullPool, "connect_args": _settings(address)})


@contextmanager
def reached(address: str | None) -> Iterator[None]:
    """Say in words that a storage cannot be reached or used.

    Raises:
        ConfigError: it is no address of a storage, or a package for it is missing.
        StorageError: it cannot be reached.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except Exception as error:
        if is_outage(error):
            raise StorageError(_unreachable(address, error)) from error
        if not isinstance(error, ImportError | SQLAlchemyError):
            raise
        raise ConfigError(
            f"hydra.sweeper.storage={masked(address)} cannot be used ({_first_line(error)}); write "
            "postgresql+psycopg://user@host/database, sqlite:///file.db or a path, or leave it out"
        ) from error


def patiently(call: Callable[[], T], address: str | None) -> T:
    """The result of a call, repeated while the storage is away.

    Args:
        call: does no harm if an earlier attempt was done although it failed.
        address: of the storage.

    Raises:
        StorageError: it was away for longer than `PATIENCE`.
    """
    begun: float | None = None
    while True:
        try:
            return call()
        except Exception as error:
            if not is_outage(error):
                raise
            if begun is None:
                begun = time.monotonic()
                say(f"the storage of the study does not answer ({_first_line(error)}); trying for {PATIENCE:.0f} s")
            elif time.monotonic() - begun > PATIENCE:
                raise StorageError(_unreachable(address, error)) from error
            time.sleep(PAUSE)


def is_outage(error: BaseException | None) -> bool:
    """Whether this error, or one that it stems from, means that a server is away or busy."""
    while error is not None:
        if type(error).__name__ in OUTAGES:
            return True
        error = error.__cause__ or error.__context__
    return False


def repair_journal(journal: Path) -> None:
    """Cut off the line that a process was killed in the middle of; no other process may use the journal now.

    Raises:
        ConfigError: another line is damaged, without which the search is not what it was.
    """
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(journal, sum(map(len, lines[:-1])))
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{journal} is damaged at line {number} of {len(lines)} ({error}); restore it from a copy, or search "
                "in another folder: hydra.sweep.dir=..."
            ) from error
    for left_over in journal.parent.glob(f"{journal.name}*.lock"):
        left_over.unlink()


def _sole_creation(address: str) -> AbstractContextManager[object]:
    """In this context, no other process creates the tables."""
    if is_on_server(address):
        return sole_access(address)
    file = Path(address.removeprefix("sqlite:///"))
    return lock(Path(f"{file}.lock")) if dialect_of(address) == "sqlite" and file.parent.is_dir() else nullcontext()


def _settings(address: str) -> dict[str, int]:
    return {"timeout": SQLITE_PATIENCE} if dialect_of(address) == "sqlite" else patience(address)


def _unreachable(address: str | None, error: BaseException) -> str:
    shown = "the study's journal" if address is None else f"hydra.sweeper.storage={masked(address)}"
    return (
        f"{shown} cannot be reached ({_first_line(error)}); start it, and the same command goes on; or leave it out, "
        "and a study is kept in the folder of a new sweep"
    )


def _first_line(error: BaseException) -> str:
    """Of the error at the bottom, which says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(masked(str(error))).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
