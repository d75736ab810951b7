"""Several data sets as one, as a source for `DataSet`: their classes are joined by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from detr_exp.data.auto import auto
from detr_exp.data.coco import coco
from detr_exp.data.content import SPLITS, Category, Content, Split
from detr_exp.data.joined import Joined, Member
from detr_exp.data.problems import ON_ERROR, DataError
from detr_exp.data.set_settings import refuse_wrong_settings
from detr_exp.data.shapes import shapes
from detr_exp.data.shards import shards
from detr_exp.data.voc import voc
from detr_exp.data.yolo import yolo
from detr_exp.values import Values, is_number

LAYOUTS: dict[str, Callable[..., Content]] = {
    "auto": auto,
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "shapes": shapes,
    "shards": shards,
}
KEYS = ("root", "layout", "weight", "as", "ignore", "options", *SPLITS)
_NAME = re.compile(r"\w[\w\-]*")
_METRIC = re.compile(r"A[PR]$|^time$")  # NAME/mAP would be taken for another kind of metric


@dataclass
class _Set:
    """One data set.

    Attributes:
        content: as its layout reads it.
        name_of: its category id -> the name of the class here; ids of ignored classes are absent.
        weight: share of the images of an epoch, relative to the weights of the others; None: by its size.
    """

    content: Content
    name_of: dict[int, str] = field(default_factory=dict)
    weight: float | None = None

    def annotates(self) -> set[str]:
        """The classes here of which it has all objects: not one that has the name of an ignored class of it."""
        ignored = {one.name for one in self.content.categories if one.id not in self.name_of}
        return set(self.name_of.values()) - ignored


def many(
    root: str | None,
    places: Values,
    *,
    sets: Mapping[str, Values] | None,
    classes: Sequence[str] | None = None,
    on_error: str = "error",
) -> Content:
    """Several data sets as one.

    Args:
        root: None: every data set has its own.
        places: not used, likewise.
        sets: by name: `root`, `layout` (a key of `LAYOUTS`, or a source), `train`, `val`, `test` and `options` (other
            keys of the layout's source); `weight`: share of the images of an epoch, relative to the other weights;
            `as`: {its class: class here}; `ignore`: its classes whose objects are not used.
        classes: names of the first classes, in their order; they need not be in any set. Classes of the sets that are
            not in it follow in the order of the sets.
        on_error: see the layouts.

    Raises:
        ValueError: the settings cannot be used, or a data set cannot be read; says which.
    """
    if root is not None or any(places.get(name) for name in SPLITS):
        raise ValueError(
            "data=many has no data.root and no data.train, val, test of its own; give them to its sets: "
            "'data.source.sets={first: {root: /data/first}, second: {root: /data/second}}'"
        )
    if on_error not in ON_ERROR:
        raise ValueError(f"data.on_error is {on_error!r}; use {' or '.join(ON_ERROR)}: data.on_error=error")
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError(
            f"data.source.sets is {'null' if sets is None else sets}; it needs at least one data set by name: "
            "'data.source.sets={first: {root: /data/first}, second: {root: /data/second}}'"
        )
    if classes is not None and (isinstance(classes, str | Mapping) or not isinstance(classes, Sequence)):
        raise ValueError(
            f"data.source.classes is {classes}; it is a list of the names of the first classes: "
            "data.source.classes=[car,bus]"
        )
    read = {}
    for name, given in sets.items():
        try:
            read[str(name)] = _read(str(name), given, on_error)
        except DataError as error:
            raise DataError(f"data.source.sets.{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"data.source.sets.{name}: {error}") from None
    shares = _shares(read)
    categories = _joined_categories(read, classes or [])
    splits: dict[str, Callable[[], Split]] = {
        split: partial(_split, split, read, categories, shares if split == "train" else None)
        for split in SPLITS
        if any(split in one.content.read for one in read.values())
    }
    origin = ", ".join(f"{name} ({one.content.origin})" for name, one in read.items())
    return Content("many", origin, categories, splits)


def _read(name: str, given: Values, on_error: str) -> _Set:
    """One data set with its map of classes."""
    if not _NAME.fullmatch(name) or _METRIC.search(name):
        raise ValueError(
            "the name of a data set is a part of names of metrics (val/NAME/mAP); it has letters, digits, _ and -, and "
            "does not end like a metric; choose another"
        )
    if not isinstance(given, Mapping):
        raise ValueError(f"it is {given!r}; give at least its folder: {{root: /data/{name}}}")
    if unknown := [str(key) for key in given if key not in KEYS]:
        raise ValueError(f"it has {', '.join(unknown)}; a data set has {', '.join(KEYS)}; remove it")
    layout = given.get("layout", "auto")
    source = layout if callable(layout) else LAYOUTS.get(str(layout))
    if source is None:
        raise ValueError(f"its layout is {layout!r}; use {', '.join(LAYOUTS)}: {{layout: auto}}")
    weight = given.get("weight")
    if weight is not None and not (is_number(weight) and 0 <= weight < float("inf")):
        raise ValueError(f"its weight is {weight!r}; it is a number from 0, relative to those of other sets: weight: 1")
    refuse_wrong_settings(source, given, given.get("options") or {})
    options = dict(given.get("options") or {})
    if "on_error" in inspect.signature(source).parameters:
        options.setdefault("on_error", on_error)
    content: Content = partial(source, **options)(given.get("root"), {split: given.get(split) for split in SPLITS})
    return _Set(content, _names(content, given), None if weight is None else float(weight))


def _names(content: Content, given: Values) -> dict[int, str]:
    """Category id -> name of the class here, by `as` and `ignore`."""
    renamed, ignored = given.get("as") or {}, given.get("ignore") or []
    if not isinstance(renamed, Mapping) or isinstance(ignored, str) or not isinstance(ignored, Sequence):
        raise ValueError("`as` is {its class: class here}, and `ignore` a list of its classes: {ignore: [name]}")
    renamed, left_out = {str(key): str(value) for key, value in renamed.items()}, set(map(str, ignored))
    own = [category.name for category in content.categories]
    if unknown := sorted((renamed.keys() | left_out) - set(own)):
        raise ValueError(
            f"as and ignore have {', '.join(map(repr, unknown))}, but its classes are {', '.join(own)}; name some of "
            "these, or leave it out: {as: {its class: class here}, ignore: [its class]}"
        )
    if both := sorted(renamed.keys() & left_out):
        raise ValueError(f"as and ignore both have {', '.join(map(repr, both))}; leave one out")
    return {one.id: renamed.get(one.name, one.name) for one in content.categories if one.name not in left_out}


def _shares(sets: Mapping[str, _Set]) -> list[float] | None:
    """Of the images of an epoch, the share of each set that has training images; None: every image once."""
    weights = {name: one.weight for name, one in sets.items() if "train" in one.content.read}
    given = [weight for weight in weights.values() if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        without = [name for name, weight in weights.items() if weight is None]
        raise ValueError(
            f"data.source.sets: {', '.join(without)} has no weight, but others have; give one to every set, or to none"
        )
    if not sum(given):
        raise ValueError("data.source.sets: all weights are 0, so that nothing is left to train on: weight: 1")
    return [weight / sum(given) for weight in given]


def _joined_categories(sets: Mapping[str, _Set], first: Sequence[str]) -> list[Category]:
    """The classes of all sets by name, numbered from 1.

    Raises:
        ValueError: a class has other keypoints in two sets, or is listed twice.
    """
    if len(set(first)) < len(first):
        raise ValueError(f"data.source.classes has a name twice: {list(first)}; list each once")
    found: dict[str, Category] = {str(name): Category(0, str(name)) for name in first}
    origins: dict[str, str] = {}
    for set_name, one in sets.items():
        for category in one.content.categories:
            name = one.name_of.get(category.id)
            if name is None:
                continue
            known = found.setdefault(name, Category(0, name))
            if known.keypoints and category.keypoints and known.keypoints != category.keypoints:
                raise ValueError(
                    f"data.source.sets: class {name!r} has the keypoints {known.keypoints} in {origins[name]} and "
                    f"{category.keypoints} in {set_name}; give one of them another name: as: {{{category.name}: ...}}"
                )
            if category.keypoints and not known.keypoints:
                found[name], origins[name] = replace(category, name=name), set_name
    if not found:
        raise ValueError("data.source.sets: every class is ignored; leave one to train on")
    return [replace(category, id=number) for number, category in enumerate(found.values(), start=1)]


def _split(name: str, sets: Mapping[str, _Set], categories: list[Category], shares: list[float] | None) -> Joined:
    """One split of all sets that have it."""
    number_of = {category.name: category.id for category in categories}
    members = {}
    for set_name, one in sets.items():
        if name not in one.content.read:
            continue
        numbers = {old: number_of[new] for old, new in one.name_of.items()}
        annotated = tuple(sorted(number_of[known] for known in one.annotates()))
        members[set_name] = Member(one.content.read[name](), numbers, annotated)
    if all(len(member.annotated or ()) == len(categories) for member in members.values()):
        members = {set_name: replace(member, annotated=None) for set_name, member in members.items()}
    return Joined(members, categories, shares)
