"""Categories of COCO files: which ones have objects, their keypoints, and how they map to those of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from detr_exp.data.coco_rows import Annotations
from detr_exp.data.content import Category
from detr_exp.data.fields import is_int
from detr_exp.data.problems import Problems, short
from detr_exp.values import Values

_NO_PARENT = {"", "none", "null", "None"}
_OWN = "categories need ids and names of their own"


def read_categories(entries: Sequence[Any], annotations: Annotations, problems: Problems) -> list[Category]:
    """The categories that stand for objects, in the order of their ids.

    Args:
        entries: the list `categories` of the file.
        annotations: of the file.
        problems: receives what is wrong.
    """
    found: dict[int, Category] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_int(number) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
            problems.error("categories need an integer id and a name", f"category {short(entry)}")
        elif number in found:
            problems.error(_OWN, f"category {number} {entry['name']!r}: its id or name occurs twice")
        else:
            found[number] = _category(entry, annotations.most_points.get(number, 0), problems)
    _drop_headings(entries, annotations.used, found, problems)
    names = Counter(category.name for category in found.values())
    for category in found.values():
        if names[category.name] > 1:
            problems.error(_OWN, f"category {category.id} {category.name!r}: its id or name occurs twice")
    return sorted(found.values(), key=lambda category: category.id)


def _drop_headings(
    entries: Sequence[Any], used: Collection[int], found: dict[int, Category], problems: Problems
) -> None:
    """Leave out categories that are only parents of others: Roboflow writes one, named like the project or a class."""
    parent_of = {e["id"]: str(e.get("supercategory")) for e in entries if _is_entry(e)}
    children = {name: {i for i, parent in parent_of.items() if parent == name} for name in set(parent_of.values())}
    dropped: list[Category] = []
    for category in sorted(found.values(), key=lambda c: (parent_of[c.id] not in _NO_PARENT, c.id)):
        heads = category.name not in _NO_PARENT and children.get(category.name, set()) - {category.id}
        if heads and category.id not in used and category.name not in {c.name for c in dropped}:
            dropped.append(category)
    if len(dropped) < len(found):
        for category in dropped:
            kind = "categories that are only parents of others and have no objects were dropped"
            problems.warn(kind, f"category {category.id} {category.name!r}")
            del found[category.id]


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and is_int(entry.get("id"))


def _category(entry: Values, annotated: int, problems: Problems) -> Category:
    """`annotated`: keypoints that its annotations have; used where the category itself names none."""
    names = entry.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.error("keypoints of a category are a list of names", f"category {entry['id']} {entry['name']!r}")
        names = []
    names = names or [str(k) for k in range(annotated)]
    lines = entry.get("skeleton") or []
    sound = isinstance(lines, list) and all(
        isinstance(line, list) and len(line) == 2 and all(is_int(k) and 1 <= k <= len(names) for k in line)
        for line in lines
    )
    if not sound:
        problems.warn("skeletons that do not fit their keypoints are not drawn", f"category {entry['id']}")
        lines = []
    return Category(entry["id"], entry["name"], list(names), [(a - 1, b - 1) for a, b in lines])


def renamed(
    entries: Sequence[Any], used: Collection[int], categories: Sequence[Category], problems: Problems
) -> dict[int, int | None]:
    """This file's category ids to the training file's: equal where id and name agree, else by name; None: unknown.

    Args:
        entries: the list `categories` of this file.
        used: the ids that occur in its annotations.
        categories: of the training file.
        problems: receives what is wrong.
    """
    by_id = {category.id: category.name for category in categories}
    by_name = {category.name: category.id for category in categories}
    points = {category.id: category.keypoints for category in categories}
    found: dict[int, int | None] = {}
    for entry in entries:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not is_int(number) or not isinstance(name, str):
            problems.error("categories need an integer id and a name", f"category {short(entry)}")
        elif number in found:
            problems.error(_OWN, f"category {number} {name!r}: its id or name occurs twice")
        elif by_id.get(number) == name:
            found[number] = number
        else:
            found[number] = by_name.get(name)
            if name in by_name and number in used:
                kind = "categories have other ids than in training and were mapped by name"
                problems.warn(kind, f"{name!r} {number} -> {by_name[name]}")
        mapped = found.get(number) if is_int(number) else None
        own = entry.get("keypoints") if isinstance(entry, dict) else None
        if mapped is None or number not in used or not isinstance(own, list) or not own:
            continue
        if own != points[mapped] and not all(point.isdigit() for point in points[mapped]):
            kind = "keypoints of a category have the names and the order that they have in the training file"
            problems.error(kind, f"{name!r}: {short(own)}, in training {short(points[mapped])}")
    return found
