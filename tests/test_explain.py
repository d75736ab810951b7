"""Where values come from, and where a run leaves its recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp import explain, train
from detr_exp.config.compose import CONF_DIR
from detr_exp.explain import explain as say

RECIPE = "experiment=rtdetrv2_r18vd_120e_coco"


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_files_that_set_a_value_in_order() -> None:
    said = rows(say(["key=optim.lr", RECIPE, "optim.lr=3e-4"]))
    assert said[0] == ["optim.lr", "=", "0.0003"]
    assert said[1] == ["conf/optim/adamw.yaml", "0.0001"]
    assert said[-1] == ["command", "line:", "optim.lr=3e-4", "0.0003", "<-", "counts"]
    for where, *_ in said[1:-1]:
        assert (CONF_DIR.parent / where).is_file()


def test_a_reference_is_followed() -> None:
    said = say(["key=loss.class_loss.gamma", "loss=focal", "loss.focal_gamma=1.5"])
    assert "loss.class_loss.gamma = 1.5\n  conf/loss/focal.yaml  ${loss.focal_gamma}\nloss.focal_gamma = 1.5" in said


def test_a_section_names_the_file_of_every_value() -> None:
    said = rows(say(["key=model/backbone", "model/backbone=r50vd", "model=rtdetrv2", "model.backbone.freeze_at=0"]))
    assert said[0] == ["model/backbone=r50vd"]
    assert ["model.backbone.depth", "50", "conf/model/backbone/r50vd.yaml"] in said
    assert ["model.backbone.freeze_at", "0", "command", "line:", "model.backbone.freeze_at=0"] in said


def test_the_differences_from_a_recipe() -> None:
    said = say([RECIPE, "data.root=/x", "loss=focal", "trainer.epochs=3"])
    assert f"from its recipe, {RECIPE}" in said
    assert ["loss", "vfl", "->", "focal"] in rows(said)
    assert ["trainer.epochs", "120", "->", "3"] in rows(said)
    assert "data.root" not in said, "everybody has to give it"
    assert say([RECIPE]) == f"it does not differ from its recipe, {RECIPE}"


def test_a_run(command: Callable[..., int], tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train.main, *tiny_run, "seed=null", "hydra.run.dir=run") == 0
    capsys.readouterr()
    assert command(explain.main, "run=run", "key=seed") == 0
    said = capsys.readouterr().out
    assert "the run recorded" in said, "a seed that was drawn"
    assert ["trainer.epochs", "12", "->", "1"] in rows(said)
    assert "from the defaults of model=rtdetrv2_tiny data=shapes" in said
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["key=optim.lrr"], "did you mean key=optim.lr?"),
        (["trainer.epoch=3"], "did you mean trainer.epochs?"),
        (["run=absent"], "is no folder"),
    ],
)
def test_mistakes(command: Callable[..., int], capfd: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert command(explain.main, *words) == 2
    assert told in capfd.readouterr().err
