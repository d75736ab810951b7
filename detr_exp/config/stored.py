"""Configs out of files: nothing in them is a reference, and what earlier versions called otherwise has today's name."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detr_exp.config.compose import CONF_DIR
from detr_exp.config.mistakes import ConfigError

MOST_VALUES = 100_000  # of a stored config; ours have some hundreds
RENAMED = {  # what a `_target_` was called once -> what it is called now
    "detr_exp.trainer.trainer.Trainer": "detr_exp.trainer.settings.Settings",
}


def stored(values: Any, file: Path) -> DictConfig:
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


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config in today's words.

    The losses were no table once, but what `loss.class_loss` and the weights said.
    """
    config = _renamed(config, RENAMED)
    loss = config.get("loss")
    if isinstance(loss, dict) and "class_loss" in loss and "terms" not in loss:
        return {**config, "loss": {**loss, "terms": table(loss)}}
    return config


def as_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as the first version wrote it, where it could have: what names a run has to stay its name.

    Args:
        config: plain values, resolved or not.
    """
    config = _renamed(config, {now: once for once, now in RENAMED.items()})
    loss = config.get("loss")
    if isinstance(loss, dict) and loss.get("terms") in (table(loss), table(loss, resolved=False)):
        return {**config, "loss": {key: value for key, value in loss.items() if key != "terms"}}
    return config


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A config whose groups call their targets by other names; only groups: stored values can have any depth."""
    found = {group: node.get("_target_") for group, node in config.items() if isinstance(node, Mapping)}
    moved = {group: names[name] for group, name in found.items() if isinstance(name, str) and name in names}
    return {**config, **{group: {**config[group], "_target_": name} for group, name in moved.items()}}


def table(loss: Mapping[str, Any], resolved: bool = True) -> dict[str, Any] | None:
    """The table of losses of `conf/loss/terms/detr.yaml` with these values; None where one of them is missing."""
    values = {key: value for key, value in loss.items() if key != "terms"}
    terms: Any = copy.deepcopy(_terms())
    if values.get("eos_coef") is not None:
        terms["class"] |= {"divide": "queries", "background": "${loss.eos_coef}"}
    if not resolved:
        return terms
    try:
        cfg = OmegaConf.create({"loss": {**literal(values), "terms": terms}})
        return cast(dict[str, Any], OmegaConf.to_container(cfg.loss.terms, resolve=True))
    except (ValueError, KeyError, OmegaConfBaseException):
        return None


@functools.cache
def _terms() -> dict[str, Any]:
    return yaml.safe_load((CONF_DIR / "loss/terms/detr.yaml").read_text(encoding="utf-8"))["terms"]
