"""Categories of COCO files: which ones have objects, their keypoints, and how they map to those of training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from detr_exp.data.content import Category
from detr_exp.data.fields import is_int
from detr_exp.data.problems import Problems, short
from detr_exp.values import Values

_NO_PARENT = {"", "none", "null", "None"}
_OWN = "categories need ids and names of their own"


def read_categories(document: Values, path: Path) -> list[Category]:
    """The categories that stand for objects, in the order of their ids."""
    problems = Problems(str(path))
    found: dict[int, Category] = {}
    lengths = _keypoint_lengths(document)
    for entry in document["categories"]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_int(number) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
            problems.error("categories need an integer id and a name", f"category {short(entry)}")
        elif number in found:
            problems.error(_OWN, f"category {number} {entry['name']!r}: its id or name occurs twice")
        else:
            found[number] = _category(entry, lengths.get(number, 0), problems)
    _drop_headings(document, found, problems)
    names = Counter(category.name for category in found.values())
    for category in found.values():
        if names[category.name] > 1:
            problems.error(_OWN, f"category {category.id} {category.name!r}: its id or name occurs twice")
    problems.report()
    return sorted(found.values(), key=lambda category: category.id)


def _drop_headings(document: Values, found: dict[int, Category], problems: Problems) -> None:
    """Leave out categories that are only parents of others: Roboflow writes one, named like the project or a class."""
    parent_of = {e["id"]: str(e.get("supercategory")) for e in document["categories"] if _is_entry(e)}
    children = {name: {i for i, parent in parent_of.items() if parent == name} for name in set(parent_of.values())}
    used = _used(document)
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


def _used(document: Values) -> set[int]:
    """The categories that occur in annotations."""
    return {a["category_id"] for a in _objects(document) if is_int(a.get("category_id"))}


def _objects(document: Values) -> list[Values]:
    return [annotation for annotation in document["annotations"] if isinstance(annotation, dict)]


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


def _keypoint_lengths(document: Values) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for annotation in _objects(document):
        given, category = annotation.get("keypoints"), annotation.get("category_id")
        if isinstance(given, list) and len(given) % 3 == 0 and is_int(category):
            lengths[category] = max(lengths.get(category, 0), len(given) // 3)
    return lengths


def renamed(document: Values, categories: list[Category], problems: Problems) -> dict[int, int | None]:
    """This file's category ids to the training file's: equal where id and name agree, else by name; None: unknown."""
    by_id = {category.id: category.name for category in categories}
    by_name = {category.name: category.id for category in categories}
    points = {category.id: category.keypoints for category in categories}
    used = _used(document)
    found: dict[int, int | None] = {}
    for entry in document["categories"]:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not is_int(number) or not isinstance(name, str):
            problems.error("categories need an integer id and a name", f"category {short(entry)}")
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
