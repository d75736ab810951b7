"""Whether one run is better than another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_exp import compare, evaluate
from detr_exp.config.compose import compose
from detr_exp.training import train_in
from detr_exp.values import Values
from tests.conftest import TINY_RUN

Command = Callable[..., int]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """The folder of two settings with two seeds each, one of them that of `trained`."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(trained, folder / "0")
    for number, words in enumerate((["seed=1"], ["loss=focal"], ["seed=1", "loss=focal"]), 1):
        train_in(folder / str(number), compose([*TINY_RUN, *words]))
    return folder


def result() -> Values:
    return json.loads(Path("out/compare.json").read_text())


WORDS = ["resamples=100", "hydra.run.dir=out"]


def test_a_run_against_itself(command: Command, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(compare.main, f"a={trained}", f"b={trained}", *WORDS) == 0
    assert f"on both sides: {trained}" in capsys.readouterr().out
    found = result()
    assert (found["difference"], found["interval"], found["config"]) == (0.0, [0.0, 0.0], [])
    assert found["verdict"] == "equal"


def test_seeds_on_both_sides(command: Command, sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = "metrics=[mAP50,mAP,mAP_small,F1,val/mAP_medium,AP/kite,mAR_large]"
    a, b = f"a=[{sweep}/0,{sweep}/1]", f"b=[{sweep}/2,{sweep}/3]"
    assert command(compare.main, a, b, metrics, "data.split=train", *WORDS) == 0
    found = result()
    names = ["mAP50", "mAP", "mAP_small", "F1", "mAP_medium", "AP/kite", "mAR_large"]
    assert [row["metric"] for row in found["metrics"]] == names
    assert (found["paired"], found["about"], found["images"]) == (True, "settings", 8)
    assert found["b"]["seeds"] == [0, 1]
    for row in found["metrics"]:
        if row["difference"] is not None:
            a, b = (np.mean(found[name][row["metric"]]) for name in "ab")
            assert row["difference"] == pytest.approx(b - a)
    assert [row["images_drawn"] for row in found["metrics"]] == [True, True, True, False, True, True, False]
    large = found["metrics"][-1]
    assert (large["a"], large["difference"], large["verdict"]) == (None, None, "unknown"), "no such objects, no claim"
    assert 0 < found["metrics"][5]["images"] < 8, "those that show a kite"
    said = capsys.readouterr().out
    assert "train split, 8 images, 100 bootstrap resamples" in said
    assert "in pairs: 0, 1" in said
    assert "loss.class_loss._target_" in said
    command(evaluate.main, f"checkpoint={sweep}/2", "data.split=train", "hydra.run.dir=alone")
    alone = json.loads(Path("alone/metrics.json").read_text())
    for name in ("mAP50", "mAP", "F1", "AP/kite"):
        assert found["b"][name][0] == pytest.approx(alone[name])


@pytest.mark.slow
def test_each_point_of_a_sweep_against_a_run(command: Command, trained: Path, sweep: Path) -> None:
    assert command(compare.main, f"a={trained}", f"b={sweep}", *WORDS) == 0
    found = result()
    assert [one["counts"] for one in found["comparisons"]] == [[1, 2], [1, 2]]
    assert [[Path(run).name for run in one["b"]["runs"]] for one in found["comparisons"]] == [["0", "1"], ["2", "3"]]
    assert "difference" not in found
    assert command(compare.main, f"a={sweep}", f"b={sweep}", *WORDS) == 0
    assert [one["difference"] for one in result()["comparisons"]] == [0.0, 0.0], "each setting with itself"


def test_damaged_runs_and_copies_are_named_and_left_out(
    command: Command, trained: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for torn, name in (("torn1", "checkpoint_best_total.pth"), ("torn2", "run.json")):
        shutil.copytree(trained, torn)
        os.truncate(Path(torn) / name, 100)
    shutil.copytree(trained, "copy")
    assert command(compare.main, f"a=[{trained},torn1,{sweep}/2,torn2,copy]", f"b={sweep}/2", *WORDS) == 0
    said = capsys.readouterr().out
    assert "left out: torn1/checkpoint_best_total.pth is truncated" in said
    assert "left out: copy has the seed and the results of another run of its side" in said
    assert "the runs of a differ by more than their seed (loss." in said
    assert len(result()["a"]["runs"]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "a, b must be given"),
        (["a=absent", "b=absent"], "absent is no folder"),
        (["a=x", "b=y", "level=2"], "level=0.95"),
        (["a=x", "b=y", "margin=0"], "margin=0.01"),
    ],
)
def test_mistakes(command: Command, capfd: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert command(compare.main, *words) == 2
    assert told in capfd.readouterr().err


def test_a_metric_that_no_evaluator_gives(command: Command, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("segm_mAP", "mApp"):
        assert command(compare.main, f"a={trained}", f"b={trained}", f"metrics={name}") == 2
        assert f"gives no {name}; it gives mAP, mAP50" in capfd.readouterr().err
    assert command(compare.main, f"a={trained}", f"b={trained}", "metrics=AP/Kite") == 2
    assert "gives no AP/Kite; it gives AP/arrow, AP/kite" in capfd.readouterr().err


def test_a_diverged_network_has_nothing_to_compare(
    command: Command, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does an evaluation give it a number: the official tool matches boxes of NaN with everything."""
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    state = torch.load(broken / "checkpoint_best_total.pth", weights_only=True)
    state["model"] = {name: tensor * float("nan") for name, tensor in state["model"].items()}
    torch.save(state, broken / "checkpoint_best_total.pth")
    assert command(compare.main, f"a={trained}", f"b={broken}") == 2
    assert "not finite, so it has no result to compare" in capfd.readouterr().err
    assert command(evaluate.main, f"checkpoint={broken}", f"hydra.run.dir={tmp_path}/out") == 0
    values = json.loads((tmp_path / "out/metrics.json").read_text())
    assert values["mAP"] is values["mAP50"] is None
    assert values["nonfinite"] > 0
