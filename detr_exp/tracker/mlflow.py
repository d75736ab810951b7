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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from detr_exp.tracker.base import IMPORT_LOCK, RunRecord
from detr_exp.tracker.store import prepare
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_TAG = "detr_exp.run"
LINK = "mlflow.json"  # in the run folder: ids of the run in the store
PARENT_TAG = "mlflow.parentRunId"
NOT_METRICS = ("step", "time/unix")
BATCH = 1000  # largest number of metrics in one call
LONGEST_TAG = 5000
ENDINGS = {"ok": "FINISHED", "pruned": "FINISHED", "killed": "KILLED"}
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by default calls to a server that is down are retried for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class MlflowView:
    """Copies a run into an MLflow store.

    Args:
        tracking_uri: `sqlite:///<file>` (created if missing; artifacts are in `mlartifacts` next to it), or a server.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self.held: dict[str, int] = {}
        self.images: set[str] = set()

    def open(self, folder: Path, record: RunRecord) -> None:
        self.client, experiment = open_store(self.tracking_uri, record.project)
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
        self._describe(record, run.data.params, _tags(record) if known else {})
        found = {"run_id": self.run_id, "experiment_id": experiment}
        write(folder / LINK, json.dumps(found) + "\n")

    def metrics(self, lines: list[Values]) -> None:
        from mlflow.entities import Metric

        found = [
            Metric(name, math.nan if value is None else value, int(1000 * line["time/unix"]), line["step"])
            for line in lines
            for name, value in line.items()
            if name not in NOT_METRICS and line["step"] > self.held.get(name, -1)
        ]
        for start in range(0, len(found), BATCH):
            self.client.log_batch(self.run_id, metrics=found[start : start + BATCH])

    def artifact(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))

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

        self.client.log_artifact(self.run_id, str(path), "model")
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

    def _describe(self, record: RunRecord, known_params: dict[str, str], tags: dict[str, str]) -> None:
        """Parameters and tags; a parameter that a resumed run changes keeps its first value, as stores require."""
        from mlflow.entities import Param, RunTag

        params = [Param(key, value) for key, value in record.params.items() if key not in known_params]
        self.client.log_batch(self.run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])

    def _load_existing(self, run_id: str, names: dict[str, float]) -> None:
        """Load which metrics and images the store has, because stores cannot delete them: these are not sent again."""
        self.held = {name: max(m.step for m in self.client.get_metric_history(run_id, name)) for name in names}
        paths = [Path(found.path).name for found in self.client.list_artifacts(run_id, "images")]
        self.images = {match.group() for path in paths if (match := re.match(r".+?\+step\+\d+\+", path))}


def _tags(record: RunRecord) -> dict[str, str]:
    return {key: value[:LONGEST_TAG] for key, value in {**record.tags, "status": record.status}.items()}


def open_store(tracking_uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client of the store, created if it does not exist, and the id of the experiment.

    A lock lets only one process create a sqlite store, because its migrations are not safe against concurrency.

    Raises:
        RefusedError: see `store.prepare`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with IMPORT_LOCK:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (else imported by the first call)
        from mlflow.tracking import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    tracking_uri, file = _absolute(tracking_uri)
    lock: AbstractContextManager[object] = nullcontext()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock", timeout=120)
    with lock:
        if file is not None:
            prepare(file)
        client = MlflowClient(tracking_uri=tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        location = (file.parent / "mlartifacts").as_uri() if file is not None else None
        kind = {
            "mlflow.experimentKind": "custom_model_development"
        }  # the web page opens on runs, not on language models
        return client, client.create_experiment(experiment, artifact_location=location, tags=kind)


def start_parent(tracking_uri: str, project: str, name: str, tags: dict[str, str], identity: str) -> str:
    """Start the parent run of a sweep; the sweep passes its id to its runs as `DETR_EXP_PARENT_RUN`.

    Args:
        identity: of the sweep; an existing parent run of it is resumed.
    """
    client, experiment = open_store(tracking_uri, project)
    known = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
    if known:
        client.update_run(known[0].info.run_id, status="RUNNING")
        return known[0].info.run_id
    return client.create_run(experiment, tags={**tags, RUN_TAG: identity}, run_name=name).info.run_id


def finish_parent(tracking_uri: str, project: str, run_id: str, status: str, metrics: dict[str, float]) -> None:
    """End the parent run of a sweep with the metrics of its best job."""
    client, _ = open_store(tracking_uri, project)
    held = client.get_run(run_id).data.metrics
    for name, value in metrics.items():
        if held.get(name) != value:
            client.log_metric(run_id, name, value, timestamp=int(1000 * time.time()))
    client.set_tag(run_id, "status", status)
    client.set_terminated(run_id, ENDINGS.get(status, "FAILED"))


def _absolute(tracking_uri: str) -> tuple[str, Path | None]:
    """A sqlite URI that does not depend on the working directory, and its file; other URIs unchanged."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return tracking_uri, None
    file = Path(tracking_uri.removeprefix(prefix)).expanduser().resolve()
    return f"{prefix}{file}", file
