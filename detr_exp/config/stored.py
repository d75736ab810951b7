"""Configs out of files: nothing in them is a reference, and what earlier versions called otherwise has today's name."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detr_exp.config.compose import CONF_DIR
from detr_exp.config.mistakes import ConfigError
from detr_exp.values import Values, values_of

MOST_VALUES = 100_000  # of a stored config; ours have some hundreds
RENAMED = {  # what a `_target_` was called once -> what it is called now
    "detr_exp.trainer.trainer.Trainer": "detr_exp.trainer.settings.Settings",
}
DERIVED = {"loss": "terms", "model": "decoder"}  # group -> node that is made of the words around it, once the only ones
DECODERS = {  # network -> the option of model/decoder that says what was once part of it
    "detr_exp.model.rtdetrv2.RTDETRv2": "rtdetr",
    "detr_exp.model.rfdetr.RFDETR": "rfdetr",
    "detr_exp.model.rfdetr_keypoint.RFDETRKeypoint": "rfdetr_keypoint",
}


def stored(values: object, file: Path) -> DictConfig:
    """A config out of a file, which was resolved when it was written, so that nothing in it is a reference.

    Args:
        values: what the file holds.
        file: its path, for messages.

    Raises:
        ConfigError: it is no config.
    """
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{file} holds no config but {type(values).__name__}; give another run or checkpoint")
    try:
        return OmegaConf.create(literal(upgraded(values)))
    except ConfigError as error:
        raise ConfigError(f"the config in {file} {error}; give another run or checkpoint") from None


def literal(value: Any, room: Iterator[int] | None = None) -> Any:
    """Nested plain values for a config, in which whatever looks like a reference is text.

    Raises:
        ConfigError: there are other values, or more of them than a config has.
    """
    room = iter(range(MOST_VALUES)) if room is None else room
    if next(room, None) is None:
        raise ConfigError(f"has more than {MOST_VALUES} values")
    if isinstance(value, dict) and all(isinstance(name, str | int) for name in value):
        return {name: literal(inner, room) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal(inner, room) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(f"holds {type(value).__name__} among its values")


def upgraded(config: Values) -> Values:
    """A resolved config, or some of its groups, in today's words.

    The losses were no table once, but what `loss.class_loss` and the weights said; the decoder was part of its network.
    """
    return with_derived_nodes(_renamed(config, RENAMED), resolved=True)


def with_derived_nodes(config: Values, *, resolved: bool) -> Values:
    """A config with the nodes that are made of the words around them where it has only the words.

    Args:
        config: plain values, of the whole config or some of its groups.
        resolved: write values into these nodes instead of references.
    """
    made = dict(config)
    for group, name in DERIVED.items():
        words = config.get(group)
        if isinstance(words, dict) and name not in words and (node := derived_node(group, words, resolved)) is not None:
            made[group] = {**words, name: node}
    return made


def as_first_version(config: Values) -> Values:
    """A config as the first version wrote it, where it could have: what names a run has to stay its name.

    Args:
        config: plain values, resolved or not.
    """
    made = _renamed(config, {now: once for once, now in RENAMED.items()})
    for group, name in DERIVED.items():
        words = made.get(group)
        if isinstance(words, dict) and name in words:
            rest = {key: value for key, value in words.items() if key != name}
            if words[name] in (derived_node(group, rest, resolved) for resolved in (True, False)):
                made[group] = rest
    return made


def _renamed(config: Values, names: Mapping[str, str]) -> Values:
    """A config whose groups call their targets by other names; only groups: stored values can have any depth."""
    found = {group: node.get("_target_") for group, node in config.items() if isinstance(node, Mapping)}
    moved = {group: names[name] for group, name in found.items() if isinstance(name, str) and name in names}
    return {**config, **{group: {**config[group], "_target_": name} for group, name in moved.items()}}


def derived_node(group: str, words: Values, resolved: bool) -> Values | None:
    """The node that a group's words say; None where they say none, or one of them is missing.

    Args:
        group: a key of `DERIVED`.
        words: the group without that node.
        resolved: values instead of references to the words.
    """
    if group == "loss":
        file = "loss/terms/detr.yaml" if "class_loss" in words else None
    else:
        option = DECODERS.get(str(words.get("_target_")))
        file = None if option is None else f"model/decoder/{option}.yaml"
    if file is None:
        return None
    node = copy.deepcopy(_node_in_file(file, DERIVED[group]))
    if words.get("eos_coef") is not None and group == "loss":
        node["class"] |= {"divide": "queries", "background": "${loss.eos_coef}"}
    if not resolved:
        return node
    try:
        cfg = OmegaConf.create({group: {**literal(words), DERIVED[group]: node}})
        return values_of(cfg[group][DERIVED[group]])
    except (ValueError, KeyError, OmegaConfBaseException):
        return None


@functools.cache
def _node_in_file(file: str, name: str) -> Values:
    """A node in an option's file, on top of what is in those it builds on."""
    path = CONF_DIR / file
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    bases = [base for base in content.get("defaults", []) if base != "_self_"]
    node = content.get(name, {})
    for base in bases:
        node = _node_in_file(str(path.with_name(f"{base}.yaml").relative_to(CONF_DIR)), name) | node
    return node
