"""The `data.yaml` of a YOLO data set: names, keypoints, and where the splits are.

Names are read as text, as written: YAML would read `no` as false, `12:30` as 750, `1e3` and `007` as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from detr_exp.data.content import Category
from detr_exp.data.files import decoded
from detr_exp.data.problems import short
from detr_exp.values import Values

_LARGEST = 2**20
_MOST_KEYPOINTS = 1000


@dataclass
class Description:
    """The content of a `data.yaml`.

    Attributes:
        path: of the file.
        keys: everything in it, as YAML reads it.
        categories: the classes.
        shape: (keypoints, 2 or 3 numbers each); None where rows have none.
    """

    path: Path
    keys: Values
    categories: list[Category]
    shape: tuple[int, int] | None


def read_description(path: Path) -> Description:
    """Read a `data.yaml`.

    Raises:
        ValueError: it is not readable, a key stands in it twice, or something does not fit.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a data.yaml is small, list images in text files")
    try:
        text = decoded(path.read_bytes(), path)
        keys, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(keys, dict) or not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} holds a {type(keys).__name__}; it needs keys names, train and val")
    written = {key.value: value for key, value in _pairs(node, path)}
    shape = _keypoint_shape(keys.get("kpt_shape"), path)
    names = _names(written.get("names"), path)
    if keys.get("nc", len(names)) != len(names):
        raise ValueError(f"{path}: nc is {short(keys['nc'])}, but there are {len(names)} names; drop nc")
    points = _keypoint_names(written.get("kpt_names"), shape[0] if shape else 0, len(names), path)
    pairs = _flip_pairs(keys.get("flip_idx"), shape[0], path) if shape else None
    categories = [Category(i, name, keypoints=points[i], flip_pairs=pairs) for i, name in enumerate(names)]
    return Description(path, keys, categories, shape)


def _pairs(node: yaml.MappingNode, path: Path) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Keys and values of a mapping, as written; duplicate keys are refused, where YAML silently keeps the last one."""
    pairs = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    keys = [key.value for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        line = node.start_mark.line + 1
        raise ValueError(f"{path}: the key {short(twice[0])} stands twice below line {line}; join the two, or drop one")
    return pairs


def _texts(node: yaml.Node | None) -> list[str] | None:
    """A list of plain values as they are written; None if it is anything else."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    return None


def _names(node: yaml.Node | None, path: Path) -> list[str]:
    names = _texts(node)
    if isinstance(node, yaml.MappingNode):
        pairs = _pairs(node, path)
        numbers = [key.value for key, _ in pairs]
        if sorted(numbers) != sorted(str(i) for i in range(len(node.value))):
            raise ValueError(f"{path}: the keys of names are {short(numbers)}; they must be 0 .. {len(numbers) - 1}")
        if all(isinstance(value, yaml.ScalarNode) for _, value in pairs):
            by_number = {key.value: value.value for key, value in pairs}
            names = [by_number[str(i)] for i in range(len(pairs))]
    if not names or not all(name.strip() for name in names):
        found: object = names
        if names is None and node is not None:
            found = (
                node.value
                if isinstance(node, yaml.ScalarNode)
                else f"a {'sequence' if isinstance(node, yaml.SequenceNode) else 'mapping'} of other things"
            )
        raise ValueError(f"{path}: names is {short(found)}; give the class names as a list or as 0: name, 1: name, ...")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: names has a name twice: {short(twice)}; each class needs its own")
    return names


def _keypoint_shape(shape: object, path: Path) -> tuple[int, int] | None:
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(v, int) for v in shape):
        count, numbers = shape
        if 1 <= count <= _MOST_KEYPOINTS and numbers in (2, 3):
            return count, numbers
    raise ValueError(
        f"{path}: kpt_shape is {short(shape)}; it is [number of keypoints, 2 or 3], of at most {_MOST_KEYPOINTS}"
    )


def _keypoint_names(node: yaml.Node | None, count: int, classes: int, path: Path) -> list[list[str]]:
    """Per class the names of its keypoints: one list for all of them, or a list for each by its number."""
    if count == 0 or node is None:
        return [[str(k) for k in range(count)] for _ in range(classes)]
    lists = {"all": _texts(node)}
    if isinstance(node, yaml.MappingNode):
        lists = {key.value: _texts(value) for key, value in _pairs(node, path)}
        if unknown := sorted(set(lists) - {str(i) for i in range(classes)}):
            raise ValueError(f"{path}: kpt_names has {short(unknown[0])}; its keys are classes, 0 .. {classes - 1}")
    for key, names in lists.items():
        if names is None or len(names) != count:
            raise ValueError(f"{path}: kpt_names of {key} is {short(names)}; kpt_shape asks for {count} names")
    numbered = lists.get("all") or [str(k) for k in range(count)]
    return [list(lists.get(str(i)) or numbered) for i in range(classes)]


def _flip_pairs(order: object, count: int, path: Path) -> list[tuple[int, int]] | None:
    if order is None:
        return None
    numbers = order if isinstance(order, list) and all(isinstance(k, int) for k in order) else []
    if sorted(numbers) == list(range(count)) and all(numbers[numbers[k]] == k for k in range(count)):
        return [(k, other) for k, other in enumerate(numbers) if k < other]
    raise ValueError(f"{path}: flip_idx is {short(order)}; it must exchange pairs of the numbers 0 .. {count - 1}")
