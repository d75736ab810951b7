"""The main command: what it leaves behind, and how it ends."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from detr_exp import evaluate, export_weights, predict, train, training
from detr_exp.config.compose import compose
from detr_exp.folder import exclusive_access
from detr_exp.trainer.checkpoint_content import NonFiniteError
from detr_exp.trainer.trainer import Trainer

Command = Callable[..., int]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics(folder) if name in line]


def test_a_run_folder_holds_everything(tiny_run: list[str], tmp_path: Path) -> None:
    best = training.train_in(tmp_path, compose([*tiny_run, "trainer.log_every_steps=1", "trainer.num_pictures=1"]))
    assert best == series(tmp_path, "val/mAP")[-1][1]
    assert [step for step, _ in series(tmp_path, "train/loss")] == [1, 2]
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert config.loss.class_loss.gamma == config.loss.focal_gamma, "resolved"
    assert "${" not in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "checkpoint.pth").is_file()
    assert (tmp_path / "checkpoint_best_total.pth").is_file()
    assert list((tmp_path / "predictions").glob("*.png"))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "ok"


def test_a_seed_decides_everything(tiny_run: list[str], tmp_path: Path) -> None:
    words = [*tiny_run, "trainer.log_every_steps=1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        training.train_in(tmp_path / name, compose([*words, f"seed={seed}"]))
    losses = {name: series(tmp_path / name, "train/loss") for name in "abc"}
    assert losses["a"] == losses["b"] != losses["c"]


def test_a_random_seed_is_recorded(tiny_run: list[str], tmp_path: Path) -> None:
    training.train_in(tmp_path / "drawn", compose([*tiny_run, "seed=null"]))
    seed = OmegaConf.load(tmp_path / "drawn" / "config.yaml").seed
    assert isinstance(seed, int)
    training.train_in(tmp_path / "again", compose([*tiny_run, f"seed={seed}"]))
    assert series(tmp_path / "drawn", "val/mAP") == series(tmp_path / "again", "val/mAP")


def test_a_folder_has_one_writer(tiny_run: list[str], tmp_path: Path) -> None:
    with exclusive_access(tmp_path), pytest.raises(Timeout):
        FileLock(tmp_path / ".lock").acquire(timeout=0)
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match=r"in use by another run.*hydra\.run\.dir="):
        training.train_in(tmp_path, compose(tiny_run))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("broke"), "failed"), (NonFiniteError("broke"), "nan")])
def test_a_run_that_fails_says_so(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def fail(self: Trainer, run: Any, state: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(type(error), match="broke"):
        training.train_in(tmp_path, compose(tiny_run))
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["message"]) == (status, "broke")


def test_the_command_trains(command: Command, tiny_run: list[str]) -> None:
    assert command(train.main, *tiny_run) == 0
    (folder,) = Path("outputs").glob("*/*-rtdetrv2_tiny-shapes")
    assert (folder / "metrics.jsonl").is_file()
    assert "model=rtdetrv2_tiny" in (folder / ".hydra" / "overrides.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["loss.focal_gama=1"], "did you mean loss.focal_gamma?"),
        (["model=rtdetrv3"], "did you mean model=rtdetrv2?"),
        (["data=coco"], "data.root must be given: data.root=..."),
        (["optim.lr=-1"], "optim.lr is -1; it must be a number >= 0: optim.lr=0.0001"),
        (["loss=focal", "loss.focal_gamma=-1"], "loss.focal_gamma is -1; it must be"),
        (["model.backbone.freeze_at=5"], "model.backbone.freeze_at is 5; it must be a whole number in [-1, 4]"),
        (["trainer.monitor=val/map50"], "did you mean trainer.monitor=val/mAP50?"),
        (["--multirun", "trainer.monitor=mAP,accuracy"], "trainer.monitor is 'accuracy', which no evaluation measures"),
        (["trainer.epochs=0"], "trainer.epochs is 0; it must be"),
        (["--epochs", "5"], "settings are written key=value"),
        (["hydra.run.dri=x"], "hydra.run.dri"),
        (["--multirun", "loss=focal,vlf"], "did you mean loss=vfl?"),
        (["--multirun", "loss=focal,ce", "loss.focal_gamma=1,2"], "loss=ce has no key focal_gamma"),
        (["--cfg", "job", "loss=vlf"], "did you mean loss=vfl?"),
        (["--config-dir", "absent"], "--config-dir absent is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_message(
    command: Command, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert command(train.main, *words) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert told in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not Path("outputs").exists()


def test_a_mistake_in_the_data_costs_one_message(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(train.main, "data=coco", "data.root=/absent") == 2
    said = capfd.readouterr().err
    assert "/absent" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("main", [train.main, evaluate.main, predict.main, export_weights.main])
def test_help(command: Command, capsys: pytest.CaptureFixture[str], main: Callable[[], None]) -> None:
    assert command(main, "--help") == 0
    shown = capsys.readouterr().out
    assert "python -m detr_exp." in shown
    assert "{" not in shown
    assert all(len(line) <= 125 for line in shown.splitlines())
    if main is train.main:
        assert "model/backbone" in shown
        assert "rtdetrv2_tiny" in shown


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    script = (
        "import sys\n"
        "from detr_exp import train\n"
        "try: train.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'numpy', 'rich'} & set(sys.modules)\n"
        "print('loaded:', sorted(heavy))\n"
    )
    for words in (["--help"], ["epochs=3"], ["--multirun", "loss=focal,vfl", "data=shapes,coco"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        assert "loaded: []" in done.stdout


def test_a_sweep_is_one_thing_in_mlflow(command: Command, tiny_run: list[str], capsys: pytest.CaptureFixture) -> None:
    words = [word for word in tiny_run if not word.startswith("tracker")]
    assert command(train.main, "--multirun", *words, "loss=focal,vfl", "loss.focal_gamma=1.5") == 0
    shown = capsys.readouterr().out
    assert "2 runs, best first" in shown
    assert "loss=focal " in shown
    store = sqlite3.connect(Path("outputs") / "mlflow.db")
    runs = dict(store.execute("select run_uuid, status from runs"))
    parents = dict(store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
    (parent,) = set(parents.values())
    assert len(runs) == 3
    assert set(parents) == set(runs) - {parent}
    assert set(runs.values()) == {"FINISHED"}
    for run in parents:
        values = store.execute("select value from latest_metrics where run_uuid = ? and key = 'val/mAP'", [run])
        assert len(values.fetchall()) == 1
        gamma = store.execute("select value from params where run_uuid = ? and key = 'loss.focal_gamma'", [run])
        assert gamma.fetchall() == [("1.5",)]
    copied = dict(store.execute("select key, value from latest_metrics where run_uuid = ?", [parent]))
    bests = [value for (value,) in store.execute("select value from latest_metrics where key = 'best/mAP'")]
    assert copied["best/monitor"] == copied["best/mAP"] == max(bests), "of the best child"
    assert "DETR_EXP_PARENT_RUN" not in os.environ


def test_a_sweep_file_needs_no_further_word(
    command: Command, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(train.main, *tiny_run, "trainer.max_steps=1", "sweep=seeds", "seed=3,4", "hydra/launcher=basic") == 0
    shown = capsys.readouterr().out
    assert "2 runs, best first" in shown
    seeds = {OmegaConf.load(path).seed for path in Path("outputs/sweeps").glob("*/*/config.yaml")}
    assert seeds == {3, 4}, "the command line wins over the file"


def test_a_failing_job_does_not_stop_a_sweep(
    command: Command, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(train.main, "--multirun", *tiny_run, "model.image_size=[65,64],[64,64]") == 1
    said = capsys.readouterr()
    first, second = (line for line in said.out.split("best first")[1].splitlines() if line.strip()[:1] in ("0", "1"))
    assert first.split()[0] == "1"
    assert second.split()[0] == "0"
    assert "failed" in second
    assert "multiples of 32" in second
    assert "1 of 2 runs failed" in said.err
