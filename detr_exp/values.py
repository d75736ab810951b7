"""Nested plain values, as YAML and JSON hold them: mappings with text keys, lists, text, numbers, booleans, null."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard, cast

from omegaconf import Container, OmegaConf

Values = dict[str, Any]  # name -> value of a config, of a line of a log, of an entry in a JSON file

AVERAGE = re.compile(r"(^|[/_])m?A[PR]([0-9_/]|$)")  # metrics that COCO's tool gives as -1 where it has none


def measured(values: Mapping[str, Any]) -> Values:
    """The values of metrics without those that the ground truth cannot give, such as `mAP_small` without small objects.

    COCO's tool gives -1 for these, which curves and means would take for a value.
    """
    return {name: value for name, value in values.items() if value != -1 or not AVERAGE.search(name)}


def values_of(cfg: Container | Values, resolve: bool = True) -> Values:
    """The values of a config or of one of its nodes, as plain Python objects.

    Args:
        resolve: replace interpolations by their values; else they stay as written.
    """
    return cast(Values, OmegaConf.to_container(cfg, resolve=resolve))


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def look_up(values: object, key: str) -> Any:
    """The value under a dotted key of nested mappings.

    Raises:
        KeyError: it does not exist.
    """
    for part in key.split(".") if key else ():
        if not isinstance(values, dict) or part not in values:
            raise KeyError(key)
        values = values[part]
    return values


def walk(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every dotted key and its value, of mappings as well as of their entries."""
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from walk(value, f"{prefix}{name}.")


def flat(values: Mapping[str, object], prefix: str = "") -> Values:
    """Nested mappings as one with dotted keys; of mappings only empty ones are values themselves."""
    return {key: value for key, value in walk(values, prefix) if not (isinstance(value, Mapping) and value)}
