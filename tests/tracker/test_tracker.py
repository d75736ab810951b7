"""The tracker as the trainer uses it, with views that fail, hang and come back."""

import json
import logging
import os
import sys
import threading
import time

import pytest
from PIL import Image

from detr_exp.tracker import tracker as module
from detr_exp.tracker.base import IMPORT_LOCK, RefusedError, RunRecord
from detr_exp.tracker.follower import Follower, Tail
from detr_exp.tracker.jsonl import JsonLines
from detr_exp.tracker.tracker import Tracker

CHOICES = {"model": "rtdetrv2", "experiment": None, "hydra/help": "plain"}


class Memory:
    """A view that records its calls, and fails a given number of times."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.files: list[str] = []
        self.status = None

    def _maybe_fail(self, name: str) -> None:
        self.calls.append(name)
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("no route to http://me:hunter2@host")

    def open(self, folder, record) -> None:
        self._maybe_fail("open")

    def metrics(self, lines) -> None:
        self._maybe_fail("metrics")
        self.steps += [line["step"] for line in lines]

    def artifact(self, path) -> None:
        self.files.append(path.name)

    def image(self, path, name, step) -> None:
        self.files.append(f"{name} {step} {path.name}")

    def close(self, record) -> None:
        self._maybe_fail("close")
        self.status = record.status


def make_tracker(**settings) -> Tracker:
    usual = {"tracking_uri": None, "project": "p", "run": None, "tensorboard": False, "wandb": False}
    return Tracker(**{**usual, **settings})


def start(tmp_path, monkeypatch, view=None, **settings) -> Tracker:
    monkeypatch.setattr(module, "make_views", lambda *_: [] if view is None else [view])
    tracker = make_tracker()
    tracker.start(run_dir=tmp_path, config={"seed": 0}, choices=CHOICES, **settings)
    return tracker


def journal(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_without_views_the_folder_holds_everything(tmp_path, monkeypatch):
    tracker = start(tmp_path, monkeypatch, tags={"data.fingerprint": "abc"})
    tracker.log(1, {"train/loss": 2.5})
    tracker.log(2, {"val/mAP": 0.5})
    tracker.finish()
    assert [
        {k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in journal(tmp_path)
    ] == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "val/mAP": 0.5},
    ]
    record = RunRecord.load(tmp_path)
    assert (record.status, record.params) == ("ok", {"seed": "0", "model": "rtdetrv2"})
    assert record.tags["model"] == "rtdetrv2"
    assert not set(record.tags) & {"experiment", "hydra/help"}
    assert record.tags["data.fingerprint"] == "abc"


def test_a_view_gets_everything_in_order_and_the_status(tmp_path, monkeypatch):
    view = Memory()
    tracker = start(tmp_path, monkeypatch, view)
    assert view.calls == []  # opened by the thread, after the first step
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    for step in range(5):
        tracker.log(step, {"a": 1.0})
    tracker.image(tmp_path / "p.png", "predictions", 4)
    tracker.artifact(tmp_path / "p.png")
    tracker.artifact(tmp_path / "gone.png")
    tracker.finish("failed", "boom")
    assert view.steps == [0, 1, 2, 3, 4]
    assert view.files == ["predictions 4 p.png", "p.png"]
    assert view.status == "failed"


def test_a_run_that_fails_before_its_first_step_is_copied_too(tmp_path, monkeypatch):
    view = Memory()
    start(tmp_path, monkeypatch, view).finish("failed", "data are missing")
    assert view.status == "failed"


def test_three_failures_are_said_once_and_nothing_is_lost(tmp_path, caplog):
    record = RunRecord(id="r", project="p", name="n")
    view = Memory(failures=5)
    tail = Tail(view, tmp_path, record, pause=0.001)
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(20):
        lines.append(step, {})
        tail.advance()
        time.sleep(0.02)
    tail.not_before = 0.0
    tail.advance(closing=True)
    assert view.steps == list(range(20))
    assert tail.closed
    (note,) = caplog.records
    assert "cannot be reached" in note.message
    assert "hunter2" not in note.message


def test_a_failure_makes_it_wait_longer_each_time(tmp_path):
    tail = Tail(Memory(failures=100), tmp_path, RunRecord(id="r", project="p", name="n"), pause=10.0)
    for expected in (10, 20, 40):
        tail.not_before = 0.0
        tail.advance()
        assert tail.not_before - time.monotonic() == pytest.approx(expected, abs=1)
        tail.advance()  # not yet
    assert len(tail.view.calls) == 3


def test_a_view_that_hangs_stops_neither_steps_nor_the_end(tmp_path, monkeypatch, caplog):
    release = threading.Event()

    class Hanging(Memory):
        def open(self, folder, record) -> None:
            release.wait(10)

    monkeypatch.setattr(module, "PATIENCE", 0.3)
    tracker = start(tmp_path, monkeypatch, Hanging())
    begin = time.perf_counter()
    for step in range(100):
        tracker.log(step, {f"m{i}": 0.5 for i in range(20)})
    assert time.perf_counter() - begin < 1.0
    tracker.finish()
    assert time.perf_counter() - begin < 2.0
    release.set()
    assert len(journal(tmp_path)) == 100
    assert "python -m detr_exp.sync run=" in caplog.text


def test_what_failed_is_sent_at_the_end(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    view = Memory(failures=1)
    follower = Follower([Tail(view, tmp_path, RunRecord(id="r", project="p", name="n", status="ok"))], interval=0.01)
    lines.append(1, {})
    follower.start()
    while view.failures == 1:
        time.sleep(0.01)
    lines.append(2, {})  # the view waits five seconds now, but the end does not
    assert follower.close(patience=10) == []
    assert view.steps == [1, 2]


def slow(tmp_path, view, files: int) -> Follower:
    """What follows a finished run with some files."""
    (tmp_path / "f").write_bytes(b"x")
    artifacts = JsonLines(tmp_path / "artifacts.jsonl")
    for step in range(files):
        artifacts.append(step, {"path": "f"})
    return Follower([Tail(view, tmp_path, RunRecord(id="r", project="p", name="n", status="ok"))])


def test_the_end_waits_as_long_as_a_view_takes_something(tmp_path):
    class Slow(Memory):
        def artifact(self, path) -> None:
            time.sleep(0.06)
            super().artifact(path)

    view = Slow()
    begin = time.perf_counter()
    assert slow(tmp_path, view, 12).close(patience=0.4) == []
    assert time.perf_counter() - begin > 0.7, "longer than its patience, in which it never was without news"
    assert len(view.files) == 12


def test_a_limit_holds_whatever_a_view_takes(tmp_path):
    class Slow(Memory):
        def artifact(self, path) -> None:
            time.sleep(0.05)

    begin = time.perf_counter()
    assert len(slow(tmp_path, Slow(), 100).close(patience=1.0, longest=0.3)) == 1
    assert time.perf_counter() - begin < 1.0


def test_taking_the_same_again_is_no_progress(tmp_path, monkeypatch):
    """A view that fails at the second file gets the first one once, and the end does not wait for ever."""

    class Stuck(Memory):
        def artifact(self, path) -> None:
            if self.files:
                raise ConnectionError("no")
            super().artifact(path)

    monkeypatch.setattr("detr_exp.tracker.follower.CLOSING_PAUSE", 0.01)
    view = Stuck()
    assert len(slow(tmp_path, view, 3).close(patience=0.4)) == 1
    assert len(view.files) == 1


def test_a_large_file_may_take_longer_and_its_failure_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("detr_exp.tracker.follower.CLOSING_PAUSE", 0.01)
    monkeypatch.setattr("detr_exp.tracker.follower.SLOWEST", 1)  # bytes per second: each file may take seconds

    class Slow(Memory):
        def artifact(self, path) -> None:
            time.sleep(0.6)
            super().artifact(path)

    (tmp_path / "slow").mkdir()
    assert slow(tmp_path / "slow", view := Slow(), 1).close(patience=0.2) == []
    assert len(view.files) == 1

    class Failing(Memory):
        def artifact(self, path) -> None:
            raise ConnectionError("no")

    (tmp_path / "failing").mkdir()
    begin = time.perf_counter()
    assert len(slow(tmp_path / "failing", Failing(), 1).close(patience=0.3)) == 1
    assert time.perf_counter() - begin < 3


def test_a_view_that_refuses_is_called_once_and_not_waited_for(tmp_path, caplog):
    class Refusing(Memory):
        def open(self, folder, record) -> None:
            super().open(folder, record)
            raise RefusedError("the store is of another version")

    view = Refusing()
    begin = time.perf_counter()
    (tail,) = slow(tmp_path, view, 1).close(patience=10)
    assert time.perf_counter() - begin < 2
    assert view.calls == ["open"]
    assert tail.refusal == "the store is of another version"
    assert "another version; training continues" in caplog.text


def test_damaged_images_and_lines_do_not_hold_up_what_follows(tmp_path, caplog):
    (tmp_path / "whole.txt").write_bytes(b"x")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "artifacts.jsonl").write_text(
        '{"step": 1, "path": "torn.png", "image": "p"}\n\0\0\0\n{"step": 2}\n{"step": 2, "path": "whole.txt"}\n'
    )
    (tmp_path / "metrics.jsonl").write_text('garbage\n{"step": 1}\n[]\n')
    view = Memory()
    record = RunRecord(id="r", project="p", name="n", status="ok")
    assert Follower([Tail(view, tmp_path, record)]).close(patience=5) == []
    assert (view.steps, view.files) == ([1], ["whole.txt"])
    assert "torn.png is damaged" in caplog.text
    assert "metrics.jsonl: 2 of 3 lines cannot be read" in caplog.text


def test_resuming_keeps_identity_and_metrics_up_to_the_step(tmp_path, monkeypatch):
    first = start(tmp_path, monkeypatch)
    for step in (1, 2, 3):
        first.log(step, {"a": step})
    second = start(tmp_path, monkeypatch, resumed=True)  # the first was killed
    second.rewind(2)
    second.log(3, {"a": 30})
    second.finish()
    assert [(line["step"], line["a"]) for line in journal(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    assert second.record.id == first.record.id


def test_a_new_run_in_an_old_folder_sets_the_old_metrics_aside(tmp_path, monkeypatch):
    ids = set()
    for step in (1, 2, 3):
        tracker = start(tmp_path, monkeypatch)
        tracker.log(step, {})
        tracker.finish()
        ids.add(tracker.record.id)
    assert len(ids) == 3
    assert [line["step"] for line in journal(tmp_path)] == [3]
    assert sorted(p.name for p in tmp_path.glob("metrics*")) == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]


def test_no_secret_reaches_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "make_views", lambda *_: [])
    tracker = make_tracker(tracking_uri="http://me:hunter2@host")
    config = {"data": {"api_key": "hunter2"}, "optim": {"lr": 1}}
    tags = {"wandb_token": "hunter2"}
    tracker.start(run_dir=tmp_path, config=config, overrides=["data.api_key=hunter2"], tags=tags)
    tracker.finish("failed", "cannot reach http://me:hunter2@host")
    assert all("hunter2" not in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"tracking_uri": "sqlite:///x.db"}, "mlflow"),
        ({"tensorboard": True}, "tensorboard"),
        ({"wandb": True}, "wandb"),
    ],
)
def test_a_missing_package_is_said_and_left_out(tmp_path, monkeypatch, caplog, settings, package):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING):
        tracker = make_tracker(**settings)
        tracker.start(run_dir=tmp_path, config={})
    tracker.log(1, {"a": 1.0})
    tracker.finish()
    assert caplog.text.count(f"{package} is not installed") == 1
    assert len(journal(tmp_path)) == 1


def test_a_folder_of_a_packages_name_is_not_the_package(tmp_path, monkeypatch, caplog):
    """Weights & Biases leaves a folder `wandb` where it ran, which Python takes for a package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert module.make_views(None, None, False, True) == []
    assert "wandb is not installed and is skipped: pip install 'detr_exp[wandb]', or tracker.wandb=false" in caplog.text


def test_a_database_without_its_driver_is_said_at_the_start_and_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    tracker = make_tracker(tracking_uri="mysql://me:hunter2@host/runs")
    tracker.start(run_dir=tmp_path, config={})
    assert "MLflow is skipped: MySQLdb is not installed: pip install mysqlclient; or use tracker=mlflow" in caplog.text
    assert "hunter2" not in caplog.text
    assert tracker.follower is None
    tracker.finish()


def test_a_view_that_cannot_be_imported_is_not_waited_for(tmp_path, monkeypatch, caplog):
    """Installed, but incomplete: trying again would not help."""

    class Broken:
        def open(self, folder, record):
            raise ImportError("libfoo.so is missing")

    monkeypatch.setattr(module, "make_views", lambda *_: [Broken()])
    tracker = make_tracker()
    tracker.start(run_dir=tmp_path, config={})
    tracker.log(1, {"a": 1.0})
    begin = time.perf_counter()
    tracker.finish()
    assert time.perf_counter() - begin < 5
    assert "libfoo.so is missing; training continues" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_waits_for_a_view_that_is_importing():
    """A worker forked in the middle of an import would find the module locked for ever."""
    begin = time.perf_counter()
    IMPORT_LOCK.acquire()
    threading.Timer(0.2, IMPORT_LOCK.release).start()
    child = os.fork()
    if child == 0:
        os._exit(int(IMPORT_LOCK.locked()))
    assert time.perf_counter() - begin > 0.15
    assert os.waitpid(child, 0)[1] == 0
    assert not IMPORT_LOCK.locked()


def test_tracker_none_imports_no_store(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, pathlib; sys.modules['mlflow'] = None\n"
        "from detr_exp.tracker.tracker import Tracker\n"
        "t = Tracker(tracking_uri=None, project='p', run=None, tensorboard=False, wandb=False)\n"
        f"t.start(run_dir=pathlib.Path({str(tmp_path)!r}), config={{}}); t.log(1, {{'a': 1.0}}); t.finish()\n"
        "assert 'torch' not in sys.modules and 'sqlalchemy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(journal(tmp_path)) == 1
