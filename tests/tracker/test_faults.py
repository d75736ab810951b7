"""A training whose tracking server is missing, dies, hangs or fails, or whose store is locked: only a warning."""

from __future__ import annotations

import itertools
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from detr_exp import sync, train
from detr_exp.tracker import follower
from detr_exp.tracker import tracker as module
from detr_exp.tracker.mlflow import open_store

LONGEST_STEP = 1.0  # seconds
NOT_MEASURED = ("step", "time/unix")


class Server:
    """A real MLflow server in this process that fails on request.

    Attributes:
        behaviour: of every request: `ok`, `500`, `hang`, or `die`: break the connection and listen no more.
        after: requests that are answered before that.
    """

    def __init__(self, app: Any, port: int) -> None:
        from werkzeug.serving import make_server

        self.app, self.behaviour, self.after = app, "ok", 0
        self.released = threading.Event()
        self.server = make_server("127.0.0.1", port, self.answer, threaded=True)
        self.port = self.server.port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, environ: Any, start_response: Any) -> Any:
        self.after -= 1
        if self.behaviour == "ok" or self.after >= 0:
            return self.app(environ, start_response)
        if self.behaviour == "hang":
            self.released.wait(60)
        if self.behaviour == "die":
            threading.Thread(target=self.close).start()
            raise ConnectionAbortedError
        start_response("500 Internal Server Error", [])
        return [b"broken"]

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """MLflow's own server application over a new store."""
    folder = tmp_path_factory.mktemp("server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", f"{folder}/artifacts")
        from mlflow.server import app

        yield app


@pytest.fixture
def server(app: Any) -> Iterator[Callable[[], Server]]:
    """Starts servers over the same store."""
    started: list[Server] = []

    def start(port: int = 0) -> Server:
        started.append(Server(app, port))
        return started[-1]

    yield start
    for one in started:
        one.close()


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def longest_step(folder: Path) -> float:
    """Seconds between two lines of the training, without the evaluation between epochs."""
    lines = journal(folder)
    pairs = itertools.pairwise(lines)
    return max(b["time/unix"] - a["time/unix"] for a, b in pairs if "train/loss" in a and "train/loss" in b)


def assert_complete(folder: Path, uri: str) -> None:
    """The store has every value of the journal once."""
    client, _ = open_store(uri, "detr_exp")
    run = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
    assert run.data.tags["status"] == "ok"
    assert run.info.status == "FINISHED"
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in journal(folder):
        for name, value in line.items():
            if name not in NOT_MEASURED and value is not None:
                wanted.setdefault(name, []).append((line["step"], value))
    for name, values in wanted.items():
        found = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in found] == values, name
    assert {"predictions", "worst"} <= {
        Path(image.path).name.partition("+")[0] for image in client.list_artifacts(run.info.run_id, "images")
    }


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """A training of twelve steps, each a line of the log."""
    without = [word for word in tiny_run if not word.startswith(("tracker", "trainer.max_steps", "trainer.epochs"))]
    small = ["model.num_layers=1", "model.hidden_dim=32", "model.neck.hidden_dim=32", "model.backbone.widths=[8,8,8,8]"]
    steps = ["data.train=16", "trainer.epochs=3", "trainer.log_every_steps=1", "trainer.eval_interval=3"]
    steps.append("trainer.num_pictures=1")
    return [*without, *small, *steps, "hydra.run.dir=run"]


@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "after"), [("die", 5), ("hang", 3), ("refuse", 0), ("500", 7)])
def test_training_continues_and_the_rest_is_sent_later(
    behaviour: str,
    after: int,
    command: Callable[..., int],
    words: list[str],
    server: Callable[[], Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3.0)
    monkeypatch.setattr(follower, "PAUSE", 0.2)
    sick = server()
    sick.behaviour, sick.after = behaviour, after
    if behaviour == "refuse":
        sick.close()
    uri = f"http://127.0.0.1:{sick.port}"
    assert command(train.main, *words, f"tracker.tracking_uri={uri}") == 0
    assert f"python -m detr_exp.sync run={Path('run').resolve()}" in capfd.readouterr().err
    assert longest_step(Path("run")) < LONGEST_STEP
    if behaviour in ("refuse", "die"):
        sick.close()
        server(sick.port)
    sick.behaviour = "ok"
    sick.released.set()
    for _ in range(2):
        assert command(sync.main, "run=run") == 0
        assert_complete(Path("run"), uri)


@pytest.mark.slow
def test_a_store_locked_for_thirty_seconds_loses_nothing(command: Callable[..., int], words: list[str]) -> None:
    open_store("sqlite:///mlflow.db", "detr_exp")
    lock = sqlite3.connect("mlflow.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    threading.Timer(30, lambda: lock.execute("ROLLBACK")).start()
    assert command(train.main, *words, "tracker.tracking_uri=sqlite:///mlflow.db") == 0
    assert time.monotonic() - begin > 30, "the lock outlived the training"
    assert longest_step(Path("run")) < LONGEST_STEP
    assert_complete(Path("run"), "sqlite:///mlflow.db")
