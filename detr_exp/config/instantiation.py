"""The only place where a `_target_` is called."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from hydra.utils import get_object

from detr_exp.config.targets import PARTIAL, TARGET, refuse_missing_members, refuse_wrong_arguments
from detr_exp.values import Values


def instantiate(node: object, key: str, **extra: object) -> Any:
    """Call the targets of a node and of the nodes in it, inner ones first.

    Unlike Hydra's function, this does not resolve references in strings.

    Args:
        node: nested plain values whose targets are allowed.
        key: dotted key of the node.
        extra: further arguments of the outermost call.

    Raises:
        WrongArgumentsError: a target does not take the keys given to it.
    """
    if isinstance(node, list):
        return [instantiate(value, f"{key}[{index}]") for index, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    given = {name: instantiate(value, f"{key}.{name}") for name, value in node.items()}
    if TARGET not in given:
        return given
    target, is_partial = get_object(given.pop(TARGET)), given.pop(PARTIAL, False)
    given |= extra
    what = f"{key}: {node[TARGET]}"
    if is_partial:
        made = functools.partial(target, **given)
        return functools.partial(_fitted, made, key, node[TARGET]) if key.startswith("model.") else made
    refuse_wrong_arguments(target, given, what)
    return refuse_missing_members(target(**given), key, node[TARGET])


def _fitted(make: functools.partial[object], key: str, target: str, **given: object) -> object:
    """A part of a network, made with the arguments that the network gives.

    Raises:
        WrongArgumentsError: it does not take them.
        ValueError: it lacks members of its contract.
    """
    refuse_wrong_arguments(make.func, make.keywords | given, f"{key}: {target}")
    return refuse_missing_members(make(**given), key, target)


def arguments_of(node: Values) -> list[str]:
    """The keys that the target of a node takes."""
    parameters = inspect.signature(get_object(node[TARGET])).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return [parameter.name for parameter in parameters] + (list(node) if takes_any else [])
