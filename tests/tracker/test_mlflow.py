"""MLflow as a view: a real sqlite store, and servers that are not there."""

import json
import multiprocessing
import os
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mlflow")

from PIL import Image

from detr_exp.sync import OutOfReachError, synchronise
from detr_exp.tracker import mlflow as mlflow_view
from detr_exp.tracker import tracker as module
from detr_exp.tracker.mlflow import NOTE, TIMEOUT, MlflowView, finish_parent, open_store, start_parent
from detr_exp.tracker.tracker import PARENT_VARIABLE, Tracker

METRICS = {"val/mAP": 0.5, "val/mAP_small": -1.0, "val/AP/größe x": float("nan"), "time/images_per_second": 12.5}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/sub/mlflow.db"
    open_store(uri, "ours")
    return uri


def start(run_dir, uri, checkpoints=False, register=None, **settings) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    views = {"tracking_uri": uri, "tensorboard": False, "wandb": False}
    tracker = Tracker(project="ours", run="name", checkpoints=checkpoints, register=register, **views)
    tracker.start(run_dir=run_dir, config={"seed": 3}, choices={"optim/scheduler": "cosine"}, **settings)
    return tracker


def stored(uri, run_dir):
    """Client, and the run the folder speaks of."""
    client, _ = open_store(uri, "ours")
    return client, client.get_run(json.loads((run_dir / "mlflow.json").read_text())["run_id"])


def history(client, run, name) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def test_a_finished_run_is_whole(tmp_path, store):
    (tmp_path / "config.yaml").write_text("seed: 3")
    tracker = start(tmp_path, store, tags={"data.fingerprint": "f"})
    for step in range(1, 4):
        tracker.log(step, METRICS | {"train/loss": 1 / step} | {f"m{i}": float(i) for i in range(500)})
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    tracker.image(tmp_path / "p.png", "predictions", 3)
    tracker.finish()
    client, run = stored(store, tmp_path)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "name")
    assert run.data.params == {"seed": "3", "optim/scheduler": "cosine"}
    assert run.data.tags.items() >= {"optim/scheduler": "cosine", "data.fingerprint": "f", "status": "ok"}.items()
    assert history(client, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(client, run, "m499") == [(1, 499.0), (2, 499.0), (3, 499.0)]
    assert run.data.metrics["val/AP/größe x"] != run.data.metrics["val/AP/größe x"]
    assert not {"time/unix", "val/mAP_small"} & set(run.data.metrics), "no small objects, no value"
    assert any(a.path.endswith("config.yaml") for a in client.list_artifacts(run.info.run_id))
    assert any("predictions+step+3" in a.path for a in client.list_artifacts(run.info.run_id, "images"))
    assert "/sub/mlartifacts/" in run.info.artifact_uri


def test_a_killed_run_is_reopened_and_nothing_is_in_it_twice(tmp_path, store):
    first = start(tmp_path, store)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    for step in (1, 2, 3):
        first.log(step, {"a": float(step), "late": 1.0} if step > 1 else {"a": 1.0})
        first.image(tmp_path / "p.png", "predictions", step)
    first.finish("killed")
    client, run = stored(store, tmp_path)
    assert run.info.status == "KILLED"
    second = start(tmp_path, store, resumed=True)
    second.rewind(1)
    for step in (2, 3, 4):
        second.log(step, {"a": float(step), "late": 1.0})
        second.image(tmp_path / "p.png", "predictions", step)
    second.finish()
    client, again = stored(store, tmp_path)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert history(client, again, "a") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [step for step, _ in history(client, again, "late")] == [2, 3, 4]
    images = [a for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
    assert len(images) == 4


def test_the_message_of_an_interruption_is_removed_when_the_run_resumes(tmp_path, store):
    start(tmp_path, store).finish("killed", "signal 15")
    _, run = stored(store, tmp_path)
    assert (run.data.tags["status"], run.data.tags["message"]) == ("killed", "signal 15")
    start(tmp_path, store, resumed=True).finish()
    _, run = stored(store, tmp_path)
    assert run.data.tags["status"] == "ok"
    assert "message" not in run.data.tags


@pytest.mark.parametrize(("checkpoints", "register"), [(False, None), (True, None), (False, "blood")])
def test_checkpoints_and_registered_models_on_demand(tmp_path, store, checkpoints, register):
    import mlflow

    (tmp_path / "best.pth").write_bytes(b"weights")
    tracker = start(tmp_path, store, checkpoints=checkpoints, register=register)
    tracker.checkpoint(tmp_path / "best.pth")
    tracker.finish()
    synchronise(tmp_path)  # again: still one version
    client, run = stored(store, tmp_path)
    assert any(a.path == "best.pth" for a in client.list_artifacts(run.info.run_id)) == checkpoints
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert [version.name for version in versions] == [register] * (register is not None)
    if register is not None:
        mlflow.set_tracking_uri(store)
        folder = mlflow.artifacts.download_artifacts(f"models:/{register}/1", dst_path=str(tmp_path / "got"))
        assert [path.read_bytes() for path in Path(folder).rglob("*.pth")] == [b"weights"]


def test_a_sweep_has_a_parent_run(tmp_path, store, monkeypatch):
    ranges = {"swept/loss": "focal,vfl", "swept/data/augment@x": "a,b"}
    parent = start_parent(store, "ours", "sweep", {"sweep": "focal_gamma"}, "s" * 32, params=ranges)
    again = start_parent(store, "ours", "sweep", {}, "s" * 32, params={"swept/loss": "focal,vfl,mal"})
    assert again == parent, "a sweep that goes on goes on with it"
    monkeypatch.setenv(PARENT_VARIABLE, parent)
    tracker = start(tmp_path, store)
    tracker.finish("oom", "out of memory")
    note = "[its run](#/experiments/{experiment}/runs/a)"
    finish_parent(store, "ours", parent, "ok", {"best/mAP": 0.5}, {"best.run": "sweep/a"}, note)
    client, run = stored(store, tmp_path)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["message"] == "out of memory"
    assert run.info.status == "FAILED"
    finish_parent(store, "ours", parent, "ok", {"best/mAP": 0.5}, {})  # again
    assert history(client, client.get_run(parent), "best/mAP") == [(0, 0.5)]
    stored_parent = client.get_run(parent)
    assert stored_parent.data.tags["best.run"] == "sweep/a"
    assert stored_parent.data.params == {"swept/loss": "focal,vfl", "swept/data/augment_x": "a,b"}
    assert stored_parent.data.tags[NOTE] == note.replace("{experiment}", stored_parent.info.experiment_id)
    finish_parent(store, "ours", parent, "ok", {}, {}, "better")
    assert client.get_run(parent).data.tags[NOTE] == "better"
    client.set_tag(parent, NOTE, "by hand")
    finish_parent(store, "ours", parent, "ok", {}, {}, note)
    assert client.get_run(parent).data.tags[NOTE] == "by hand"


def test_a_refusing_server_costs_nothing_and_the_run_can_be_sent_later(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    tracker = start(tmp_path, "http://127.0.0.1:9")
    tracker.log(1, METRICS)
    tracker.finish()
    assert "Mlflow did not receive everything" in caplog.text
    with pytest.raises(OutOfReachError, match="Mlflow did not accept everything"):
        synchronise(tmp_path, patience=0.5)
    for _ in range(2):
        synchronise(tmp_path, store)
    client, run = stored(store, tmp_path)
    assert history(client, run, "val/mAP") == [(1, 0.5)]
    assert run.info.status == "FINISHED"


def test_a_locked_store_delays_nothing_and_loses_nothing(tmp_path, store):
    tracker = start(tmp_path, store)
    tracker.follower.interval = 0.05
    tracker.log(0, {"a": 0.0})
    while not (tmp_path / "mlflow.json").exists():
        time.sleep(0.01)
    lock = sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    begin = time.perf_counter()
    for step in range(1, 200):
        tracker.log(step, {"a": float(step)})
    assert time.perf_counter() - begin < 1.0
    time.sleep(0.5)  # the thread meets the lock
    lock.execute("ROLLBACK")
    tracker.finish()
    client, run = stored(store, tmp_path)
    assert history(client, run, "a") == [(step, float(step)) for step in range(200)]


def _one_of_many(folder: str, number: int) -> None:
    from pathlib import Path

    tracker = start(Path(folder) / str(number), f"sqlite:///{folder}/fresh.db")
    tracker.log(1, {"a": float(number)})
    tracker.finish()


@pytest.mark.slow
def test_many_processes_share_a_store_that_does_not_exist_yet(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_one_of_many, args=(str(tmp_path), i)) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    client, experiment = open_store(f"sqlite:///{tmp_path}/fresh.db", "ours")
    runs = client.search_runs([experiment])
    assert sorted(run.data.metrics["a"] for run in runs) == list(range(6))


@pytest.mark.parametrize(
    ("uri", "artifact_root", "location"),
    [
        ("sqlite:////s/mlflow.db", None, "file:///s/mlartifacts"),
        ("sqlite:////s/mlflow.db", "files", "file://{here}/files"),
        ("sqlite:////s/mlflow.db", "s3://bucket/runs/", "s3://bucket/runs"),
        ("postgresql+psycopg://me@host/db", None, "file://{here}/outputs/mlartifacts"),
        ("http://host:5000", None, None),
    ],
)
def test_where_a_new_experiment_keeps_its_files(tmp_path, monkeypatch, uri, artifact_root, location):
    monkeypatch.chdir(tmp_path)
    file = Path("/s/mlflow.db") if uri.startswith("sqlite") else None
    assert mlflow_view._location(artifact_root, file, uri) == (location and location.format(here=tmp_path))


def test_files_go_where_the_user_says_and_another_place_later_is_answered(tmp_path, store, caplog):
    for place in ("a", "b"):
        tracker = Tracker(
            tracking_uri=store,
            project="placed",
            run=None,
            tensorboard=False,
            wandb=False,
            artifact_root=str(tmp_path / place),
            checkpoints=True,
        )
        run_dir = tmp_path / f"run_{place}"
        run_dir.mkdir()
        (run_dir / "best.pth").write_bytes(b"weights")
        tracker.start(run_dir=run_dir, config={})
        tracker.checkpoint(run_dir / "best.pth")
        tracker.finish()
    assert len(list((tmp_path / "a").rglob("best.pth"))) == 2
    assert f"placed keeps its files in {(tmp_path / 'a').as_uri()}" in caplog.text
    assert "tracker.project=" in caplog.text


def test_an_experiment_that_another_process_creates_meanwhile_is_used(tmp_path, store, monkeypatch):
    from mlflow.tracking import MlflowClient

    existing = open_store(store, "raced")[1]
    look, asked = MlflowClient.get_experiment_by_name, []

    def late(self, name):
        asked.append(name)
        return None if len(asked) == 1 else look(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert open_store(store, "raced")[1] == existing
    assert len(asked) == 2


def test_files_in_s3_without_boto3_are_refused_in_words(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_view, "find_spec", lambda _: None)
    open_store(store, "in s3", "s3://bucket/runs")
    tracker = Tracker(tracking_uri=store, project="in s3", run=None, tensorboard=False, wandb=False)
    tracker.start(run_dir=tmp_path, config={})
    tracker.finish()
    assert "boto3: pip install 'detr_exp[s3]'" in caplog.text


def test_an_upload_may_take_longer_for_a_larger_file(tmp_path, store, monkeypatch):
    """A server answers when it has stored the file elsewhere."""
    seen = {}
    view = MlflowView(store)
    view.run_id = "r"
    view.client = SimpleNamespace(log_artifact=lambda _, path, folder: seen.update({path: os.environ[TIMEOUT]}))
    monkeypatch.setenv(TIMEOUT, "5")
    for name, size in (("small", 10), ("large", 100 << 20)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
        view.artifact(tmp_path / name)
    assert seen == {str(tmp_path / "small"): "5", str(tmp_path / "large"): "105"}
    assert os.environ[TIMEOUT] == "5"
