"""Which targets a config may call: a closed list, because configs come with checkpoints from other people.

Allowed are the targets of the options in `conf/`, each at its key, and everything defined in packages that the user
allows.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import yaml
from hydra.utils import get_object

from detr_exp.config.compose import CONF_DIR, OPEN_KEYS
from detr_exp.config.mistakes import ConfigError
from detr_exp.values import Values

Made = TypeVar("Made")
TARGET, PARTIAL = "_target_", "_partial_"
# no user's packages: allowing one of them would allow running, reading and writing anything
LIBRARIES = frozenset(("torch", __package__.partition(".")[0], *sys.stdlib_module_names))
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_PLACE = re.compile(r"\[\d+\]")
_PACKAGE = re.compile(r"# @package (\w+)\n")


class WrongArgumentsError(ConfigError):
    """A target does not accept the keys given to it."""


@functools.cache
def known_targets(group: str) -> dict[str, set[str]]:
    """Key of a node -> the targets that the options of a group have there."""
    found: dict[str, set[str]] = {}
    references: list[tuple[str, str]] = []
    for file in (CONF_DIR / group).rglob("*.yaml"):
        if TARGET in (text := file.read_text(encoding="utf-8")):
            header = _PACKAGE.match(text)
            package = header[1] if header else ".".join(file.relative_to(CONF_DIR).parent.parts)
            for key, node in _nodes(yaml.safe_load(text), package):
                found.setdefault(key_pattern(key), set()).add(node[TARGET])
                references_here = ((f"{key}.{name}", _REFERENCE.fullmatch(str(value))) for name, value in node.items())
                references += [(key_pattern(where), refers[1]) for where, refers in references_here if refers]
    for key, named in references:  # a reference to a node is replaced by it
        if named in found:
            found.setdefault(key, set()).update(found[named])
    return found


def refuse_unknown_targets(node: object, group: str, allowed: Collection[str]) -> None:
    """Refuse the config of a group if it has other targets.

    A target is imported only after its name is accepted.

    Args:
        node: nested plain values.
        group: its key in the config.
        allowed: packages of the user, but for `LIBRARIES`. Nodes below a target of these may have any target of the
            options of the group.

    Raises:
        ConfigError: with the key and the targets allowed there.
    """
    allowed = set(allowed) - LIBRARIES
    own: list[tuple[str, str]] = []
    for key, found in sorted(_nodes(node, group), key=lambda node: node[0].count(".")):  # before the nodes inside them
        target = found[TARGET]
        if not isinstance(target, str):
            raise ConfigError(f"{key}._target_ is {target!r}; it must be the dotted name of a class or function")
        if hydra_keys := [name for name in found if str(name).startswith("_") and name not in (TARGET, PARTIAL)]:
            raise ConfigError(f"{key}.{hydra_keys[0]} is not an argument; use the argument names of {target} as keys")
        if target.partition(".")[0] in allowed:
            own.append((key, target))
        elif target not in known_targets(group).get(key_pattern(key), ()) and not (
            _is_below(key, own) and _is_known_target(target, group)
        ):
            raise ConfigError(_not_allowed(key, target))
    for key, target in own:
        if home := _foreign_module(target, allowed):
            raise ConfigError(
                f"{key}._target_ is {target}, which belongs to {home}; use a target that your package defines"
            )


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
    """A key with `*` in place of the place in a list, and of the name of an entry to which users can add others."""
    key = _PLACE.sub("[*]", key)
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
    if package in LIBRARIES:
        why = f"{rest[6:]} {UNFIT[rest[6:]]}; " if rest in [f"optim.{name}" for name in UNFIT] else ""
        return f"{key}._target_ is {target}; {why}{may}; for anything else use a function of your package that calls it"
    return f"{key}._target_ is {target}; {may}. If it is your package and you trust it: allow_targets=[{package}]"


def _foreign_module(target: str, allowed: Collection[str]) -> str | None:
    """The module of an object that a user package only imports, as in `mine.os.system`; None: the package defines it.

    Raises:
        ConfigError: the name does not exist.
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
    """Refuse to call a target without required arguments, or with unknown ones.

    Raises:
        WrongArgumentsError: with the key.
    """
    try:
        signature = inspect.signature(target)
    except ValueError:  # a builtin without a signature, which checks its arguments itself
        return
    try:
        signature.bind_partial(**given)  # reports an unknown key before a missing one
        signature.bind(**given)
    except TypeError as error:
        raise WrongArgumentsError(f"{what} {error}; give the keys that it accepts, and no others") from error


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
    contract = contracts.get(_PLACE.sub("", key))
    return made if contract is None else protocols.complete(made, contract, key, target)
