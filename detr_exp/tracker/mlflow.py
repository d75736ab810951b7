"""MLflow as a view of the run folder.

Everything goes through `MlflowClient`, in batches, with timestamps of the journal: a batch sent twice is stored once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from detr_exp.locks import lock, refusal_of_ranges
from detr_exp.tracker.base import IMPORT_LOCK, SLOWEST, RefusedError, RunRecord, metrics_of
from detr_exp.tracker.database import is_on_server, sole_access
from detr_exp.tracker.secrets import masked
from detr_exp.tracker.store import prepare
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_TAG = "detr_exp.run"
LINK = "mlflow.json"  # in the run folder: ids of the run in the store
PARENT_TAG = "mlflow.parentRunId"
BATCH = 1000  # largest number of metrics in one call
PARAMS, LONGEST_PARAM = 100, 6000  # likewise, and the largest length of a value
LONGEST_TAG = 5000
NOTE_TAG = "mlflow.detr_exp.note"  # as it was written, so that changes by hand are seen; pages hide mlflow.*
NOTE = "mlflow.note.content"  # the description that a run's page shows
ENDINGS = {"ok": "FINISHED", "pruned": "FINISHED", "killed": "KILLED"}
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by default calls to a server that is down are retried for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
OF_DATABASES = {"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"}  # servers limit connections; runs need theirs seldom
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
FOLDER = "mlartifacts"
REFUSALS = ("out-of-date database schema", "Model registry functionality is unavailable", "Invalid database engine")

logger = logging.getLogger("detr_exp.tracker")


class MlflowView:
    """Copies a run into an MLflow store.

    Args:
        tracking_uri: `sqlite:///<file>` (created if missing), a database of a server, or a server of MLflow.
        artifact_root: see `open_store`.
    """

    def __init__(self, tracking_uri: str, artifact_root: str | None = None) -> None:
        self.tracking_uri, self.artifact_root = tracking_uri, artifact_root
        self.held: dict[str, int] = {}
        self.images: set[str] = set()

    def open(self, folder: Path, record: RunRecord) -> None:
        self.client, experiment = open_store(self.tracking_uri, record.project, self.artifact_root)
        known = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{record.id}'", max_results=1)
        if known:
            run = known[0]
            self.client.update_run(run.info.run_id, status="RUNNING")
            self._load_existing(run.info.run_id, run.data.metrics)
            if "message" in run.data.tags:  # why the run had stopped
                self.client.delete_tag(run.info.run_id, "message")
        else:
            parent = {PARENT_TAG: record.parent} if record.parent else {}
            tags = {**_tags(record), RUN_TAG: record.id, **parent}
            run = self.client.create_run(experiment, tags=tags, run_name=record.name)
        self.run_id = run.info.run_id
        if run.info.artifact_uri.startswith("s3:") and find_spec("boto3") is None:
            raise RefusedError(
                f"MLflow keeps the files of {record.project} in {run.info.artifact_uri}, which needs boto3: "
                "pip install 'detr_exp[s3]', then python -m detr_exp.sync; or use tracker=none"
            )
        self._describe(record, run.data.params, _tags(record) if known else {})
        found = {"run_id": self.run_id, "experiment_id": experiment}
        write(folder / LINK, json.dumps(found) + "\n")

    def metrics(self, lines: list[Values]) -> None:
        from mlflow.entities import Metric

        found = [
            Metric(name, math.nan if value is None else value, int(1000 * line["time/unix"]), line["step"])
            for line in lines
            for name, value in metrics_of(line).items()
            if line["step"] > self.held.get(name, -1)
        ]
        for start in range(0, len(found), BATCH):
            self.client.log_batch(self.run_id, metrics=found[start : start + BATCH])

    def artifact(self, path: Path) -> None:
        self._send_file(path, None)

    def image(self, path: Path, name: str, step: int) -> None:
        from PIL import Image

        stored_as = f"{name}+step+{step}+"
        if stored_as in self.images:
            return
        with Image.open(path) as image:
            self.client.log_image(self.run_id, image, key=name, step=step)
        self.images.add(stored_as)

    def model(self, path: Path, name: str) -> None:
        from mlflow.exceptions import MlflowException

        self._send_file(path, "model")
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if not self.client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'"):
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/model"
            self.client.create_model_version(name, source, self.run_id)

    def close(self, record: RunRecord) -> None:
        self.client.set_tag(self.run_id, "status", record.status)
        if record.message:
            self.client.set_tag(self.run_id, "message", record.message[:LONGEST_TAG])
        self.client.set_terminated(self.run_id, ENDINGS.get(record.status, "FAILED"))

    def _send_file(self, path: Path, folder: str | None) -> None:
        """Upload a file; a server answers when it has stored it elsewhere, which takes longer for larger files."""
        usual = os.environ[TIMEOUT]
        os.environ[TIMEOUT] = str(int(usual) + path.stat().st_size // SLOWEST)
        try:
            self.client.log_artifact(self.run_id, str(path), folder)
        finally:
            os.environ[TIMEOUT] = usual

    def _describe(self, record: RunRecord, known_params: dict[str, str], tags: dict[str, str]) -> None:
        """Parameters and tags; a parameter that a resumed run changes keeps its first value, as stores require."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        _log_params(self.client, self.run_id, record.params, known_params)

    def _load_existing(self, run_id: str, names: dict[str, float]) -> None:
        """Load which metrics and images the store has, because stores cannot delete them: these are not sent again."""
        self.held = {name: max(m.step for m in self.client.get_metric_history(run_id, name)) for name in names}
        paths = [Path(found.path).name for found in self.client.list_artifacts(run_id, "images")]
        self.images = {match.group() for path in paths if (match := re.match(r".+?\+step\+\d+\+", path))}


def _log_params(client: MlflowClient, run_id: str, params: dict[str, str], known: dict[str, str]) -> None:
    """Add parameters; stores refuse other values of known ones, and some characters in names."""
    from mlflow.entities import Param

    named = {re.sub(r"[^\w.\-/: ]", "_", key): value[:LONGEST_PARAM] for key, value in params.items()}
    new = [Param(key, value) for key, value in named.items() if key not in known]
    for start in range(0, len(new), PARAMS):
        client.log_batch(run_id, params=new[start : start + PARAMS])


def _tags(record: RunRecord) -> dict[str, str]:
    return {key: value[:LONGEST_TAG] for key, value in {**record.tags, "status": record.status}.items()}


def open_store(tracking_uri: str, experiment: str, artifact_root: str | None = None) -> tuple[MlflowClient, str]:
    """A client of the store, created if it does not exist, and the id of the experiment.

    Args:
        artifact_root: where a new experiment keeps its files, a folder or `s3://...`; None: a server decides, sqlite
            has `mlartifacts` beside it, other databases have `outputs/mlartifacts`.

    Raises:
        RefusedError: see `store.prepare`; or MLflow knows no such store; or its tables are of another version.
    """
    for name, value in (SETTINGS | (OF_DATABASES if is_on_server(tracking_uri) else {})).items():
        os.environ.setdefault(name, value)
    with IMPORT_LOCK:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (else imported by the first call)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # a traceback of 80 lines for every database that is away, besides the exception
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    tracking_uri, file = _absolute(tracking_uri)
    with _prepared(tracking_uri, file):
        try:
            client = MlflowClient(tracking_uri=tracking_uri)
            found = client.get_experiment_by_name(experiment)
        except MlflowException as error:
            if any(words in str(error) for words in REFUSALS):
                raise RefusedError(
                    f"{masked(tracking_uri)} cannot be used: {masked(str(error)).splitlines()[0]}; use another store: "
                    "tracker.tracking_uri=..."
                ) from error
            raise
        location = _location(artifact_root, file, tracking_uri)
        if found is not None:
            if artifact_root is not None and found.artifact_location.rstrip("/") != location:
                logger.warning(
                    "the experiment %s keeps its files in %s, as it was created; for %s use another one: "
                    "tracker.project=...",
                    experiment,
                    found.artifact_location,
                    location,
                )
            return client, found.experiment_id
        # the web page opens on runs, not on language models
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            created = client.create_experiment(experiment, artifact_location=location, tags=kind)
        except MlflowException as error:
            found = client.get_experiment_by_name(experiment)  # meanwhile created by another process of a server
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return client, found.experiment_id
        if location is not None and file is None:
            logger.warning("MLflow keeps the files of %s in %s (tracker.artifact_root)", experiment, location)
        return client, created


@contextmanager
def _prepared(tracking_uri: str, file: Path | None) -> Iterator[None]:
    """In this context, no other process creates the tables or the experiment: MLflow is not safe against that."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        guard = Path(f"{file}.lock")
        with lock(guard, timeout=120):
            if reason := refusal_of_ranges(guard):
                raise RefusedError(
                    f"the disk of {file} has no locks ({reason}), which SQLite needs; use a store on another disk, a "
                    "database or a server: tracker.tracking_uri=sqlite:////local/mlflow.db"
                )
            prepare(file)
            yield
    elif is_on_server(tracking_uri):
        with sole_access(tracking_uri):
            yield
    else:
        yield


def _location(artifact_root: str | None, file: Path | None, tracking_uri: str) -> str | None:
    """Where a new experiment keeps its files; None: the server decides."""
    if artifact_root is not None and "://" in artifact_root:
        return artifact_root.rstrip("/")
    if artifact_root is not None:
        return Path(artifact_root).expanduser().resolve().as_uri()
    if file is not None:
        return (file.parent / FOLDER).as_uri()
    return Path("outputs", FOLDER).resolve().as_uri() if is_on_server(tracking_uri) else None


def start_parent(
    tracking_uri: str,
    project: str,
    name: str,
    tags: dict[str, str],
    identity: str,
    artifact_root: str | None = None,
    params: dict[str, str] | None = None,
) -> str:
    """Start the parent run of a sweep; the sweep passes its id to its runs as `DETR_EXP_PARENT_RUN`.

    Args:
        identity: of the sweep; an existing parent run of it is resumed.
        artifact_root: see `open_store`.
        params: what is swept.
    """
    client, experiment = open_store(tracking_uri, project, artifact_root)
    known = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
    if known:
        client.update_run(known[0].info.run_id, status="RUNNING")
        run = known[0]
    else:
        run = client.create_run(experiment, tags={**tags, RUN_TAG: identity}, run_name=name)
    _log_params(client, run.info.run_id, params or {}, run.data.params)
    return run.info.run_id


def finish_parent(
    tracking_uri: str,
    project: str,
    run_id: str,
    status: str,
    metrics: dict[str, float],
    tags: dict[str, str],
    note: str = "",
) -> None:
    """End the parent run of a sweep with the metrics of its best setting, and with tags and a note that name it.

    Args:
        note: Markdown; `{experiment}` in it is replaced by the id of the experiment. A description that somebody has
            written stays.
    """
    client, experiment = open_store(tracking_uri, project)
    held = client.get_run(run_id).data
    for name, value in metrics.items():
        if held.metrics.get(name) != value:
            client.log_metric(run_id, name, value, timestamp=int(1000 * time.time()))
    note = note.replace("{experiment}", experiment)
    if note and held.tags.get(NOTE, "") == held.tags.get(NOTE_TAG, ""):
        tags = {**tags, NOTE: note, NOTE_TAG: note}
    for name, text in {**tags, "status": status}.items():
        client.set_tag(run_id, name, text[:LONGEST_TAG])
    client.set_terminated(run_id, ENDINGS.get(status, "FAILED"))


def _absolute(tracking_uri: str) -> tuple[str, Path | None]:
    """A sqlite URI that does not depend on the working directory, and its file; other URIs unchanged."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return tracking_uri, None
    file = Path(tracking_uri.removeprefix(prefix)).expanduser().resolve()
    return f"{prefix}{file}", file
