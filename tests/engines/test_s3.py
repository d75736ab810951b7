"""Files of MLflow in S3 (moto's server stands for it), by a real `mlflow server` and without one; and shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from urllib.request import urlopen

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from postgres import free_port

pytest.importorskip("mlflow")
from detr_exp.sync import OutOfReachError, synchronise
from detr_exp.tracker import tracker as module
from detr_exp.tracker.mlflow import open_store
from detr_exp.tracker.tracker import Tracker

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "a-secret-key-9", "AWS_DEFAULT_REGION": "us-east-1"}
LARGE = os.urandom(1 << 20) * 12  # sent in several parts


class Daemon:
    """A process that answers at an address."""

    def __init__(self, words: list[str], address: str, log: Path) -> None:
        self.words, self.address, self.log = words, address, log
        self.start()

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + 400
        while self.process.poll() is None and time.monotonic() < until:
            try:
                urlopen(self.address, timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        pytest.fail(self.log.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, absent: Callable[[str], NoReturn]) -> Iterator[Daemon]:
    try:
        import boto3  # noqa: F401
        import moto.server  # noqa: F401
    except ImportError as error:
        absent(f"{error.name} is not installed (pip install 'detr_exp[engines]')")
    port, patch = free_port(), pytest.MonkeyPatch()
    address = f"http://127.0.0.1:{port}"
    for name, value in {**KEYS, "MLFLOW_S3_ENDPOINT_URL": address}.items():
        patch.setenv(name, value)
    words = [sys.executable, "-m", "moto.server", "-p", str(port)]
    daemon = Daemon(words, f"{address}/moto-api/", tmp_path_factory.mktemp("s3") / "log")
    make_bucket()
    yield daemon
    daemon.stop()
    patch.undo()


@pytest.fixture(scope="module")
def server(s3: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server that keeps files in S3."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    address = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", "s3://bucket/served"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven processes more
        daemon = Daemon(words, f"{address}/health", folder / "log")
    yield address
    daemon.stop()


def client():
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])


def make_bucket() -> None:
    client().create_bucket(Bucket="bucket")


def stored(end: str) -> list[bytes]:
    """The contents of all objects whose keys end so."""
    listed = client().list_objects_v2(Bucket="bucket").get("Contents", [])
    keys = [one["Key"] for one in listed if one["Key"].endswith(end)]
    return [client().get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys]


def tracked(folder: Path, name: str, content: bytes, **settings: str) -> Tracker:
    """A run that has logged a metric and a checkpoint."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    tracker = Tracker(project=folder.name, run=None, tensorboard=False, wandb=False, checkpoints=True, **settings)
    tracker.start(run_dir=folder, config={})
    tracker.log(1, {"a": 1.0})
    tracker.checkpoint(folder / name, 1)
    return tracker


def test_a_checkpoint_goes_through_the_server_and_comes_back_equal(server: str, tmp_path: Path) -> None:
    import mlflow

    tracked(tmp_path / "through", "best.pth", LARGE, tracking_uri=server).finish()
    assert stored("/best.pth") == [LARGE]
    _, experiment = open_store(server, "through")
    run = mlflow.MlflowClient(server).search_runs([experiment])[0]
    mlflow.set_tracking_uri(server)
    found = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="best.pth", dst_path=str(tmp_path)
    )
    assert Path(found).read_bytes() == LARGE
    assert (run.info.status, run.data.metrics["a"]) == ("FINISHED", 1.0)


def test_files_go_to_s3_without_a_server(s3: Daemon, tmp_path: Path) -> None:
    uri, root = f"sqlite:///{tmp_path}/mlflow.db", "s3://bucket/direct/"
    open_store(uri, "direct", root)
    tracked(tmp_path / "direct", "direct.pth", LARGE, tracking_uri=uri, artifact_root=root).finish()
    assert stored("/direct.pth") == [LARGE]


@pytest.mark.parametrize("through", [True, False])
def test_an_outage_of_s3_costs_no_metric_and_files_are_sent_later(
    s3: Daemon,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    through: bool,
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 5.0)
    uri = server if through else f"sqlite:///{tmp_path}/mlflow.db"
    places = {} if through else {"artifact_root": "s3://bucket/outage"}
    open_store(uri, f"run{through}", places.get("artifact_root"))
    s3.stop()
    try:
        tracker = tracked(tmp_path / f"run{through}", "late.pth", b"weights", tracking_uri=uri, **places)
        tracker.finish()
        assert "send it later: python -m detr_exp.sync run=" in caplog.text
        with pytest.raises(OutOfReachError):
            synchronise(tmp_path / f"run{through}", patience=3.0)
    finally:
        s3.start()
        make_bucket()  # moto keeps everything in memory
    client, experiment = open_store(uri, f"run{through}")
    run = client.search_runs([experiment])[0]
    assert run.data.metrics["a"] == 1.0
    synchronise(tmp_path / f"run{through}", patience=120.0)
    assert stored("/late.pth") == [b"weights"]
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "a")] == [1.0]


def test_shards_are_read_from_s3(s3: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples as from the folder, in the process and in two workers; a shard that is lost is named."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    import numpy as np
    import torch
    from PIL import Image

    from detr_exp import build, shard

    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["MLFLOW_S3_ENDPOINT_URL"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files, shards = tmp_path / "files", tmp_path / "shards"
    for split, count in (("train", 12), ("valid", 2)):
        (files / split).mkdir(parents=True)
        noise = np.random.default_rng(count).integers(0, 256, (count, 60, 80, 3)).astype(np.uint8)
        for i, pixels in enumerate(noise):
            Image.fromarray(pixels).save(files / split / f"{i}.jpg")
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80} for i in range(count)],
            "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [8, 9, 30, 20]} for i in range(count)],
            "categories": [{"id": 1, "name": "a"}],
        }
        (files / split / "_annotations.coco.json").write_text(json.dumps(content))
    words = [f"data.root={files}", f"out={shards}", "megabytes=0.02"]
    shard.shard(build.compose(words, config_name="shard"))
    for path in shards.iterdir():
        client().upload_file(str(path), "bucket", f"set/{path.name}")

    class Canvas:
        image_size, stride, tasks = (64, 64), 1, ("boxes",)

    def batches(root: str, workers: int) -> list[torch.Tensor]:
        data = build.data(build.compose(["data=shards", f"data.root={root}", f"data.num_workers={workers}"]))
        data.check(["train", "val"])
        loader = data.loader("train", network=Canvas, batch_size=4, seed=0, training=True)
        return [batch.images for batch in loader]

    local = batches(str(shards), 0)
    assert len(local) == 3
    for workers in (0, 2):
        assert all(map(torch.equal, local, batches("s3://bucket/set", workers)))
    client().delete_object(Bucket="bucket", Key="set/train-00001.tar")
    with pytest.raises(ValueError, match=r"train-00001\.tar is lost"):
        batches("s3://bucket/set", 0)
