"""The settings of one of several data sets: those that the source of its layout takes, of the types that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from detr_exp.data.content import SPLITS
from detr_exp.values import Values

WORDS: dict[object, str] = {
    int: "a whole number",
    bool: "true or false",
    float: "a number",
    str: "a text",
    type(None): "null",
}


def refuse_wrong_settings(source: Callable[..., object], given: Values, options: object) -> None:
    """Refuse settings that a source would not understand.

    Args:
        source: of the layout.
        given: the data set's, with `train`, `val` and `test` as the layout has them.
        options: further arguments of the source.

    Raises:
        ValueError: an argument is missing, unknown, or of another type.
    """
    known = {name: one for name, one in inspect.signature(source).parameters.items() if name not in ("root", "places")}
    if not isinstance(options, Mapping):
        raise ValueError(f"its options are {options!r}; they are other keys of its layout: options: {{name: value}}")
    if unknown := [str(key) for key in options if key not in known]:
        raise ValueError(f"its options have {', '.join(unknown)}; its layout has {', '.join(known)}; remove it")
    if lacking := [name for name, one in known.items() if one.default is one.empty and name not in options]:
        raise ValueError(
            f"its layout needs {' and '.join(lacking)}; give what it needs: "
            f"options: {{{', '.join(f'{name}: ...' for name in lacking)}}}"
        )
    hints = _hints(source)
    of_split = (*get_args(hints.get("places")), object, object)[1]
    settings = [(name, value, hints.get(name, object)) for name, value in options.items()]
    settings += [(name, given[name], of_split) for name in SPLITS if given.get(name) is not None]
    for name, value, hint in settings:
        if not _fits(value, hint):
            raise ValueError(f"its {name} is {value!r}; it must be {_in_words(hint)}: {name}: ...")


def _hints(source: Callable[..., object]) -> dict[str, object]:
    try:
        return get_type_hints(source)
    except (NameError, TypeError):  # of a user's source: types that exist for type checkers only
        return {}


def _fits(value: object, hint: object) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(one, inner[0]) for one in value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values())
    if isinstance(hint, type) and hint in WORDS:
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return True  # of a user's source


def _in_words(hint: object) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one) for one in inner)
    if origin is Sequence:
        return f"a list, each {_in_words(inner[0])}"
    if origin in (Mapping, dict):
        return f"names with values, each {_in_words(inner[1])}"
    return WORDS.get(hint, str(hint))
