"""Which member of a network is meant: its extent, or the name of a point that `python -m detr_exp.pareto` has found.

The points of a checkpoint are in a file beside it, `<its name>.members.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from detr_exp.config.mistakes import ConfigError, did_you_mean
from detr_exp.model.member import Member
from detr_exp.published.places import digests
from detr_exp.values import Values, is_number

At = Member | Mapping[str, object] | str
KEYS = [field.name for field in fields(Member)]


class Chosen(NamedTuple):
    """What `at` means for a checkpoint.

    Attributes:
        member: its extent.
        name: of the point, or of the extent; empty where the network is used as it is.
        threshold: where F1 was highest for this member; None: not measured.
    """

    member: Member
    name: str = ""
    threshold: float | None = None


def chosen(at: At | None, checkpoint: Path | None) -> Chosen:
    """What is meant.

    Args:
        at: a member, its fields by name (null: as the network has it), or the name of a point, also as `name`.
        checkpoint: the file; None: a network without one, whose points have no names.

    Raises:
        ValueError: it is no member, or there is no point of that name.
    """
    if isinstance(at, str):
        at = {"name": at}
    if at is None or isinstance(at, Member):
        member = at or Member()
        return Chosen(member, "" if member == Member() else str(member))
    given = {str(key): value for key, value in at.items() if value is not None}
    if (name := given.pop("name", None)) is None:
        member = _member(given)
        return Chosen(member, "" if member == Member() else str(member))
    if given:
        raise ConfigError(
            f"at.name is {name}, which says all of a member, and there is at.{next(iter(given))} beside it: leave one "
            "of them out"
        )
    if checkpoint is None:
        raise ConfigError(f"at.name is {name}, and only checkpoints have named points: at.layers=..., at.queries=...")
    return _named(str(name), checkpoint)


def file_of(checkpoint: Path) -> Path:
    """Where the points of a checkpoint are."""
    return checkpoint.with_name(f"{checkpoint.stem}.members.json")


def _member(given: Mapping[str, object]) -> Member:
    found: Values = {}
    for key, value in given.items():
        if key not in KEYS:
            raise ConfigError(f"at has {key!r}; {did_you_mean(key, KEYS)}it takes {', '.join(KEYS)}, or name alone")
        wanted, example = (2, "[320,320], height and width") if key == "image_size" else (1, "2")
        numbers = list(value) if wanted == 2 and isinstance(value, Sequence) else [value]
        if len(numbers) != wanted or not all(is_number(number) and number == int(number) >= 1 for number in numbers):
            raise ConfigError(f"at.{key} is {value!r}; it needs whole numbers >= 1: at.{key}={example}")
        found[key] = tuple(map(int, numbers)) if wanted == 2 else int(numbers[0])
    return Member(**found)


def _named(name: str, checkpoint: Path) -> Chosen:
    file = file_of(checkpoint)
    command = f"python -m detr_exp.pareto checkpoint={checkpoint}"
    if not file.exists():
        raise ConfigError(f"at.name is {name}, but {file} with the points of this checkpoint is not there: {command}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        points = {str(point["name"]): point for point in content["points"]} | content["names"]
        found = points.get(name)
        found = points[found] if isinstance(found, str) else found
        if found is None:
            near = did_you_mean(name, points, "at.name={}")
            raise ConfigError(f"at.name is {name}; {near}{file} has {', '.join(points)}")
        if content["sha256"] != digests(checkpoint)["sha256"]:
            raise ConfigError(
                f"{file} is about another state of {checkpoint.name}, which has changed since; measure it again: "
                f"{command}, or say what you want: at.layers=..., at.queries=..."
            )
        extent = _member({key: found[key] for key in KEYS})
        shown = str(extent) if name == str(extent) else f"{name} ({extent})"
        return Chosen(extent, shown, found.get("threshold"))
    except (OSError, UnicodeError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({type(error).__name__}: {error}); remove it, and write it again: {command}"
        ) from error
