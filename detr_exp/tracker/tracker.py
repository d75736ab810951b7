"""The tracker that the trainer calls: it writes files immediately, and views follow later."""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from detr_exp.tracker.base import RECORD, RunRecord, View
from detr_exp.tracker.database import missing_driver
from detr_exp.tracker.follower import ARTIFACTS, METRICS, Follower, Tail
from detr_exp.tracker.jsonl import JsonLines
from detr_exp.tracker.provenance import environment, parameters
from detr_exp.tracker.secrets import masked
from detr_exp.tracker.system import system_use
from detr_exp.values import Values, measured

PARENT_VARIABLE = "DETR_EXP_PARENT_RUN"
CLOCK = "time/unix"
CONFIG = "config.yaml"
PATIENCE = 45.0  # seconds in which no view receives anything
LONGEST_WHEN_KILLED = 10.0

logger = logging.getLogger("detr_exp.tracker")


class Tracker:
    """Writes metrics and the list of artifacts to the run folder, and copies them to views.

    Args:
        tracking_uri: MLflow store (`sqlite:///outputs/mlflow.db`, `http://...`); None: no MLflow.
        artifact_root: where a new experiment of MLflow keeps its files; see `mlflow.open_store`.
        project: MLflow experiment and Weights & Biases project.
        run: name of the run; None: the last two parts of the folder's path.
        tensorboard: also write TensorBoard files to the run folder.
        wandb: also send to Weights & Biases (`WANDB_MODE=offline` works).
        checkpoints: also send the best checkpoint.
        register: register the best checkpoint as a version of the model of this name; None: do not register.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None,
        project: str,
        run: str | None,
        tensorboard: bool,
        wandb: bool,
        artifact_root: str | None = None,
        checkpoints: bool = False,
        register: str | None = None,
    ) -> None:
        self.tracking_uri, self.artifact_root, self.project, self.run = tracking_uri, artifact_root, project, run
        self.tensorboard, self.wandb = tensorboard, wandb
        self.checkpoints, self.register = checkpoints, register

    def start(
        self,
        *,
        run_dir: Path,
        config: Values,
        choices: Mapping[str, str | None] | None = None,
        overrides: Iterable[str] = (),
        tags: Mapping[str, str] | None = None,
        resumed: bool = False,
    ) -> None:
        """Start or resume the run of a folder; views are opened at the first `log`, not now.

        Args:
            run_dir: the run folder; a `config.yaml` in it becomes an artifact.
            config: the resolved config.
            choices: chosen option of every group.
            overrides: of the command line; they are recorded, and the values they set become parameters.
            tags: further tags, e.g. the data's fingerprint.
            resumed: keep the metrics and the id of the run in the folder; call `rewind` next.
        """
        self.run_dir = run_dir
        if resumed and (run_dir / RECORD).exists():
            record = RunRecord.load(run_dir)
        else:
            _rename_old_files(run_dir)
            name = self.run or "/".join(run_dir.resolve().parts[-2:])
            record = RunRecord(id=uuid.uuid4().hex, project=self.project, name=name)
            record.parent = os.environ.get(PARENT_VARIABLE)
        views = {"tracking_uri": self.tracking_uri, "artifact_root": self.artifact_root}
        record.views = masked({**views, "tensorboard": self.tensorboard, "wandb": self.wandb})
        chosen = {k: str(v) for k, v in (choices or {}).items() if v is not None and not k.startswith("hydra/")}
        record.tags |= environment() | masked({**chosen, **(tags or {})})
        record.words = masked(list(overrides))
        record.params = parameters(masked(dict(config)), record.words, chosen)
        record.status, record.message = "running", None
        record.save(run_dir)
        self.record, self.started = record, time.monotonic()
        self.metrics = JsonLines(run_dir / METRICS)
        self.artifacts = JsonLines(run_dir / ARTIFACTS)
        if (run_dir / CONFIG).exists():
            self.artifact(run_dir / CONFIG)
        opened = make_views(self.tracking_uri, self.artifact_root, self.tensorboard, self.wandb)
        self.follower = Follower([Tail(view, run_dir, record) for view in opened]) if opened else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of `metrics.jsonl`; metrics that could not be measured are absent."""
        self.metrics.append(step, {CLOCK: round(time.time(), 3), **measured(values), **system_use()})
        if self.follower is not None:
            self.follower.start()

    def artifact(self, path: Path, step: int = 0) -> None:
        """Copy a file of the run folder to the views."""
        self.artifacts.append(step, {"path": os.path.relpath(path, self.run_dir)})

    def image(self, path: Path, name: str, step: int) -> None:
        """Copy an image of the run folder to the views, as part of the series `name`."""
        self.artifacts.append(step, {"path": os.path.relpath(path, self.run_dir), "image": name})

    def checkpoint(self, path: Path, step: int = 0) -> None:
        """Copy a checkpoint of the run folder to the views, if the settings say so."""
        if self.checkpoints:
            self.artifact(path, step)
        if self.register is not None:
            self.artifacts.append(step, {"path": os.path.relpath(path, self.run_dir), "model": self.register})

    @property
    def lines(self) -> int:
        """Number of lines of `metrics.jsonl`."""
        return self.metrics.count

    def rewind(self, step: int, lines: int | None = None) -> None:
        """Delete entries after `step`, and metrics after the first `lines`; a resumed run logs them again."""
        self.metrics.rewind(step, lines)
        self.artifacts.rewind(step)

    def finish(self, status: str = "ok", message: str | None = None) -> None:
        """End the run: `ok`, `pruned`, `oom`, `nan`, `failed` or `killed`; waits while the views receive data."""
        self.record.status = status
        self.record.seconds += time.monotonic() - self.started
        self.record.message = None if message is None else masked(message)
        self.record.save(self.run_dir)
        self.metrics.close()
        self.artifacts.close()
        if self.follower is None:
            return
        longest = LONGEST_WHEN_KILLED if status == "killed" else math.inf  # schedulers do not wait
        for tail in self.follower.close(PATIENCE, longest):
            logger.warning(
                "%s did not receive everything; send it later: python -m detr_exp.sync run=%s",
                tail.name,
                self.run_dir,
            )


def make_views(tracking_uri: str | None, artifact_root: str | None, tensorboard: bool, wandb: bool) -> list[View]:
    """The configured views, except those whose package is missing, with a warning."""
    views: list[View] = []
    if tracking_uri is not None and _installed("mlflow", "tracker=none") and _has_driver(tracking_uri):
        from detr_exp.tracker.mlflow import MlflowView

        views.append(MlflowView(tracking_uri, artifact_root))
    if tensorboard and _installed("tensorboard", "tracker.tensorboard=false"):
        from detr_exp.tracker.tensorboard import TensorBoardView

        views.append(TensorBoardView())
    if wandb and _installed("wandb", "tracker.wandb=false"):
        from detr_exp.tracker.wandb import WandbView

        views.append(WandbView())
    return views


def _installed(package: str, without: str) -> bool:
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:  # None for a folder of that name, such as wandb creates
        return True
    requirement = "mlflow" if package == "mlflow" else f"'detr_exp[{package}]'"
    logger.warning("%s is not installed and is skipped: pip install %s, or %s", package, requirement, without)
    return False


def _has_driver(tracking_uri: str) -> bool:
    """Whether the driver package of a database can be imported; of other stores True."""
    if (missing := missing_driver(tracking_uri)) is None:
        return True
    logger.warning("MLflow is skipped: %s; or use tracker=mlflow, which keeps a file", missing)
    return False


def _rename_old_files(run_dir: Path) -> None:
    """Rename the metrics files of an earlier run in the same folder."""
    for name in (METRICS, ARTIFACTS):
        path = run_dir / name
        if path.exists():
            number = next(n for n in range(1, 10_000) if not (run_dir / f"{path.stem}.{n}.jsonl").exists())
            path.rename(run_dir / f"{path.stem}.{number}.jsonl")
