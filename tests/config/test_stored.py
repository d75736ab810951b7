"""What an earlier version wrote opens, and keeps its name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from detr_exp import build
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.stored import as_first_version, stored, upgraded
from detr_exp.trainer.origin import identity


def before(config: dict) -> dict:
    """As the first version wrote it: no table of losses, no decoder apart, settings of a training in its engine,
    all validation images choosing, no choice of products, classes starting as published, one stage, no phases, no
    balance of classes, every image stretched, evaluations of all images at ends of epochs, of three channels, no
    operations of images."""
    made = copy.deepcopy(config)
    del made["loss"]["terms"], made["model"]["decoder"], made["metric"]["honest_selection"]
    made.pop("teacher", None)
    del made["trainer"]["hardware"]["products"]
    for key in ("class_prior", "box_noise_fold", "head_activation", "position_layers"):
        made["model"].pop(key, None)
    del made["loss"]["class_weights"], made["data"]["repeat_threshold"], made["data"]["keep_empty"]
    del made["data"]["phases"], made["data"]["fit"], made["data"]["tiles"], made["trainer"]["restart_epoch"]
    del made["trainer"]["eval_every_steps"], made["trainer"]["checkpoint_in_background"], made["data"]["val_sample"]
    del made["data"]["channels"], made["data"]["augment"]["operations"]
    made["trainer"]["_target_"] = "detr_exp.trainer.trainer.Trainer"
    return made


@pytest.mark.parametrize(
    "words", [["loss=vfl"], ["loss=ce", "loss.eos_coef=0.3"], ["loss=focal", "loss.weight_giou=1"]]
)
def test_a_config_without_a_table_of_losses_gets_the_derived_one(words: list[str]) -> None:
    config = build.plain(compose(["data.num_classes=3", *words]))
    assert upgraded(before(config)) == config
    assert as_first_version(config) == before(config)
    assert identity(config) == identity(before(config))
    assert build.criterion(stored(before(config), Path("run.json"))).weights["giou"] == config["loss"]["weight_giou"]


def test_configs_that_are_not_resolved_are_known_too() -> None:
    for words in (["loss=vfl"], ["loss=ce"]):
        config = OmegaConf.to_container(compose(words), resolve=False)
        assert "terms" not in as_first_version(config)["loss"]
        assert "decoder" not in as_first_version(config)["model"]
    assert "terms" in as_first_version(OmegaConf.to_container(compose(["+loss.terms.giou.divide=pairs"])))["loss"]


def test_another_table_is_another_run() -> None:
    config = build.plain(compose(["data.num_classes=3"]))
    changed = build.plain(compose(["data.num_classes=3", "+loss.terms.giou.divide=pairs"]))
    assert as_first_version(changed)["loss"] == {k: v for k, v in changed["loss"].items() if k != "class_weights"}
    assert identity(changed) != identity(config)


def test_other_images_to_choose_by_are_another_run() -> None:
    config, changed = (
        build.plain(compose(["data.num_classes=3", *words])) for words in ([], ["metric.honest_selection=true"])
    )
    assert as_first_version(changed)["metric"] == changed["metric"]
    assert identity(changed) != identity(config)
    assert upgraded({"loss": config["loss"]}).keys() == {"loss"}


FAMILIES = ("rtdetrv2", "rfdetr")  # those that earlier versions had
MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml") if path.stem.startswith(FAMILIES))


@pytest.mark.parametrize("model", MODELS)
def test_a_config_without_a_decoder_gets_the_derived_one(model: str) -> None:
    config = build.plain(compose(["data.num_classes=3", f"model={model}", "model.num_layers=2", "model.num_heads=2"]))
    old = before(config)
    assert config["model"]["decoder"]["num_heads"] == 2
    assert upgraded(old) == config
    assert as_first_version(config) == old
    assert identity(config) == identity(old)


def test_another_decoder_is_another_run() -> None:
    config = build.plain(compose(["data.num_classes=3"]))
    changed = build.plain(compose(["data.num_classes=3", "model.decoder.num_heads=2"]))
    assert as_first_version(changed)["model"]["decoder"] == changed["model"]["decoder"]
    assert identity(changed) != identity(config)


@pytest.mark.parametrize("words", [["model=rtdetrv2_tiny", "model.num_points=[2,2,2]"], ["model=rfdetr_seg_tiny"]])
def test_a_network_of_an_earlier_config_is_the_same(words: list[str]) -> None:
    config = build.plain(compose(["data.num_classes=3", *words]))
    networks = []
    for values in (config, before(config)):
        torch.manual_seed(0)
        networks.append(build.network(stored(values, Path("run.json"))).state_dict())
    assert list(networks[0]) == list(networks[1])
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_user_files_copied_before_there_was_a_decoder_still_work(tmp_path: Path) -> None:
    """The keys are in the file, but no node refers to them."""
    (tmp_path / "model").mkdir()
    words = OmegaConf.to_container(compose(["model=rtdetrv2_tiny"]).model, resolve=False)
    del words["decoder"]
    (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump(words))
    cfg = compose(["model=mine", "data.num_classes=3", "model.num_layers=1", "model.eval_idx=0"], config_dir=tmp_path)
    assert len(build.network(cfg).decoder.layers) == 1
    with pytest.raises(ConfigError, match=r"model\.further, which nothing reads"):
        build.network(OmegaConf.merge(OmegaConf.create({**cfg}, flags={"struct": False}), {"model": {"further": 1}}))
