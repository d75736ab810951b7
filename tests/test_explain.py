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
    printed = rows(say(["key=optim.lr", RECIPE, "optim.lr=3e-4"]))
    assert printed[0] == ["optim.lr", "=", "0.0003"]
    assert printed[1] == ["conf/optim/adamw.yaml", "0.0001"]
    assert printed[-1] == ["command", "line:", "optim.lr=3e-4", "0.0003", "<-", "counts"]
    for where, *_ in printed[1:-1]:
        assert (CONF_DIR.parent / where).is_file()


def test_a_reference_is_followed() -> None:
    printed = say(["key=loss.class_loss.gamma", "loss=focal", "loss.focal_gamma=1.5"])
    assert "loss.class_loss.gamma = 1.5\n  conf/loss/focal.yaml  ${loss.focal_gamma}\nloss.focal_gamma = 1.5" in printed


def test_a_section_names_the_file_of_every_value() -> None:
    printed = rows(say(["key=model/backbone", "model/backbone=r50vd", "model=rtdetrv2", "model.backbone.freeze_at=0"]))
    assert printed[0] == ["model/backbone=r50vd"]
    assert ["model.backbone.depth", "50", "conf/model/backbone/r50vd.yaml"] in printed
    assert ["model.backbone.freeze_at", "0", "command", "line:", "model.backbone.freeze_at=0"] in printed


@pytest.mark.parametrize("recipe", ["dfine_s_coco", "deim_dfine_s_coco"])
def test_a_loss_with_a_sub_group_names_its_files(recipe: str) -> None:
    printed = rows(say([f"experiment={recipe}", "key=loss", "loss.weight_fgl=0.2"]))
    assert ["loss.weight_fgl", "0.2", "command", "line:", "loss.weight_fgl=0.2"] in printed
    assert ["loss.weight_ddf", "1.5", "conf/loss/terms/dfine.yaml"] in printed
    assert ["loss.weight_bbox", "5.0", "conf/loss/terms/detr.yaml"] in printed


def test_the_differences_from_a_recipe() -> None:
    printed = say([RECIPE, "data.root=/x", "loss=focal", "trainer.epochs=3"])
    assert f"from its recipe, {RECIPE}" in printed
    assert ["loss", "vfl", "->", "focal"] in rows(printed)
    assert ["trainer.epochs", "120", "->", "3"] in rows(printed)
    assert "data.root" not in printed, "every user has to give it"
    assert say([RECIPE]) == f"it does not differ from its recipe, {RECIPE}"


def test_a_run(command: Callable[..., int], tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train.main, *tiny_run, "seed=null", "hydra.run.dir=run") == 0
    capsys.readouterr()
    assert command(explain.main, "run=run", "key=seed") == 0
    printed = capsys.readouterr().out
    assert "the run recorded" in printed, "a sampled seed"
    assert ["trainer.epochs", "12", "->", "1"] in rows(printed)
    assert "from the defaults of model=rtdetrv2_tiny data=shapes" in printed
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["key=optim.lrr"], "did you mean key=optim.lr?"),
        (["trainer.epoch=3"], "did you mean trainer.epochs?"),
        (["run=absent"], "is no folder"),
    ],
)
def test_mistakes(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert command(explain.main, *overrides) == 2
    assert message in capfd.readouterr().err
