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
from detr_exp.compare import Side, config_difference, spread, statistics
from detr_exp.config.compose import compose
from detr_exp.runs.past import PastRun
from detr_exp.tracker.base import RunRecord
from detr_exp.training import train_in

Command = Callable[..., int]


def past(name: str, **config: object) -> PastRun:
    return PastRun(Path(name), RunRecord(id=name, project="p", name=name), dict(config), [])


def side(*values: float, noise: float = 0.02, seed: int = 0, classes: int = 3) -> Side:
    """Runs whose classes have these APs, and draws that all sides share but for a little of their own."""
    shared = np.random.default_rng(9).normal(0, 0.1, (200, classes))
    own = np.random.default_rng(seed).normal(0, noise, (len(values), 200, classes))
    ap = np.tile(np.array(values)[:, None], (1, classes))
    return Side([past(str(value)) for value in values], ap, ap[:, None] + shared + own)


def test_pairs_tell_what_each_side_alone_could_not() -> None:
    found = statistics(side(0.50), side(0.55, seed=1), ["a", "b", "c"], 0.95)
    assert found["difference"] == pytest.approx(0.05)
    low, high = found["interval"]
    assert 0 < low < 0.05 < high < 0.1, "though every side varies by 0.1"
    assert found["b_is_better_in"] == 1.0
    assert {row["class"] for row in found["classes"]} == {"a", "b", "c"}
    assert "b is better" in compare.text({**found, "split": "val", "config": []})


def test_seeds_that_scatter_widen_the_interval() -> None:
    alone = statistics(side(0.5), side(0.55, seed=1), ["a"] * 3, 0.95)
    scattered = statistics(side(0.4, 0.5, 0.6), side(0.45, 0.55, 0.65, seed=1), ["a"] * 3, 0.95)
    assert scattered["difference"] == pytest.approx(alone["difference"])
    assert scattered["interval"][0] < 0 < scattered["interval"][1]
    assert "no difference can be told" in compare.text({**scattered, "split": "val", "config": []})


def test_a_class_without_objects_is_left_out() -> None:
    a, b = side(0.5), side(0.6, seed=1)
    for one in (a, b):
        one.ap[:, 1], one.drawn[:, :, 1] = np.nan, np.nan
    found = statistics(a, b, ["a", "b", "c"], 0.95)
    assert [row["class"] for row in found["classes"]] in (["a", "c"], ["c", "a"])
    assert found["difference"] == pytest.approx(0.1)


def test_mean_and_deviation() -> None:
    assert spread([0.5]) == "0.5000"
    assert spread([0.4, 0.6]) == "0.5000 +- 0.1414 (2 runs)"


def test_settings_that_differ_between_sides() -> None:
    a = [past("1", seed=0, optim={"lr": 1}, tracker={"run": "x"}), past("2", seed=1, optim={"lr": 1})]
    b = [past("3", seed=0, optim={"lr": 2, "warmup": None}), past("4", seed=1, optim={"lr": 2, "warmup": None})]
    assert config_difference(a, b) == [("optim.lr", "1", "2"), ("optim.warmup", "-", "null")]


def test_a_run_against_itself_and_another(
    command: Command, trained: Path, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in(tmp_path / "other", compose([*tiny_run, "loss=focal"]))
    words = ["resamples=20", "hydra.run.dir=out"]
    assert command(compare.main, f"a={trained}", f"b={trained}", *words) == 0
    found = json.loads(Path("out/compare.json").read_text())
    assert (found["difference"], found["interval"], found["config"]) == (0.0, [0.0, 0.0], [])
    for torn, name in (("torn1", "checkpoint_best_total.pth"), ("torn2", "run.json")):
        shutil.copytree(trained, torn)
        os.truncate(Path(torn) / name, 100)
    assert command(compare.main, f"a=[{trained},torn1,other,torn2]", "b=other", "data.split=train", *words) == 0
    said = capsys.readouterr().out
    assert "left out: torn1/checkpoint_best_total.pth is truncated" in said
    assert "train split" in said
    assert "(2 runs)" in said
    assert "loss.class_loss._target_" in said
    found = json.loads(Path("out/compare.json").read_text())
    assert len(found["a"]["runs"]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "a, b must be given"),
        (["a=absent", "b=absent"], "absent is no folder"),
        (["a=x", "b=y", "level=2"], "level=0.95"),
    ],
)
def test_mistakes(command: Command, capfd: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert command(compare.main, *words) == 2
    assert told in capfd.readouterr().err


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
