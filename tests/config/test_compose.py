"""Composed configs, and messages for mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detr_exp.config import compose as composing
from detr_exp.config.compose import Composer, compose, composition, config_loader, refuse_unready
from detr_exp.config.mistakes import ConfigError, parse_overrides


def message(*words: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words, config_dir=config_dir)
    return str(caught.value)


def test_the_bare_config_is_complete() -> None:
    cfg = compose()
    refuse_unready(cfg)
    assert {"model", "loss", "matcher", "optim", "data", "metric", "trainer", "tracker", "seed"} <= set(cfg)
    assert "hydra" not in cfg


def test_overrides_choose_and_set() -> None:
    cfg = compose(["loss=focal", "loss.focal_gamma=1.5", "optim/scheduler=cosine", "model.image_size=[320,320]"])
    assert cfg.loss.class_loss._target_.endswith(".focal")
    assert OmegaConf.to_container(cfg, resolve=True)["loss"]["class_loss"]["gamma"] == 1.5  # type: ignore[index, call-overload]
    assert cfg.optim.scheduler._target_.endswith(".cosine")
    assert cfg.model.image_size == [320, 320]


def test_later_overrides_win() -> None:
    assert compose(["seed=1", "seed=2"]).seed == 2


def test_entries_can_be_added_to_open_mappings() -> None:
    cfg = compose(["+optim.param_groups.heads={match: head, lr_factor: 2.0}"])
    assert cfg.optim.param_groups.heads.lr_factor == 2.0
    assert "norm" in cfg.optim.param_groups


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # keys
        (["loss.focal_gama=1"], ["no key loss.focal_gama", "did you mean loss.focal_gamma?", "loss=vfl has:"]),
        (["optm.lr=1e-3"], ["did you mean optim.lr?"]),
        (["epochs=5"], ["did you mean trainer.epochs"]),
        (["gamma=5"], ["did you mean", "loss.focal_gamma?"]),
        (["loss=ce", "loss.focal_gamma=2"], ["loss=ce has no key focal_gamma", "loss=focal", "loss=vfl", "have it"]),
        (["+loss.zzz=1"], ["loss=vfl has no key loss.zzz"]),
        (["+zzz=1"], ["no key zzz"]),
        (["+trainer.epochs=3"], ["exists already", "trainer.epochs=3"]),
        (["~trainer.epoch"], ["did you mean trainer.epochs?"]),
        # options
        (["model=rtdetrv3"], ["model=rtdetrv3 does not exist", "did you mean model=rtdetrv2?", "rtdetrv2_tiny"]),
        (["modle=rtdetrv2"], ["did you mean model"]),
        (["model/bacbone=r18vd"], ["no group model/bacbone", "did you mean model/backbone?"]),
        (["backbone=r18vd"], ["did you mean model/backbone=...?"]),
        (["model.backbone=r18vd"], ["with a slash: model/backbone=r18vd"]),
        (["trainer.hardware=cpu"], ["with a slash: trainer/hardware=cpu"]),
        (["trainer/hardware=gpu"], ["did you mean trainer/hardware=cuda?"]),
        (["data.root=/nowhere/größe"], ["no such file or folder", "letters outside of ASCII"]),
        (["trainer=cpu"], ["did you mean trainer/hardware=cpu?"]),
        (["+experiment=demo"], ["without '+': experiment=demo"]),
        (["experiment=dmo"], ["did you mean experiment=demo?"]),
        (["~loss"], ["every run needs a loss"]),
        (["loss=null"], ["loss=null chooses nothing", "options of loss: bce"]),
        (["optim/scheduler=null"], ["optim/scheduler=null chooses nothing"]),
        (["hydra.run.dir="], ["hydra.run.dir= is not a folder"]),
        (["loss=[vfl,focal]"], ["loss=[vfl,focal] does not exist"]),
        # values
        (["trainer.epochs=ten"], ["takes a number: trainer.epochs="]),
        (["trainer.epochs=true"], ["takes a number"]),
        (["seed=None"], ["takes a number"]),
        (["trainer.use_ema=no"], ["takes true or false"]),
        (["trainer.max_steps=None"], ["written null: trainer.max_steps=null"]),
        (["model.weights="], ["model.weights is empty", "or model.weights=null"]),
        (["data=coco", "data.root="], ["data.root is empty", "give a value"]),
        (["trainer.max_steps=nan"], ["read as a number", "'trainer.max_steps=\"nan\"'"]),
        (["model.image_size=320"], ["takes a list: 'model.image_size=[320,320]'"]),
        (["optim.param_groups=3"], ["set one of them: optim.param_groups.norm"]),
        # spelling
        (["trainer.epochs"], ["has no '='", "trainer.epochs=..."]),
        (["data.root=/a", "b/c"], ["has no '='", "'data.root=\"/a b/c\"'"]),
        (["data.root=/a(b)/c"], ["cannot be read", "'data.root=\"/a(b)/c\"'"]),
        (["data.root=/a=b"], ["cannot be read", "'data.root=\"/a=b\"'"]),
        (["data.root=~/x"], ["home", "data.root=$HOME/x"]),
        (["model/backbone.depth=18"], ["two spellings", "model/backbone/depth=", "model.backbone.depth="]),
        (["loss.focal_gamma=1,2"], ["several values", "--multirun"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_messages_tell_how_to_fix_a_mistake(words: list[str], parts: list[str]) -> None:
    told = message(*words)
    assert all(part in told for part in parts), told
    assert "hydra.cc" not in told
    assert "Traceback" not in told


@pytest.fixture
def own_configs(tmp_path: Path) -> Path:
    """A recipe that sets a key which only some losses have."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\ndefaults:\n  - override /loss: focal\n  - _self_\nloss:\n  focal_gamma: 0.5\n"
    (folder / "experiment" / "mine.yaml").write_text(recipe)
    return folder


def test_a_user_defined_recipe(own_configs: Path) -> None:
    cfg = compose(["experiment=mine", "seed=3"], config_dir=own_configs)
    assert cfg.loss.focal_gamma == 0.5
    assert cfg.seed == 3


def test_values_of_a_recipe_do_not_survive_another_choice(own_configs: Path) -> None:
    told = message("experiment=mine", "loss=ce", config_dir=own_configs)
    assert f"{own_configs}/experiment/mine.yaml sets loss.focal_gamma, which loss=ce does not have" in told
    assert "eos_coef" in told
    assert "~loss.focal_gamma" in told
    cfg = compose(["experiment=mine", "loss=ce", "~loss.focal_gamma"], config_dir=own_configs)
    assert "focal_gamma" not in cfg.loss


def test_a_file_that_cannot_be_read_is_named(own_configs: Path) -> None:
    (own_configs / "experiment" / "mine.yaml").write_text("# @package _global_\nloss: [\n")
    assert "mine" in message("experiment=mine", config_dir=own_configs)
    (own_configs / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /loss: nix\n")
    assert "nix" in message("experiment=mine", config_dir=own_configs)


def test_a_folder_of_configs_that_is_not_there(tmp_path: Path) -> None:
    assert "not a folder" in message(config_dir=tmp_path / "absent")


def test_missing_values_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"data\.root must be given: data\.root=\.\.\."):
        refuse_unready(compose(["data=coco"]))


def test_references_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        refuse_unready(compose(["optim.lr=${nowhere}"]))


def test_sources_say_where_a_config_comes_from(own_configs: Path) -> None:
    composed = composition(config_loader(own_configs), "config", ["experiment=mine"])
    files = [source.file for source in composed.sources]
    assert "conf/loss/focal.yaml" in files
    assert files[-1] == f"{own_configs}/experiment/mine.yaml"
    assert composed.choices["loss"] == "focal"
    assert composed.choices["experiment"] == "mine"


def test_what_was_composed_before_changes_nothing() -> None:
    lines = [
        ["loss=focal", "loss.focal_gamma=1", "trainer.epochs=3", "seed=4", "experiment=demo"],
        ["loss=ce", "+optim.param_groups.x.match=y"],
        [],
    ]
    composer = Composer(config_loader(), "config", [])
    for words in [*lines, *lines]:
        again, apart = composer.compose(parse_overrides(words)), composition(config_loader(), "config", words)
        assert again == apart


def test_composing_agrees_with_hydra() -> None:
    """The commands run what Hydra composes; we check what we compose."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    words = [
        "model=rtdetrv2",
        "loss=ce",
        "loss.eos_coef=0.2",
        "optim/scheduler=cosine",
        "+optim.param_groups.x.match=y",
    ]
    with initialize_config_dir(str(composing.CONF_DIR), version_base="1.3"):
        theirs = hydra_compose("config", words)
    assert compose(words) == theirs
