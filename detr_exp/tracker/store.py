"""The sqlite file of an MLflow store: made whole or not at all, and never changed where somebody's runs are in it.

MLflow makes its tables in dozens of steps, and cannot go on where it was killed between two of them.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import quote

from detr_exp.tracker.base import RefusedError
from detr_exp.writing import remove_left_overs, write

BESIDE = ("-journal", "-wal", "-shm")  # what SQLite keeps beside a file, and would apply to a new one of that name
WITHOUT_RUNS = ("alembic_version", "workspaces")  # tables that are filled while a store is made
PATIENCE = 20.0  # seconds to wait for somebody else's transaction

logger = logging.getLogger("detr_exp.tracker")


def prepare(file: Path) -> None:
    """See that `file` is a store this MLflow can open. Nobody else may be in here at the same time.

    Args:
        file: made where it is absent, made anew where whoever made it was killed before anything was in it.

    Raises:
        RefusedError: it is something else, or of another version of MLflow; it is left as it is.
    """
    from mlflow.store.db.utils import _get_latest_schema_revision

    if not file.exists():
        _make(file)
        return
    try:
        revision, filled, known = _inspect(file)
    except sqlite3.OperationalError:  # locked, or out of reach: that may pass
        raise
    except sqlite3.DatabaseError as error:
        raise RefusedError(
            f"{file} cannot be opened as a store of MLflow ({error}); restore it from a copy, or use another: "
            "tracker.tracking_uri=sqlite:///..."
        ) from error
    wanted = _get_latest_schema_revision()
    if revision == wanted:
        return
    if not filled and known:
        logger.warning("%s was left half made by a process that was killed, without a run in it; it is made anew", file)
        _make(file)
        return
    found = "is no store of MLflow" if revision is None else f"was made by another version of MLflow (schema {revision}"
    end = "" if revision is None else f", the installed one has {wanted})"
    raise RefusedError(
        f"{file} {found}{end} and is left as it is; after a copy, `mlflow db upgrade sqlite:///{file}` brings an older "
        "one up to date; or use another: tracker.tracking_uri=sqlite:///..."
    )


def _make(file: Path) -> None:
    """Make a store elsewhere and put it in its place in one step."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "store.db"
        SqlAlchemyStore(f"sqlite:///{made}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        content = made.read_bytes()
    for left_over in (file, *(file.with_name(file.name + end) for end in BESIDE)):  # these only without their file
        left_over.unlink(missing_ok=True)
    remove_left_overs(file)
    write(file, content)


def _inspect(file: Path) -> tuple[str | None, bool, bool]:
    """The version of a store's tables, whether anything is in them, and whether MLflow has made all of them."""
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
