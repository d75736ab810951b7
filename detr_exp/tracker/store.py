"""The sqlite file of an MLflow store: created completely or not at all, and never changed if it contains runs.

MLflow creates its tables in dozens of steps, and cannot continue if it was killed between two of them.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
from functools import cache
from pathlib import Path
from urllib.parse import quote

from detr_exp.tracker.base import RefusedError
from detr_exp.writing import remove_left_overs, write

BESIDE = (
    "-journal",
    "-wal",
    "-shm",
)  # files of SQLite next to a database, which it would apply to a new database of that name
WITHOUT_RUNS = ("alembic_version", "workspaces")  # tables that have content in a new store
PATIENCE = 20.0  # seconds to wait for the transaction of another process

logger = logging.getLogger("detr_exp.tracker")


def prepare(file: Path) -> None:
    """Make sure that `file` is a store that this MLflow can open. Only one process may call this at a time.

    Args:
        file: created if it does not exist, or if its creation was interrupted before it had content.

    Raises:
        RefusedError: it is another file, or of another version of MLflow; it is not changed.
    """
    from mlflow.store.db.utils import _get_latest_schema_revision

    if not file.exists():
        _make(file)
        return
    try:
        revision, filled, known = _inspect(file)
    except sqlite3.OperationalError:  # locked or unreachable, which may be temporary
        raise
    except sqlite3.DatabaseError as error:
        raise RefusedError(
            f"{file} cannot be opened as a store of MLflow ({error}); restore it from a backup, or use another store: "
            "tracker.tracking_uri=sqlite:///..."
        ) from error
    wanted = _get_latest_schema_revision()
    if revision == wanted:
        return
    if not filled and known:
        logger.warning(
            "%s is an incomplete store of a process that was killed, without runs; it is created again", file
        )
        _make(file)
        return
    found = (
        "is not an MLflow store" if revision is None else f"was created by another version of MLflow (schema {revision}"
    )
    end = "" if revision is None else f", the installed one has {wanted})"
    raise RefusedError(
        f"{file} {found}{end} and is not changed; after a backup, `mlflow db upgrade sqlite:///{file}` upgrades an "
        "older one; or use another store: tracker.tracking_uri=sqlite:///..."
    )


def _make(file: Path) -> None:
    """Create a store and move it to its path in one step."""
    content = _new()
    for left_over in (file, *(file.with_name(file.name + end) for end in BESIDE)):  # only safe without their database
        left_over.unlink(missing_ok=True)
    remove_left_overs(file)
    write(file, content)


@cache  # takes seconds
def _new() -> bytes:
    """The content of a new store."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "store.db"
        SqlAlchemyStore(f"sqlite:///{made}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        return made.read_bytes()


def _inspect(file: Path) -> tuple[str | None, bool, bool]:
    """The version of a store's tables, whether they have content, and whether all of them belong to MLflow."""
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking.dbmodels.initial_models import Base as First

    base = sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=PATIENCE)
    try:
        tables = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        versions = [*base.execute("SELECT version_num FROM alembic_version")] if "alembic_version" in tables else []
        filled = any(
            base.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables if name not in WITHOUT_RUNS
        )
    finally:
        base.close()
    of_mlflow = {*Base.metadata.tables, *First.metadata.tables, *WITHOUT_RUNS}
    known = all(name in of_mlflow or name.startswith(("_alembic_tmp_", "sqlite_")) for name in tables)
    return versions[0][0] if versions else None, filled, known
