"""What a config may call: configs travel in checkpoints and mails, so this is a closed list.

It is what the options in `conf/` call, each in its place, and what the packages define that the user allows.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import yaml
from hydra.utils import get_object

from detr_exp.config.compose import CONF_DIR, OPEN_KEYS
from detr_exp.config.mistakes import ConfigError
from detr_exp.values import Values

Made = TypeVar("Made")
TARGET, PARTIAL = "_target_", "_partial_"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_PACKAGE = re.compile(r"# @package (\w+)\n")


class WrongArgumentsError(ConfigError):
    """What is to be called does not take the keys given to it."""


@functools.cache
def known_targets(group: str) -> dict[str, set[str]]:
    """Key of a node -> what the options of a group call there."""
    found: dict[str, set[str]] = {}
    references: list[tuple[str, str]] = []
    for file in (CONF_DIR / group).rglob("*.yaml"):
        if TARGET in (text := file.read_text(encoding="utf-8")):
            header = _PACKAGE.match(text)
            package = header[1] if header else ".".join(file.relative_to(CONF_DIR).parent.parts)
            for key, node in _nodes(yaml.safe_load(text), package):
                found.setdefault(key_pattern(key), set()).add(node[TARGET])
                told = ((f"{key}.{name}", _REFERENCE.fullmatch(str(value))) for name, value in node.items())
                references += [(key_pattern(where), refers[1]) for where, refers in told if refers]
    for key, named in references:  # a reference to a node stands for it
        if named in found:
            found.setdefault(key, set()).update(found[named])
    return found


def refuse_unknown_targets(node: object, group: str, allowed: Collection[str]) -> None:
    """Refuse a group's config that calls anything else.

    Only what has passed by its name is imported.

    Args:
        node: nested plain values.
        group: its key in the config.
        allowed: packages of the user's own. Nodes below one of theirs may call whatever the group's options call.

    Raises:
        ConfigError: names the key and what may stand there.
    """
    own: list[tuple[str, str]] = []
    for key, found in sorted(_nodes(node, group), key=lambda node: node[0].count(".")):  # before what refers to it
        target = found[TARGET]
        if not isinstance(target, str):
            raise ConfigError(f"{key}._target_ is {target!r}; it is the dotted name of a class or function")
        if words := [name for name in found if str(name).startswith("_") and name not in (TARGET, PARTIAL)]:
            raise ConfigError(f"{key}.{words[0]} is no argument; name the arguments of {target} by their keys")
        if target.partition(".")[0] in allowed:
            own.append((key, target))
        elif target not in known_targets(group).get(key_pattern(key), ()) and not (
            _is_below(key, own) and _is_known_target(target, group)
        ):
            raise ConfigError(_not_allowed(key, target))
    for key, target in own:
        if home := _foreign_module(target, allowed):
            raise ConfigError(f"{key}._target_ is {target}, which belongs to {home}; name what your package defines")


def _nodes(node: object, key: str) -> Iterator[tuple[str, Values]]:
    """Every mapping with a `_target_`, outer ones first, with its key."""
    if isinstance(node, dict):
        if TARGET in node:
            yield key, node
        for name, value in node.items():
            yield from _nodes(value, f"{key}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _nodes(value, f"{key}[{index}]")


def key_pattern(key: str) -> str:
    """A key with `*` for the name of an entry in a mapping to which users add entries of their own."""
    above = next((above for above in OPEN_KEYS if key.startswith(f"{above}.")), None)
    if above is None:
        return key
    _, dot, inside = key[len(above) + 1 :].partition(".")
    return f"{above}.*{dot}{inside}"


def _is_known_target(target: str, group: str) -> bool:
    return any(target in there for there in known_targets(group).values())


def _is_below(key: str, own: list[tuple[str, str]]) -> bool:
    return any(key.startswith((f"{above}.", f"{above}[")) for above, _ in own)


def _not_allowed(key: str, target: str) -> str:
    from detr_exp.optim.optimizer import UNFIT

    here = sorted(known_targets(key.partition(".")[0]).get(key_pattern(key), ()))
    may = f"configs may name {', '.join(here)} there" if here else "a plain value stands there, and nothing is called"
    package, _, rest = target.partition(".")
    if package in ("torch", __package__):  # to allow a whole library would allow what runs, reads and writes anything
        why = f"{rest[6:]} {UNFIT[rest[6:]]}; " if rest in [f"optim.{name}" for name in UNFIT] else ""
        return f"{key}._target_ is {target}; {why}{may}; for anything else name a function of yours that calls it"
    return f"{key}._target_ is {target}; {may}. If it is yours and you trust it: allow_targets=[{package}]"


def _foreign_module(target: str, allowed: Collection[str]) -> str | None:
    """Where a name leads that begins in a package of the user's: `mine.os.system` is not theirs. None: it is.

    Raises:
        ConfigError: there is nothing of that name.
    """
    parts = target.split(".")
    for count in range(1, len(parts) + 1):
        try:
            found = get_object(".".join(parts[:count]))
        except ImportError as error:
            raise ConfigError(f"{target} cannot be found ({error}); is its folder on PYTHONPATH?") from error
        home: str | None
        if inspect.ismodule(found):
            home = found.__name__
        else:
            home = getattr(found, "__module__", None) if inspect.isclass(found) or inspect.isroutine(found) else None
        if home is not None and home.partition(".")[0] not in allowed:
            return home
    return None


def refuse_wrong_arguments(target: Callable[..., object], given: Values, what: str) -> None:
    """Refuse to call something without what it needs, or with keys that it does not know.

    Raises:
        WrongArgumentsError: names the key.
    """
    try:
        signature = inspect.signature(target)
    except ValueError:  # something built in, which says itself what it takes
        return
    try:
        signature.bind_partial(**given)  # a key too many is named before one that is missing for it
        signature.bind(**given)
    except TypeError as error:
        raise WrongArgumentsError(f"{what} {error}; give the keys that it takes, and no others") from error


def refuse_missing_members(made: Made, key: str, target: str) -> Made:
    """A part that a config describes, unless it lacks members of its contract.

    Args:
        made: an object, or a class whose objects are made later.
        key: of its node; not every key has a contract.
        target: the class or function that made it.

    Raises:
        ValueError: names the members.
    """
    from detr_exp import protocols
    from detr_exp.matcher.hungarian import Matcher

    contracts: dict[str, type] = {
        "model": protocols.Network,
        "model.backbone": protocols.Backbone,
        "model.neck": protocols.Neck,
        "model.adapter": protocols.Adapter,
        "matcher": Matcher,
        "metric": protocols.Metric,
        "tracker": protocols.Tracker,
        "data.augment.operations": protocols.Operation,
    }
    contract = contracts.get(re.sub(r"\[\d+\]", "", key))
    return made if contract is None else protocols.complete(made, contract, key, target)
