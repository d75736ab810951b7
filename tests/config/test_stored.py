"""What an earlier version wrote opens, and keeps its name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.config.stored import as_before, stored, upgraded
from detr_exp.trainer.origin import identity


def before(config: dict) -> dict:
    """As the first version wrote it: the losses were no table, the settings of a training part of its engine."""
    made = copy.deepcopy(config)
    del made["loss"]["terms"]
    made["trainer"]["_target_"] = "detr_exp.trainer.trainer.Trainer"
    return made


@pytest.mark.parametrize(
    "words", [["loss=vfl"], ["loss=ce", "loss.eos_coef=0.3"], ["loss=focal", "loss.weight_giou=1"]]
)
def test_a_config_without_a_table_of_losses_gets_that_of_its_words(words: list[str]) -> None:
    config = build.plain(compose(["data.num_classes=3", *words]))
    assert upgraded(before(config)) == config
    assert as_before(config) == before(config)
    assert identity(config) == identity(before(config))
    assert build.criterion(stored(before(config), Path("run.json"))).weights["giou"] == config["loss"]["weight_giou"]


def test_configs_that_are_not_resolved_are_known_too() -> None:
    for words in (["loss=vfl"], ["loss=ce"]):
        config = OmegaConf.to_container(compose(words), resolve=False)
        assert "terms" not in as_before(config)["loss"]
    assert "terms" in as_before(OmegaConf.to_container(compose(["+loss.terms.giou.divide=pairs"])))["loss"]


def test_another_table_is_another_run() -> None:
    config = build.plain(compose(["data.num_classes=3"]))
    changed = build.plain(compose(["data.num_classes=3", "+loss.terms.giou.divide=pairs"]))
    assert "terms" in as_before(changed)["loss"]
    assert identity(changed) != identity(config)
