"""Mistakes in the overrides of a command line, and messages that tell how to fix them.

The functions here raise `ConfigError` or return; configs are composed in `compose.py`.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
import traceback
from collections.abc import Iterable, Mapping, Sequence

from hydra.core.default_element import ConfigDefault, GroupDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from detr_exp.config.hydra_private import IConfigRepository
from detr_exp.published.table import named
from detr_exp.values import Values, is_number, look_up, walk

Groups = Mapping[str, Sequence[str]]
QUOTES = "\"'"
TASKS = ("", "segm_", "keypoint_")
METRICS = (
    *("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "mAP_max_dets", "mAP50_max_dets"),
    *("mAR", "mAR_1", "mAR_10", "mAR_small", "mAR_medium", "mAR_large", "mAR_max_dets"),
    *("F1", "F1_threshold", "precision", "recall"),
)
OUR_PACKAGES = ("detr_exp", "hydra_plugins")
MEMBERS = {  # keys of the model -> what commands on a checkpoint take instead
    "model.eval_idx": "at.layers=N computes the first N layers of the decoder, N = eval_idx + 1",
    "model.num_layers": "at.layers=N computes the first N layers of the decoder",
    "model.num_queries": "at.queries=N",
    "model.image_size": "at.image_size=[height,width]",
}
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
SYNONYMS = {"gpu": "cuda"}  # whose spelling is nearer to something else


class ConfigError(ValueError):
    """The requested config cannot be composed; the message tells how to fix it."""


def is_raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of this package raised the error, and not a library."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith((*OUR_PACKAGES, "__main__"))


def groups_of(repository: IConfigRepository, parent: str = "") -> dict[str, list[str]]:
    """Every group, sub-groups with a slash, and its options."""
    found: dict[str, list[str]] = {}
    for name in repository.get_group_options(parent, ObjectType.GROUP):
        group = f"{parent}/{name}" if parent else name
        if group != "hydra":
            found[group] = list(repository.get_group_options(group, ObjectType.CONFIG))
            found |= groups_of(repository, group)
    return found


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides, `key=value`."""
    parser = OverridesParser.create()
    parsed = []
    for position, text in enumerate(overrides):
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            raise ConfigError(_unreadable(text, overrides[:position])) from error
    return parsed


def _unreadable(text: str, before: Sequence[str]) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        advice = f"settings are written key=value, e.g. {text}=..."
        if before and "=" in before[-1]:
            key, _, value = f"{before[-1]} {text}".partition("=")
            advice += f"; if it belongs to the override before it, quote both: {_quoted(key, value)}"
        return f"{text!r} has no '='; {advice}"
    if "/" in key and "." in key:
        return (
            f"{text!r} mixes two spellings: a slash chooses an option ({key.replace('.', '/')}=<option>), "
            f"dots set a value ({key.replace('/', '.')}=<value>)"
        )
    if not re.fullmatch(r"[+~]*[\w./@:$-]+", key):
        return f"{text!r} cannot be read: {key!r} is not a key; write key=value without spaces around '='"
    if value.strip(QUOTES).startswith("~"):
        home = f"$HOME{value.strip(QUOTES)[1:]}"
        return (
            f"{text!r} cannot be read: '~' means the home folder only at the start of an argument; write {key}={home}"
        )
    if value.startswith("[") and value.endswith("]"):
        elements = ",".join(f'"{element.strip().strip(QUOTES)}"' for element in value[1:-1].split(","))
        listed = shlex.quote(f"{key}=[{elements}]")
        quoted = f"such elements, and the whole override for the shell: {listed}"
    else:
        quoted = f"the value, and the whole override for the shell: {_quoted(key, value)}"
    absent = "there is no such file or folder, and in other values " if "/" in value else ""
    return (
        f"{text!r} cannot be read: {absent}spaces, letters outside of ASCII and ( ) [ ] {{ }} , : = have a special "
        f"meaning; quote {quoted}"
    )


def _quoted(key: str, value: str) -> str:
    """An override whose value is a string, quoted for a shell."""
    inner = value.strip(QUOTES).replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{inner}"')


def refuse_wrong_choices(overrides: Iterable[Override], groups: Groups) -> None:
    """Refuse several values without `--multirun`, unknown groups and unknown options."""
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if override.is_hydra_override():
            if key in FOLDERS and value in ("", None):
                raise ConfigError(
                    f"{override.input_line} is not a folder; is an environment variable not set? Use {key}=FOLDER"
                )
            continue
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} gives several values; add --multirun to run each of them, write a list as "
                f"{key}=[...], or quote a text that holds a comma: {_quoted(key, override.get_value_string())}"
            )
        if "/" in key and key not in groups:
            raise ConfigError(f"there is no group {key}; {did_you_mean(key, groups)}groups: {', '.join(groups)}")
        if key not in groups:
            continue
        if override.is_delete():
            raise ConfigError(f"{override.input_line}: every run needs a {key}; choose one: {_options(key, groups)}")
        if override.is_add() or override.is_force_add():
            raise ConfigError(f"{override.input_line}: options are chosen without '+': {key}={value}")
        if value is None and not override.is_delete():
            raise ConfigError(
                f"{override.input_line} chooses nothing; leave it out, or use one of {_options(key, groups)}"
            )
        if value is not None and value not in groups[key]:
            elsewhere = [f"{group}={value}" for group in groups if value in groups[group] and group.startswith(key)]
            meant = (
                f"did you mean {elsewhere[0]}? " if elsewhere else did_you_mean(str(value), groups[key], f"{key}={{}}")
            )
            raise ConfigError(f"{key}={override.get_value_string()} does not exist; {meant}{_options(key, groups)}")


def refuse_wrong_override(
    override: Override,
    values: Values,
    choices: Mapping[str, str | None],
    groups: Groups,
    repository: IConfigRepository,
) -> None:
    """Refuse a key that does not exist and a value of another type than the one it replaces.

    Args:
        override: sets, adds or deletes one key.
        values: the config before overrides of keys, as plain dictionaries.
        choices: the chosen option of every group.
    """
    key = override.key_or_group
    try:
        present = look_up(values, key)
    except KeyError:
        if (group := key.replace(".", "/")) in groups:  # without a chosen option
            message = f"options are chosen with a slash: {group}=... ({_options(group, groups)})"
            raise ConfigError(f"{override.input_line}: {message}") from None
        if not override.is_add() and not override.is_force_add():
            raise ConfigError(unknown_key(key, values, choices, groups, repository)) from None
        return
    if override.is_add():
        plain = str(override.input_line).lstrip("+")
        raise ConfigError(f"{override.input_line}: {key} exists already; write it without '+': {plain}")
    if not override.is_delete():
        problem = wrong_value(key, override.value(), present, groups)
        if problem:
            raise ConfigError(f"{override.input_line}: {problem}")


def wrong_value(key: str, value: object, present: object, groups: Groups) -> str | None:
    """Why `value` cannot replace `present`, or None."""
    group = key.replace(".", "/")
    if group in groups and isinstance(value, str):
        return f"options are chosen with a slash: {group}={value} ({_options(group, groups)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"this is read as a number; for a string write {_quoted(key, str(value))}"
    if value is None or value == "auto" or (isinstance(value, str) and "${" in value):
        return None  # a reference is checked when it is resolved
    if isinstance(present, dict) and not isinstance(value, dict):
        return f"{key} holds several keys; set one of them: " + ", ".join(f"{key}.{name}" for name in present)
    if isinstance(present, list) and not isinstance(value, list):
        return f"{key} takes a list: " + shlex.quote(f"{key}=[{','.join([str(value)] * max(1, len(present)))}]")
    if isinstance(present, bool) and not isinstance(value, bool) and not _is_path(value):
        return f"{key} takes true or false: {key}={str(present).lower()}"
    if is_number(present) and not is_number(value):
        return f"{key} takes a number: {key}={present}"
    if value == "" and present in (None, "???"):  # a path, and the empty one would be the current folder
        otherwise = f", or {key}=null" if present is None else ""
        return f"{key} is empty, as if a variable of the shell were not set; give a value{otherwise}"
    if present is None and isinstance(value, str) and value.lower() == "none":
        return f"'no value' is written null: {key}=null"
    return None


def _is_path(value: object) -> bool:
    """Whether this names a file: `pretrained` is a switch, and takes weights as well."""
    return isinstance(value, str) and (bool({"/", "."} & set(value)) or named(value) is not None)


def refuse_unknown_metric(monitor: str | None) -> None:
    """Refuse a `trainer.monitor` that no evaluation gives, whatever the network and the data.

    Raises:
        ConfigError: names what there is.
    """
    name = str(monitor or METRICS[0]).removeprefix("val/")
    known = [f"{task}{metric}" for task in TASKS for metric in METRICS]
    if name.rpartition("/")[2] not in known and not name.startswith(("loss", *(f"{task}AP/" for task in TASKS))):
        raise ConfigError(
            f"trainer.monitor is {monitor!r}, which no evaluation measures; "
            f"{did_you_mean(name, known, 'trainer.monitor=val/{}')}use {', '.join(METRICS)}, AP/<class>, these with "
            f"{' or '.join(TASKS[1:])} before them, or loss"
        )


def unknown_key(
    key: str, values: Values, choices: Mapping[str, str | None], groups: Groups, repository: IConfigRepository
) -> str:
    """A message with other options that have the key, or with similar keys."""
    group = _owner(key, choices)
    known = [name for name, value in walk(values) if "${" not in str(value)]  # the key they refer to is set instead
    if (member := MEMBERS.get(key)) and "at" in values:
        return (
            f"there is no key {key}: the network is the checkpoint's. A smaller member of it is read without training: "
            f"{member}"
        )
    if not group:
        return f"there is no key {key}; {_similar_keys(key, known, groups)}--cfg job shows all keys"
    option, inside = choices[group], key[len(group) + 1 :]
    own = look_up(values, group.replace("/", "."))
    has = f"{group}={option} has: {', '.join(own)}"
    others = [f"{group}={o}" for o in groups[group] if o != option and _option_has(repository, group, o, inside)]
    if others:
        return f"{group}={option} has no key {inside}; {', '.join(others)} {'have' if others[1:] else 'has'} it. {has}"
    return f"there is no key {key}; {did_you_mean(key, known) or _similar_keys(key, known, groups)}{has}"


def _similar_keys(key: str, known: Sequence[str], groups: Groups) -> str:
    """Keys and groups whose last part is, or ends with, that of `key`; else the nearest spelling."""
    last = key.rpartition(".")[2]
    chosen = [f"{group}=..." for group in groups if group.rpartition("/")[2] == last]
    same = [name for name in known if name.rpartition(".")[2] == last]
    longer = [name for name in known if name.endswith(f"_{last}")]
    for found in (chosen, [*same, *longer]):
        if found:
            return f"did you mean {' or '.join(found[:3])}? "
    return did_you_mean(key, [*known, *groups])


def _owner(key: str, choices: Mapping[str, str | None]) -> str:
    """The deepest group with a chosen option that `key` lies in; empty for the root."""
    parts = key.split(".")
    candidates = ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    return next((group for group in candidates if choices.get(group) is not None), "")


def _option_has(repository: IConfigRepository, group: str, option: str, inside: str) -> bool:
    """Whether an option's file has a key, or one it builds on in the same group or a sub-group has it for the group."""
    loaded = repository.load_config(f"{group}/{option}")
    if loaded is None:
        return False
    try:
        look_up(OmegaConf.to_container(loaded.config, resolve=False), inside)
    except KeyError:
        for base in loaded.defaults_list or []:
            if (
                isinstance(base, ConfigDefault)
                and not base.is_self()
                and _option_has(repository, group, str(base.path), inside)
            ):
                return True
            if isinstance(base, GroupDefault) and isinstance(base.value, str):
                below = f"{group}/{base.group}"
                file = repository.load_config(f"{below}/{base.value}")
                if file and file.header.get("package") == group and _option_has(repository, below, base.value, inside):
                    return True
        return False
    return True


def did_you_mean(word: str, known: Iterable[str], template: str = "{}") -> str:
    nearest = difflib.get_close_matches(SYNONYMS.get(word, word), list(known), n=1, cutoff=0.6)
    return f"did you mean {template.format(nearest[0])}? " if nearest else ""


def _options(group: str, groups: Groups) -> str:
    return f"options of {group}: {', '.join(groups[group])}"
