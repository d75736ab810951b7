"""The table of published weights agrees with itself, with the recipes and with the page of models."""

from __future__ import annotations

import csv
import functools
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from omegaconf import DictConfig

from detr_exp import benchmark
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.config.mistakes import ConfigError
from detr_exp.published.source import of_entry
from detr_exp.published.table import TABLE, UNKNOWN, Entry, named, names, nearest, of_choices, table

ENTRIES = list(table().values())
DETECTORS = [entry for entry in ENTRIES if entry.kind == "detector"]
MODELS = (CONF_DIR.parent / "docs" / "models.md").read_text(encoding="utf-8")
TITLES, _, *ROWS = [line.strip("| ").split(" | ") for line in MODELS.splitlines() if line.startswith("|")]
WEIGHTS = {row[0]: row[TITLES.index("weights")].strip("`") for row in ROWS}  # recipe -> cell of docs/models.md
ALONE = ("rtdetrv2_r50_finetune", "rtdetrv2_r50_finetune_ce")  # their network, with a plain ResNet-50, is our own
HOW_TRAINED = ("freeze", "pretrained", "drop_path")  # keys of a backbone that change none of its tensors
OF_DINOV3 = tuple(f"deimv2_{size}_coco" for size in "smlx")  # weights that contain or distil those of Meta
TUNED = sorted({path.stem for path in (CONF_DIR / "experiment").glob("*_finetune*.yaml")}.difference(ALONE))


def header(recipe: str) -> str:
    return (CONF_DIR / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")


@functools.cache
def composed(*words: str) -> DictConfig:
    """The group `model` for overrides."""
    return compose(words).model


def test_names_are_unique_and_in_order() -> None:
    with open(TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [entry.name for entry in ENTRIES]
    order = [(entry.kind != "detector", entry.name) for entry in ENTRIES]
    assert order == sorted(set(order))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_what_stands_there_can_be_used(entry: Entry) -> None:
    assert entry.kind in ("detector", "backbone")
    assert entry.url or entry.hub
    assert not entry.url or (urlsplit(entry.url).scheme in ("https", "pypi") and Path(entry.file).suffix == ".pth")
    assert re.fullmatch(r"unknown|md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", entry.hash)
    assert re.fullmatch(r"unknown|\d+", entry.size)
    assert bool(entry.hub) == bool(entry.hub_file) == bool(entry.revision)
    assert entry.licence
    options = [path.stem for path in (CONF_DIR / "model" / "backbone").glob("*.yaml")]
    assert entry.backbone.partition(" ")[0] in ("", *options)
    assert not entry.model or (CONF_DIR / "model" / f"{entry.model}.yaml").exists()
    places = [place for source in of_entry(entry) for place in source.places]
    others = [place for e in ENTRIES if e is not entry for source in of_entry(e) for place in source.places]
    assert places
    assert not set(places) & set(others)


def test_the_page_of_models_names_the_weights_of_every_recipe() -> None:
    published = benchmark.published()
    assert list(WEIGHTS) == published
    assert {name: name if name in table() else "none published" for name in published} == WEIGHTS
    assert [name for name, cell in WEIGHTS.items() if cell == "none published"] == ["rtdetrv2_r18vd_120e_voc"]
    named_by_entries = {recipe for entry in DETECTORS for recipe in entry.recipes.split()}
    assert named_by_entries == {*WEIGHTS, *TUNED} - {"rtdetrv2_r18vd_120e_voc"}


@pytest.mark.parametrize("recipe", TUNED)
def test_a_recipe_for_fine_tuning_starts_from_the_entry_that_names_it(recipe: str) -> None:
    (entry,) = (entry for entry in DETECTORS if recipe in entry.recipes.split())
    assert compose([f"experiment={recipe}"]).model.weights == entry.name


@pytest.mark.parametrize("recipe", TUNED)
def test_every_setting_of_a_recipe_for_fine_tuning_has_its_reason(recipe: str) -> None:
    settings = re.findall(r"^ +(?:- override /)?[\w/]+: .*$", header(recipe), re.MULTILINE)
    assert settings
    assert [line for line in settings if not re.search(r" # [^#]{4}", line)] == []


@pytest.mark.parametrize("recipe", [name for name, cell in WEIGHTS.items() if cell != "none published"])
def test_every_published_recipe_has_an_entry_that_says_what_it_says(recipe: str) -> None:
    entry = table()[recipe]
    assert recipe in entry.recipes.split()
    assert entry.published in re.search(r"^# Published: (.*)", header(recipe), re.M)[1]  # type: ignore[index]
    assert entry.licence == ("DINOv3 License" if recipe in OF_DINOV3 else "Apache-2.0")
    assert f"under {entry.licence}" in header(recipe)
    row = next(line for line in MODELS.splitlines() if line.startswith(f"| {recipe} "))
    assert f"| {entry.published} |" in row
    assert WEIGHTS[recipe] in ("published", recipe)


@pytest.mark.parametrize("entry", DETECTORS, ids=lambda entry: entry.name)
def test_recipes_of_an_entry_make_its_network(entry: Entry) -> None:
    for recipe in entry.recipes.split():
        chosen = composed(f"experiment={recipe}", "model.weights=published")
        assert chosen.weights == entry.name or recipe != entry.name
        words = [f"model={entry.model}"] + (f"model/backbone={entry.backbone}".split() if entry.backbone else [])
        made, wanted = (
            {key: value for key, value in model.backbone.items() if not key.startswith(HOW_TRAINED)}
            for model in (chosen, composed(*words))
        )
        assert made == wanted


def test_weights_of_a_network_with_other_settings_are_not_those_of_the_plain_one() -> None:
    assert of_choices({"model": "dfine_n", "model/backbone": "hgnetv2_b0"}).name == "dfine_n_coco"
    assert table()["deim_dfine_n_coco"].backbone.endswith("model.head_activation=silu")
    assert table()["rtdetrv4_s_coco"].file == "rtdetrv4_s_coco.pth"  # its address has a number


def test_words_mean_one_entry() -> None:
    assert all(names()[name] == name for name in table())
    for word, name in {
        "rf-detr-nano": "rfdetr_nano_coco",
        "rf-detr-seg-xxlarge": "rfdetr_seg_2xlarge_coco",
        "rtdetr_v2_r18vd": "rtdetrv2_r18vd_120e_coco",
        "rrtdetrv2_r34vd_dsp_1x_coco": "rtdetrv2_r34vd_dsp_1x_coco",
    }.items():
        found = named(word)
        assert found is not None
        assert found.name == name
    assert named("checkpoint_best_regular") is None  # three files are called so


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("rtdetrv2_r18vd_120e_cocco", "rtdetrv2_r18vd_120e_coco"),
        ("rtdetrv2-r50vd-6x", "rtdetrv2_r50vd_6x_coco"),
        ("RFDETR_NANO", "rfdetr_nano_coco"),
        ("keypoint", "rfdetr_keypoint_coco"),
    ],
)
def test_near_names_are_found(word: str, meant: str) -> None:
    assert meant in nearest(word)


def test_published_needs_one_candidate() -> None:
    assert of_choices({"model": "rfdetr_large", "model/backbone": "dinov2_windowed_small"}).name == "rfdetr_large_coco"
    with pytest.raises(ConfigError, match=r"8 are published.*model\.weights=rtdetrv2_r50vd_6x_coco"):
        compose(["model=rtdetrv2", "model/backbone=r50vd", "model.weights=published"])
    with pytest.raises(ConfigError, match=r"nothing is published for model=rtdetrv2_tiny.*model\.weights=<file>"):
        compose(["model=rtdetrv2_tiny", "model.weights=published"])
    with pytest.raises(ConfigError, match="4 are published for model=rtdetrv2 model/backbone=r101vd"):
        compose(["experiment=rtdetrv2_r18vd_120e_coco", "model/backbone=r101vd", "model.weights=published"])


def test_traps_of_the_published_files() -> None:
    assert table()["rtdetrv2_r18vd_120e_coco"].url.endswith("/v0.2/rtdetrv2_r18vd_120e_coco_rerun_48.1.pth")
    assert table()["rtdetrv2_r34vd_dsp_1x_coco"].file.startswith("rrtdetrv2_r34vd")
    assert table()["rfdetr_large_coco"].file == "rf-detr-large-2026.pth"
    assert sum(entry.hash != UNKNOWN for entry in ENTRIES) == 15
