"""One half of the validation images chooses the best epoch, and the other judges it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_exp import compare, evaluate
from detr_exp.config.compose import compose
from detr_exp.data.problems import DataError
from detr_exp.report import report_in
from detr_exp.runs.past import PastRun
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.trial import TRIAL_VARIABLE
from detr_exp.training import train_in

Command = Callable[..., int]
HONEST = [
    "metric.honest_selection=true",
    "data.val=7",
    "trainer.monitor=val/loss",
    "trainer.max_steps=null",
    "trainer.epochs=4",
    "trainer.num_pictures=0",
    "optim.lr=0.01",
    "trainer.evaluate_weights=raw",
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    train_in(folder, compose([*tiny_run, *HONEST]))
    return folder


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if name in line]


def test_half_of_the_images_choose_and_both_halves_are_recorded(honest: Path) -> None:
    evaluated = lines(honest, "val/loss")
    best = min(evaluated, key=lambda line: line["val/loss"])
    (end,) = lines(honest, "best/luck")
    other = min(evaluated, key=lambda line: line["held_out/loss"])
    assert end["best/epoch"] == best["val/epoch"]
    kept = files.load(honest / files.BEST_TOTAL)
    assert kept["metrics"]["loss"] == best["val/loss"]
    assert kept["held_out"]["loss"] == best["held_out/loss"]
    luck = (other["val/loss"] - best["val/loss"]) + (best["held_out/loss"] - other["held_out/loss"])
    assert end["best/luck"] == pytest.approx(luck / 2)
    assert end["best/held_out_mAP"] == best["held_out/mAP"]
    assert PastRun.load(honest).score == pytest.approx(-best["val/loss"])


@pytest.mark.slow
def test_without_it_the_training_is_the_same_and_nothing_is_held_out(
    honest: Path, tiny_run: list[str], tmp_path: Path
) -> None:
    train_in(tmp_path, compose([*tiny_run, *HONEST, "metric.honest_selection=false"]))
    assert not lines(tmp_path, "held_out/loss")
    assert len(lines(tmp_path, "val/loss")) == len(lines(honest, "val/loss"))
    ends = [files.load(folder / files.NEWEST)["model"] for folder in (honest, tmp_path)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_an_interrupted_run_ends_alike(honest: Path, tiny_run: list[str], tmp_path: Path) -> None:
    words = [*tiny_run, *HONEST]
    train_in(tmp_path, compose([*words, "trainer.epochs=2"]))
    train_in(tmp_path, compose([*words, f"trainer.resume={tmp_path}"]))
    ends = [lines(folder, "best/luck")[-1] for folder in (honest, tmp_path)]
    for name in ("best/epoch", "best/luck", "best/held_out_mAP"):
        assert ends[0][name] == ends[1][name]


def test_trials_are_pruned_by_the_half_that_chooses(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    monkeypatch.setattr(
        "detr_exp.trainer.trial.pruning_check", lambda: lambda epoch, value: bool(seen.append((epoch, value)))
    )
    train_in(tmp_path, compose([*tiny_run, *HONEST, "trainer.epochs=1"]))
    assert seen == [(1, -lines(tmp_path, "val/loss")[0]["val/loss"])]


def test_evaluating_it_gives_both_halves(honest: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    best = min(lines(honest, "val/loss"), key=lambda line: line["val/loss"])
    assert command(evaluate.main, f"checkpoint={honest}", "hydra.run.dir=out") == 0
    found = json.loads(Path("out/metrics.json").read_text())
    for name in ("mAP", "mAR", "mAR_1", "F1"):
        assert (found[name], found[f"held_out/{name}"]) == (best[f"val/{name}"], best[f"held_out/{name}"])
    assert "val is the half of the validation images that has chosen this checkpoint" in capsys.readouterr().out
    assert command(evaluate.main, f"checkpoint={honest}", "data.split=held_out", "hydra.run.dir=alone") == 0
    assert json.loads(Path("alone/metrics.json").read_text())["mAR"] == best["held_out/mAR"]


def test_comparing_uses_the_half_that_has_not_chosen(
    honest: Path, trained: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["resamples=100", "hydra.run.dir=out", "metrics=mAP"]
    assert command(compare.main, f"a={honest}", f"b={honest}", *words) == 0
    assert "held_out split, " in capsys.readouterr().out
    assert command(compare.main, f"a={honest}", f"b={trained}", *words) == 0
    said = capsys.readouterr().out
    assert "val split, 7 images" in said
    assert "warning: all of these images have chosen the epoch of" in said


def test_the_report_says_by_how_much_it_flatters(honest: Path, tmp_path: Path) -> None:
    cfg = compose([f"runs={honest}"], config_name="report")
    page = report_in(tmp_path, cfg).read_text()
    assert "of it was luck" in page
    assert "other half</th>" in page


def test_one_image_cannot_do_both(tiny_run: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot both choose and judge"):
        train_in(tmp_path, compose([*tiny_run, *HONEST, "data.val=1"]))
    assert not any(tmp_path.iterdir())
