"""Which member of a network is meant: its extent, or the name of a point that `python -m detr_exp.pareto` has found.

The points of a checkpoint are in a file beside it, `<its name>.members.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from detr_exp.config.mistakes import ConfigError, did_you_mean
from detr_exp.model.member import Elastic, Member, become
from detr_exp.protocols import Network
from detr_exp.published.places import digests
from detr_exp.values import Values, is_number

At = Member | Mapping[str, object] | str
FINE = [half / 2 for half in range(12, 0, -1)]  # sixths of the queries, in a search
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


def grid_of(
    network: Network,
    layers: Sequence[object] | None,
    queries: Sequence[object] | None,
    image_sizes: Sequence[object] | None,
    *,
    fine: bool = False,
) -> list[Member]:
    """All combinations that a network can compute without training.

    Args:
        network: with its weights.
        layers: None: each that it has.
        queries: None: shares of its own.
        image_sizes: numbers, or [height, width]; None: shares of its own.
        fine: more of these shares, for a search.

    Raises:
        ValueError: it has no members, or a value that was asked for is impossible.
    """
    if not isinstance(network, Elastic):
        become(network, Member(layers=1))  # refuses
        return []
    own = network.own

    def axis(
        key: str, given: Sequence[object] | None, usual: Sequence[object], queries: int | None = None
    ) -> list[Member]:
        wanted = [_member({key: value}) for value in given or usual]
        wanted = [replace(member, queries=queries or member.queries) for member in wanted]
        for member in wanted if given else ():
            become(network, member)
        return [member for member in dict.fromkeys(wanted) if given or _can(network, member)] or [Member()]

    of_queries = axis("queries", queries, _shares(own.queries, FINE if fine else (6, 4, 2, 1)))
    of_layers = axis("layers", layers, range(1, network.most_layers + 1))
    sizes = [
        [size, size] if is_number(size) else size
        for size in image_sizes or _sizes(own.image_size, network.stride, 1 if fine else 2)
    ]
    fewest = min((one.queries for one in of_queries if one.queries), default=None)
    of_sizes = axis("image_size", sizes if image_sizes else None, sizes, fewest)
    network.set_member(Member())
    every = product(of_sizes, of_queries, of_layers)
    members = [Member(layer.layers, query.queries, size.image_size) for size, query, layer in every]
    return [member for member in members if _has_cells(network, member)]


def _shares(own: int, sixths: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(max(1, round(own * share / 6)) for share in sixths))


def _sizes(own: tuple[int, int], stride: int, step: int) -> list[list[int]]:
    return [
        [max(1, round(side * sixteenths / 16 / stride)) * stride for side in own] for sixteenths in range(16, 7, -step)
    ]


def _can(network: Network, member: Member) -> bool:
    """Whether a network can be a member; it is it afterwards."""
    try:
        become(network, member)
    except ValueError:
        return False
    return True


def _has_cells(network: Elastic, member: Member) -> bool:
    """Whether images of the size of a member have a cell for each of its queries."""
    try:
        network.set_member(member)
    except ValueError:
        return False
    finally:
        network.set_member(Member())
    return True


def _member(given: Mapping[str, object]) -> Member:
    found: Values = {}
    for key, value in given.items():
        if key not in KEYS:
            raise ConfigError(f"at has {key!r}; {did_you_mean(key, KEYS)}it takes {', '.join(KEYS)}, or name alone")
        wanted, example = (2, "[320,320], height and width") if key == "image_size" else (1, "2")
        values = list(value) if wanted == 2 and isinstance(value, Sequence) else [value]
        numbers = [int(number) for number in values if is_number(number) and number == int(number) >= 1]
        if not len(numbers) == len(values) == wanted:
            raise ConfigError(f"at.{key} is {value!r}; it needs whole numbers >= 1: at.{key}={example}")
        found[key] = tuple(numbers) if wanted == 2 else numbers[0]
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
