"""Stores that are created completely, created again, or not changed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from sqlalchemy import create_engine

from detr_exp.tracker import store as module
from detr_exp.tracker.base import RefusedError
from detr_exp.tracker.mlflow import open_store

# making a store as MLflow does it, in place, killed after the n-th statement
KILLED = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
import mlflow.store.tracking.sqlalchemy_store as made
left = [int(sys.argv[2])]
@event.listens_for(Engine, "after_cursor_execute")
def die(*_):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
made.SqlAlchemyStore(f"sqlite:///{sys.argv[1]}", "./mlruns")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a store with an experiment."""
    file = tmp_path_factory.mktemp("made") / "mlflow.db"
    open_store(f"sqlite:///{file}", "ours")
    return file.read_bytes()


def experiments(file: Path) -> list[str]:
    with sqlite3.connect(file) as base:
        return [name for (name,) in base.execute("SELECT name FROM experiments ORDER BY name")]


@pytest.mark.parametrize("statements", [3, pytest.param(400, marks=pytest.mark.slow)])
def test_a_store_whose_making_was_killed_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, statements: int
) -> None:
    file = tmp_path / "mlflow.db"
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), str(statements)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert file.exists()
    open_store(f"sqlite:///{file}", "ours")
    assert experiments(file) == ["Default", "ours"]
    assert "is an incomplete store" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_a_kill_while_it_is_put_in_place_leaves_nothing_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bytes
) -> None:
    """A journal of an earlier file of that name would be applied to the new one."""
    file = tmp_path / "mlflow.db"
    file.touch()
    for name in ("-journal", "-wal", "-shm"):
        (tmp_path / f"mlflow.db{name}").write_bytes(b"x" * 512)
    seen = []

    def write(path: Path, content: bytes) -> None:
        seen.append([left.name for left in path.parent.iterdir()])
        path.write_bytes(content)

    monkeypatch.setattr(module, "_new", lambda: made)
    monkeypatch.setattr(module, "write", write)
    module.prepare(file)
    assert seen == [[]]
    assert experiments(file) == ["Default", "ours"]


def older(file: Path) -> None:
    with sqlite3.connect(file) as base:
        base.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


def newer(file: Path) -> None:
    with sqlite3.connect(file) as base:
        base.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")


def of_another_program(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as base:
        base.execute("CREATE TABLE studies (id INTEGER)")


def of_two_programs(file: Path) -> None:
    """Both keep their versions in a table of one name."""
    with sqlite3.connect(file) as base:
        for (name,) in [*base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]:
            base.execute(f'DELETE FROM "{name}"')
        base.execute("CREATE TABLE studies (id INTEGER)")
        base.execute("INSERT INTO alembic_version VALUES ('v3.0.0.d')")


def text(file: Path) -> None:
    file.write_text("no data base, but somebody's notes\n" * 100)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize("change", [older, newer, of_another_program, of_two_programs, text, cut])
def test_what_is_somebodys_is_refused_and_left_as_it_is(tmp_path: Path, made: bytes, change: object) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(made)
    change(file)  # type: ignore[operator]
    before = file.read_bytes()
    with pytest.raises(RefusedError, match=r"mlflow\.db .*tracker\.tracking_uri="):
        open_store(f"sqlite:///{file}", "ours")
    assert file.read_bytes() == before


@pytest.mark.slow
def test_an_older_one_can_be_used_once_it_was_upgraded(tmp_path: Path) -> None:
    """The advice that is given works on a store as an older version has made it."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    file = tmp_path / "mlflow.db"
    engine = create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(f"sqlite:///{file}"), "89d4b8295536")
    with sqlite3.connect(file) as base:
        base.execute("INSERT INTO experiments VALUES (0, 'theirs', 'x', 'active')")
    base.close()
    engine.dispose()
    with pytest.raises(RefusedError, match="mlflow db upgrade"):
        open_store(f"sqlite:///{file}", "ours")
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{file}"], check=True, env=os.environ)
    open_store(f"sqlite:///{file}", "ours")
    assert {"theirs", "ours"} <= set(experiments(file))


def test_a_transaction_that_was_cut_off_is_rolled_back_and_nothing_else_is_lost(tmp_path: Path, made: bytes) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(made)
    script = (
        "import os, sqlite3, sys; base = sqlite3.connect(sys.argv[1]); base.execute('PRAGMA cache_size=1');"
        "base.execute('CREATE TABLE IF NOT EXISTS x (y)'); base.commit();"
        "[base.execute('INSERT INTO x VALUES (zeroblob(100000))') for _ in range(20)]; os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(file)]).returncode == -signal.SIGKILL
    assert (tmp_path / "mlflow.db-journal").exists()
    open_store(f"sqlite:///{file}", "ours")
    assert experiments(file) == ["Default", "ours"]
    with sqlite3.connect(file) as base:
        assert base.execute("SELECT count(*) FROM x").fetchone() == (0,)


def test_a_disk_without_locks_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(RefusedError, match=r"No locks available.*SQLite.*tracker\.tracking_uri="):
        open_store(f"sqlite:///{tmp_path / 'mlflow.db'}", "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]
