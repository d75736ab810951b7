"""The command that sends what a view has missed; its work on real stores is in `tests/tracker`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from detr_exp import sync
from detr_exp.tracker.base import RunRecord

Command = Callable[..., int]


def make(folder: Path, **views: object) -> Path:
    folder.mkdir()
    views = {"tracking_uri": None, "tensorboard": False, "wandb": False, **views}
    RunRecord(id="ab" * 16, project="p", name="n", views=views).save(folder)
    return folder


def test_it_writes_no_folder_of_its_own(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run")
    assert command(sync.main, "run=run") == 0
    assert command(sync.main, "run=abababab", "root=.") == 0
    assert capsys.readouterr().out.count("run: everything is sent") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert RunRecord.load(tmp_path / "run").status == "killed", "its ending was not recorded"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "run must be given"),
        (["run=absent"], "is no folder"),
        (["rum=run"], "did you mean run?"),
        (["run=run"], "give the whole address: tracking_uri="),
    ],
)
def test_mistakes(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    make(tmp_path / "run", tracking_uri="http://***@host")
    assert command(sync.main, *overrides) == 2
    assert message in capfd.readouterr().err


def test_a_run_that_is_still_running(command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FileLock(make(tmp_path / "run") / ".lock"):
        assert command(sync.main, "run=run") == 2
    assert "in use by another run" in capfd.readouterr().err


@pytest.mark.parametrize("overrides", ["run=a,b,c,d", "run=[a,b,c,d]", "run=."])
def test_many_runs_are_sent_whatever_is_wrong_with_one(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: str
) -> None:
    for name in "abcd":
        make(tmp_path / name)
    (tmp_path / "b" / "run.json").write_text('{"id": "ab')
    with FileLock(tmp_path / "c" / ".lock"):
        assert command(sync.main, overrides) == 1
    out, err = capfd.readouterr()
    assert out.count("everything is sent") == 2
    assert "b/run.json cannot be read" in out
    assert "c is in use by another run" in out
    assert "2 of 4 runs were not sent" in err
    (tmp_path / "b" / "run.json").unlink()
    assert command(sync.main, "run=a,c,d") == 0


def test_a_store_of_another_version_is_refused_at_once(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "mlflow.db").write_text("somebody's notes" * 100)
    make(tmp_path / "run", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert command(sync.main, "run=run") == 2
    assert "mlflow.db cannot be opened as a store of MLflow" in capfd.readouterr().err
