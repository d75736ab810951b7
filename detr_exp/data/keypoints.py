"""The keypoints of each class, their skeleton, and the pairs that are swapped when an image is mirrored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from detr_exp.data.content import Category
from detr_exp.protocols import Labels

# Ronchi & Perona 2017, as used by the COCO keypoint evaluation: nose, eyes, ears, shoulders, elbows, wrists, hips,
# knees, ankles.
COCO_SIGMAS = [0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072]
COCO_SIGMAS += [0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089]
DEFAULT_SIGMA = 0.05
FlipPairs: TypeAlias = "Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]]"
SIDEWAYS = {"left", "right", "l", "r", "lh", "rh", "east", "west", "clockwise", "counterclockwise"}
_MIRROR = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass
class KeypointSchema:
    """Keypoints of every class of a data set; K is the largest number any class has.

    Attributes:
        names: per label the names of its keypoints; empty where a class has none.
        flip_pairs: per label the 0-based pairs that are swapped when mirrored.
        skeletons: per label the 0-based pairs that are connected.
        sigmas: `[K]` OKS scales.
        flippable: whether images may be mirrored: the pairs are known for every class with keypoints.
    """

    names: list[list[str]]
    flip_pairs: list[list[tuple[int, int]]]
    skeletons: list[list[tuple[int, int]]]
    sigmas: list[float]
    flippable: bool

    @property
    def counts(self) -> list[int]:
        """Keypoints per label."""
        return [len(names) for names in self.names]

    @property
    def skeleton(self) -> list[tuple[int, int]]:
        """The connected pairs of all classes."""
        return sorted({line for lines in self.skeletons for line in lines})

    def flip_order(self) -> np.ndarray:
        """`[C, K]` int64: per class the index of the original keypoint at each position of a mirrored object."""
        order = np.tile(np.arange(len(self.sigmas)), (len(self.names), 1))
        for label, pairs in enumerate(self.flip_pairs):
            for a, b in pairs:
                order[label, [a, b]] = b, a
        return order


def schema(
    by_label: Sequence[Category | None],
    *,
    flip_pairs: FlipPairs | None = None,
    sigmas: Sequence[float] | None = None,
) -> KeypointSchema | None:
    """The schema of a data set's categories; None when no category has keypoints.

    Args:
        by_label: the category of each label; None where a label is unused.
        flip_pairs: replaces the pairs of the categories or of their names: pairs for every class, or a mapping from
            names of classes to their pairs.
        sigmas: replaces the OKS scales.

    Raises:
        ValueError: these do not fit the number of keypoints.
    """
    most = max((len(category.keypoints) for category in by_label if category), default=0)
    if most == 0:
        return None
    if sigmas is not None and (len(sigmas) != most or not all(0 < s < np.inf for s in sigmas)):
        raise ValueError(
            f"data.keypoint_sigmas has {len(sigmas)} values {list(sigmas)}, but the data have {most} keypoints; give "
            "one positive number for each, or null"
        )
    given = _given(flip_pairs, [category for category in by_label if category], most)
    pairs: list[list[tuple[int, int]]] = []
    flippable = True
    for category in by_label:
        found: list[tuple[int, int]] | None = []
        if category is not None and category.keypoints:
            found = given.get(category.name, category.flip_pairs)
            found = pairs_by_name(category.keypoints) if found is None else found
            flippable = flippable and found is not None
        pairs.append([(a, b) for a, b in found or [] if max(a, b) < len(category.keypoints)] if category else [])
    return KeypointSchema(
        names=[list(category.keypoints) if category else [] for category in by_label],
        flip_pairs=pairs,
        skeletons=[list(category.skeleton) if category else [] for category in by_label],
        sigmas=list(sigmas) if sigmas is not None else _sigmas(by_label, most),
        flippable=flippable,
    )


def pairs_by_name(names: Sequence[str]) -> list[tuple[int, int]] | None:
    """Pairs whose names differ only in one word left / right (or l / r); None when there is no such pair."""
    words = [tuple(split_words(name)) for name in names]
    place = {word: i for i, word in enumerate(words)}
    pairs = []
    for i, word in enumerate(words):
        sides = [k for k, part in enumerate(word) if part in _MIRROR]
        if len(sides) == 1:
            other = place.get(tuple(_MIRROR[part] if k == sides[0] else part for k, part in enumerate(word)))
            if other is not None and i < other:
                pairs.append((i, other))
    return pairs or None


def split_words(name: str) -> list[str]:
    """`turnLeft_2` -> turn, left, 2."""
    return re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def mirror_remarks(schema: KeypointSchema, classes: Sequence[str], sideways: bool) -> dict[str, list[str]]:
    """Likely mistakes in the flip pairs: per kind, the classes and points.

    Args:
        schema: of the data set.
        classes: a name per label.
        sideways: images are mirrored left to right; else only upside down.
    """
    found: dict[str, list[str]] = {}
    for label, names in enumerate(schema.names):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            found.setdefault("keypoints of one class have the same name", []).append(f"{classes[label]!r}: {twice}")
        if not schema.flippable and names and not schema.flip_pairs[label]:
            kind = (
                "keypoints whose mirror pairs are not known, so images are not mirrored; name the pairs with "
                "data.keypoint_flip_pairs=[[1,2],...], or [] if there are none"
            )
            found.setdefault(kind, []).append(f"{classes[label]!r}: {', '.join(names)}")
        paired = {k for pair in schema.flip_pairs[label] for k in pair}
        alone = [name for k, name in enumerate(names) if k not in paired]
        sided = [n for n in alone if SIDEWAYS & set(split_words(n)) or any(_is_twin(n, other) for other in alone)]
        if schema.flippable and sideways and sided:
            kind = "keypoints that name a side but are in no mirror pair: data.keypoint_flip_pairs"
            found.setdefault(kind, []).extend(f"{classes[label]!r}: {name!r}" for name in sided)
    return found


def _is_twin(one: str, other: str) -> bool:
    """`lear` and `rear`, `eyeL` and `eyeR`: equal except for l and r at one end."""
    one, other = one.lower(), other.lower()
    starts = {one[:1], other[:1]} == {"l", "r"} and one[1:] == other[1:]
    return starts or ({one[-1:], other[-1:]} == {"l", "r"} and one[:-1] == other[:-1])


def _given(flip_pairs: FlipPairs | None, categories: Sequence[Category], most: int) -> dict[str, list[tuple[int, int]]]:
    """The configured pairs, per class name."""
    if flip_pairs is None:
        return {}
    if not isinstance(flip_pairs, Mapping):
        for_all = [_pair(pair, most) for pair in (flip_pairs if isinstance(flip_pairs, Sequence) else [flip_pairs])]
        return {category.name: for_all for category in categories}
    counts = {category.name: len(category.keypoints) for category in categories if category.keypoints}
    by_name = {str(name): pairs for name, pairs in flip_pairs.items()}
    for name, pairs in by_name.items():
        if name not in counts or not isinstance(pairs, Sequence):
            raise ValueError(
                f"data.keypoint_flip_pairs has {name!r}: {pairs}; give lists of pairs by the names of classes with "
                f"keypoints, {', '.join(map(repr, counts))}: data.keypoint_flip_pairs={{{next(iter(counts))}: [[0,1]]}}"
            )
    return {name: [_pair(pair, counts[name]) for pair in pairs] for name, pairs in by_name.items()}


def _pair(pair: object, most: int) -> tuple[int, int]:
    given = list(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else [pair]
    numbers = [k for k in given if isinstance(k, int) and 0 <= k < most]
    if len(given) != 2 or len(set(numbers)) != 2:
        raise ValueError(
            f"data.keypoint_flip_pairs has {pair}; a pair is two different numbers of 0 .. {most - 1}, for "
            "example data.keypoint_flip_pairs=[[1,2],[3,4]]"
        )
    return numbers[0], numbers[1]


def _sigmas(by_label: Sequence[Category | None], most: int) -> list[float]:
    longest = next(category for category in by_label if category and len(category.keypoints) == most)
    if longest.sigmas is not None:
        return list(longest.sigmas)
    is_person = most == len(COCO_SIGMAS) and longest.keypoints[0].lower() == "nose"
    return list(COCO_SIGMAS) if is_person else [DEFAULT_SIGMA] * most


def sigmas_for(data: Labels, category_ids: Sequence[int], predicted: Sequence[int]) -> list[list[float]] | None:
    """OKS scales of the keypoints of each label of a network; None: the data have no keypoints.

    Args:
        data: has the classes and their keypoints.
        category_ids: the data's category id of each label.
        predicted: keypoints that the network predicts for each label; empty: none.

    Raises:
        ValueError: a class has another number of keypoints than the network predicts.
    """
    schema = data.keypoints
    of_id = {} if schema is None else dict(zip(data.category_ids, schema.counts))
    for number, count in zip(category_ids, predicted):
        if of_id.get(number, count) != count:
            name = dict(zip(data.category_ids, data.classes))[number]
            raise ValueError(
                f"class {name!r} has {of_id[number]} keypoints in the data, but the network predicts "
                f"{count}; evaluate it on data with the keypoints it was trained on"
            )
    return None if schema is None else [list(schema.sigmas[: of_id.get(number, 0)]) for number in category_ids]


def of_network(data: Labels | None, given: Sequence[int] | None, network: str) -> dict[str, list[int] | list[float]]:
    """`keypoint_counts`, keypoints of each label that a network is to predict, and `keypoint_sigmas`, their OKS scales.

    Args:
        data: has the classes and their keypoints; None where `given` is all that is known.
        given: `model.keypoint_counts`.
        network: its class, for messages.

    Raises:
        ValueError: the data have no keypoints, or other ones than the model.
    """
    if data is None and given is not None:
        most = max(given, default=0)
        sigmas = COCO_SIGMAS if most == len(COCO_SIGMAS) else [DEFAULT_SIGMA] * most
        return {"keypoint_counts": list(given), "keypoint_sigmas": sigmas}
    if data is None or data.keypoints is None:
        raise ValueError(
            f"{network} predicts keypoints, but the data have none; use data with keypoints, or model=rfdetr"
        )
    counts = data.keypoints.counts
    if given is not None and list(given) != counts:
        raise ValueError(
            f"model.keypoint_counts is {list(given)}, but the classes of the data have {counts} keypoints; "
            "model.keypoint_counts=null uses those"
        )
    return {"keypoint_counts": counts, "keypoint_sigmas": list(data.keypoints.sigmas)}
