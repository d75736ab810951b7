"""Configs loaded from files: they contain no references, and keys of earlier versions get their current names."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detr_exp.config.compose import CONF_DIR
from detr_exp.config.keys import SELECTION
from detr_exp.config.mistakes import ConfigError
from detr_exp.values import Values, values_of

MOST_VALUES = 100_000  # of a stored config; real ones have some hundreds
RENAMED = {  # earlier name of a `_target_` -> current name
    "detr_exp.trainer.trainer.Trainer": "detr_exp.trainer.settings.Settings",
}
DERIVED = {
    "loss": "terms",
    "model": "decoder",
}  # group -> node that can be derived from the other keys; earlier versions did not have it
RTDETR = "detr_exp.model.rtdetrv2.RTDETRv2"
ADDED: dict[str, object] = {  # keys that earlier versions did not have, with the values that mean the same
    f"metric.{SELECTION}": False,  # they chose on all images
    "loss.class_weights": None,
    "model.class_prior": None,
    "teacher": None,
    "trainer.hardware.products": "auto",  # a run that is resumed keeps its library in any case
}
CACHE_OF_TEACHER = {"cache": "none", "cache_gb": 8}
LATER: dict[str, Values] = {  # the same for parts of this package only, by target: a user's own may not know such keys
    "detr_exp.data.dataset.DataSet": {
        "phases": dict.fromkeys(("strong", "mosaic", "mixup", "multi_scale")),
        "repeat_threshold": None,
        "keep_empty": 1.0,
        "fit": None,
        "tiles": None,
        "val_sample": None,
        "channels": 3,
    },
    RTDETR: {"box_noise_fold": False, "head_activation": "relu", "position_layers": 2},
    "detr_exp.trainer.settings.Settings": {
        "restart_epoch": None,
        "eval_every_steps": None,
        "checkpoint_in_background": False,
    },
    "detr_exp.data.augment.Augment": {"operations": []},
    "detr_exp.teacher.detector.DetectorTeacher": CACHE_OF_TEACHER,
    "detr_exp.teacher.timm.TimmTeacher": CACHE_OF_TEACHER,
}
DECODERS = {  # network -> option of model/decoder for what earlier versions had in the network
    RTDETR: "rtdetr",
    "detr_exp.model.rfdetr.RFDETR": "rfdetr",
    "detr_exp.model.rfdetr_keypoint.RFDETRKeypoint": "rfdetr_keypoint",
}


def stored(values: object, file: Path) -> DictConfig:
    """A config from a file, which was resolved when it was written, so that it contains no references.

    Args:
        values: what the file holds.
        file: its path, for messages.

    Raises:
        ConfigError: it is not a config.
    """
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{file} holds {type(values).__name__} instead of a config; give another run or checkpoint")
    try:
        return OmegaConf.create(literal(upgraded(values)))
    except ConfigError as error:
        raise ConfigError(f"the config in {file} {error}; give another run or checkpoint") from None


def literal(value: Any, room: Iterator[int] | None = None) -> Any:
    """Nested plain values for a config, with text that looks like a reference escaped.

    Raises:
        ConfigError: values of other types, or too many values.
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
    """A resolved config, or some of its groups, with the current keys.

    Earlier versions had no table of losses, only `loss.class_loss` and weights; the decoder was part of the network.
    """
    made = with_derived_nodes(_with_later(_renamed(config, RENAMED)), resolved=True)
    is_whole = {"model", "trainer"} <= config.keys()
    for path, value in ADDED.items():
        if is_whole or "." in path:  # a part of a config does not get keys of the root
            made = _with(made, path.split("."), value)
    return made


def hardware_of(config: Values) -> Values:
    """Hardware settings of a stored training; keys that its version did not have get today's defaults."""
    known: Values = yaml.safe_load((CONF_DIR / "trainer" / "hardware" / "auto.yaml").read_text("utf-8"))
    return known | {name: value for name, value in config["trainer"]["hardware"].items() if name in known}


def with_derived_nodes(config: Values, *, resolved: bool) -> Values:
    """A config with the derived nodes added where it has only the keys they are derived from.

    Args:
        config: plain values, of the whole config or some of its groups.
        resolved: write values into these nodes instead of references.
    """
    made = dict(config)
    for group, name in DERIVED.items():
        values = config.get(group)
        if (
            isinstance(values, dict)
            and name not in values
            and (node := derived_node(group, values, resolved)) is not None
        ):
            made[group] = {**values, name: node}
    return made


def as_first_version(config: Values) -> Values:
    """A config as the first version would have written it, because the identity of a run must not change.

    Args:
        config: plain values, resolved or not.
    """
    made = _with_later(config)
    for group, name in DERIVED.items():
        values = made.get(group)
        if isinstance(values, dict) and name in values:
            rest = {key: value for key, value in values.items() if key != name}
            for derived in (derived_node(group, rest, resolved) for resolved in (True, False)):
                absent = derived if derived and group == "model" else {}  # keys of decoders that are older than these
                if absent | values[name] == derived:
                    made[group] = rest
    later = {f"{path}.{key}": value for path, keys in _later(made) for key, value in keys.items()}
    for path, value in (ADDED | later).items():
        made = _without(made, path.split("."), value)
    return _renamed(made, {now: once for once, now in RENAMED.items()})


def _later(config: Values) -> list[tuple[str, Values]]:
    """Paths of nodes with keys that their earlier versions did not have."""
    data = config.get("data")
    nodes = config | ({"data.augment": data.get("augment")} if isinstance(data, dict) else {})
    targets = {path: node.get("_target_") for path, node in nodes.items() if isinstance(node, dict)}
    found = [(path, LATER[target]) for path, target in targets.items() if isinstance(target, str) and target in LATER]
    return [(path, keys) for path, keys in found if path != "model" or _has_first_decoder(config[path])]


def _has_first_decoder(model: Values) -> bool:
    """Whether a network has the decoder of earlier versions; others are of versions with all keys."""
    decoder = model.get("decoder")
    return not isinstance(decoder, dict) or decoder.get("_target_") == "detr_exp.model.decoder.rtdetr.RTDETRDecoder"


def _with_later(config: Values) -> Values:
    for path, keys in _later(config):
        for key, value in keys.items():
            config = _with(config, [*path.split("."), key], value)
    return config


def _with(node: Values, path: Sequence[str], value: object) -> Values:
    """A config with a value at a path, if the node above it is there and has none."""
    name, *rest = path
    if not rest:
        return {name: value, **node}
    inner = node.get(name)
    return {**node, name: _with(inner, rest, value)} if isinstance(inner, dict) else node


def _without(node: Values, path: Sequence[str], value: object) -> Values:
    """A config without the key at a path, if it has this value."""
    name, *rest = path
    if not rest:
        return {key: inner for key, inner in node.items() if key != name or inner != value}
    inner = node.get(name)
    return {**node, name: _without(inner, rest, value)} if isinstance(inner, dict) else node


def _renamed(config: Values, names: Mapping[str, str]) -> Values:
    """A config with other target names in its groups; only there, because stored values can have any depth."""
    found = {group: node.get("_target_") for group, node in config.items() if isinstance(node, Mapping)}
    moved = {group: names[name] for group, name in found.items() if isinstance(name, str) and name in names}
    return {**config, **{group: {**config[group], "_target_": name} for group, name in moved.items()}}


def derived_node(group: str, values: Values, resolved: bool) -> Values | None:
    """The node derived from the keys of a group; None if it cannot be derived, or a key is missing.

    Args:
        group: a key of `DERIVED`.
        values: the group without that node.
        resolved: values instead of references to the keys.
    """
    if group == "loss":
        file = "loss/terms/detr.yaml" if "class_loss" in values else None
    else:
        option = DECODERS.get(str(values.get("_target_")))
        file = None if option is None else f"model/decoder/{option}.yaml"
    if file is None:
        return None
    node = copy.deepcopy(_node_in_file(file, DERIVED[group]))
    if values.get("eos_coef") is not None and group == "loss":
        node["class"] |= {"divide": "queries", "background": "${loss.eos_coef}"}
    if not resolved:
        return node
    try:
        return copy.deepcopy(_resolved_node(group, json.dumps(values), json.dumps(node)))
    except (TypeError, ValueError, KeyError, RecursionError, OmegaConfBaseException):
        return None


@functools.lru_cache(maxsize=256)
def _resolved_node(group: str, values: str, node: str) -> Values:
    """`derived_node` with values, from JSON; most runs of a sweep have the same."""
    cfg = OmegaConf.create({group: {**literal(json.loads(values)), DERIVED[group]: json.loads(node)}})
    return values_of(cfg[group][DERIVED[group]])


@functools.cache
def _node_in_file(file: str, name: str) -> Values:
    """A node in an option's file, merged over the files in its defaults list."""
    path = CONF_DIR / file
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    bases = [base for base in content.get("defaults", []) if base != "_self_"]
    node = content.get(name, {})
    for base in bases:
        node = _node_in_file(str(path.with_name(f"{base}.yaml").relative_to(CONF_DIR)), name) | node
    return node
