"""Every option of every group, and every recipe: it composes, resolves, and what it describes takes every key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from detr_exp.config.compose import CONF_DIR, compose, refuse_unready

SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
RECIPES = ("experiment", "sweep")
TOLD_BY_BUILD = {"model": {"num_classes", "activation"}, "matcher": {"activation"}}
TAKEN_OUT_BY_BUILD = {
    "model": {"weights", "adapter", "class_prior"},
    "metric": {"honest_selection"},
    "teacher": {"cache", "cache_gb"},
}
# words that an option needs beside it, because it refers to keys that the default of another group does not have
EDGES = [f"loss.terms.fgl.function.{word}" for word in ("num_bins=32", "bound=0.5", "scale=4.0")]
BESIDE = {"loss=dfine": EDGES, "loss=deim": EDGES, "loss/terms=dfine": EDGES}
EDGES_OF_TEACHER = [word.replace("fgl.function", "teacher_edges.function.loss") for word in EDGES]
BESIDE |= {"loss/teacher=dfine": EDGES_OF_TEACHER}
READ_BY_A_NODE_INSIDE = "model"  # a group with a constructor of its own, and words that nodes inside refer to


def options() -> list[str]:
    """`group=option` words; sub-groups have a slash."""
    files = [path.relative_to(CONF_DIR) for path in sorted(CONF_DIR.rglob("*.yaml"))]
    return [f"{file.parent}={file.stem}" for file in files if len(file.parts) > 1 and file.parts[0] != "hydra"]


def references(cfg: DictConfig, group: str) -> set[str]:
    """Words of a group that something refers to."""
    return set(re.findall(rf"\$\{{{group}\.(\w+)", str(OmegaConf.to_container(cfg))))


def complete(word: str) -> DictConfig:
    """The config with an option, and with all that a user must give."""
    cfg = compose([word, *BESIDE.get(word, [])])
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "given_by_the_user")
    return cfg


def nodes(values: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`."""
    if isinstance(values, dict):
        if "_target_" in values:
            yield key, values
        for name, value in values.items():
            yield from nodes(value, f"{key}.{name}" if key else str(name))


@pytest.mark.parametrize("word", options())
def test_an_option_fits_what_it_describes_and_names_only_its_own_group(word: str) -> None:
    cfg = complete(word)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    top = word.partition("=")[0].split("/")[0]
    for key, node in nodes(values if top in RECIPES else values[top], "" if top in RECIPES else top):
        is_of_group = node["_target_"].startswith((f"detr_exp.{top}.", "torch.optim."))
        assert top in RECIPES or is_of_group, f"{word}: {key} names {node['_target_']}"
        target = get_object(node["_target_"])
        signature = inspect.signature(target)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if node["_target_"].startswith("detr_exp."):
            assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{node['_target_']} takes anything"
        given = {name: None for name in node if name not in SPECIAL | TAKEN_OUT_BY_BUILD.get(key, set())}
        if key == READ_BY_A_NODE_INSIDE:
            words = references(cfg, key) - set(signature.parameters)
            given = {name: None for name in given if name not in words}
        told = dict.fromkeys(TOLD_BY_BUILD.get(key, ()))
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        try:
            bind(**given, **told)
        except TypeError as error:
            pytest.fail(f"{word}: {key} ({node['_target_']}): {error}")


@pytest.mark.parametrize("path", sorted(CONF_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_config_of_a_command_resolves(path: Path) -> None:
    cfg = compose(config_name=path.stem)
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "given_by_the_user")
    refuse_unready(cfg)


@pytest.mark.parametrize("path", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_gives_and_costs(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines[1:] if line.startswith("#"))
    assert "ublished" in header, "the published number and its source, or that there is none"
    assert f"experiment={path.stem}" in header, "the exact command"
