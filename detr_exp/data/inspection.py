"""Inspect a data set before training on it: its problems and its statistics.

Reads all annotations and decodes all images. Findings are errors (training refuses the data), warnings (training
continues, but something is dropped or likely wrong) or notes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from detr_exp.data.content import SPLITS, Split
from detr_exp.data.dataset import DataSet
from detr_exp.data.headers import in_turn
from detr_exp.data.image import ImageError, oddities
from detr_exp.data.joined import tables_of
from detr_exp.data.keypoints import SIDEWAYS, mirror_remarks, split_words
from detr_exp.data.problems import Problems, collected
from detr_exp.data.table import TableSplit, flat
from detr_exp.values import Values

Made = TypeVar("Made")
LEVELS = ("error", "warning", "note")
THREADS = 4
SMALL, MEDIUM = 32**2, 96**2  # square pixels of the image, as COCO divides sizes
LEAST_SIDE = 4  # pixels at the network's input; smaller objects are hardly visible
UPRIGHT = {"up", "down", "top", "bottom", "upper", "lower", "north", "south", "upward", "downward"}


@dataclass
class Finding:
    """One kind of problem of one source.

    Attributes:
        level: `error`, `warning` or `note`.
        source: the file, folder or split.
        kind: what is wrong, and how to fix it or how it is handled.
        cases: per case its annotation, line or image.
    """

    level: str
    source: str
    kind: str
    cases: list[str]


@dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        findings: sorted by level.
        splits: per split the numbers of `split_facts`.
        classes: per class its name, id, and per split the numbers of objects and images.
    """

    findings: list[Finding] = field(default_factory=list)
    splits: dict[str, Values] = field(default_factory=dict)
    classes: list[Values] = field(default_factory=list)

    def add(self, level: str, source: str, kind: str, cases: Sequence[str]) -> None:
        if cases:
            self.findings.append(Finding(level, source, kind, list(cases)))

    def read(self, name: str, make: Callable[[], Made]) -> Made | None:
        """Call `make` and record the problems that it reports; None where it fails."""
        result = None
        with collected() as problems:
            try:
                result = make()
            except ValueError as error:
                if not any(part.errors for part in problems):
                    self.add("error", name, "cannot be read", [str(error)])
        self.findings += from_problems(problems)
        return result

    def count(self, level: str) -> int:
        return sum(len(finding.cases) for finding in self.findings if finding.level == level)


def inspect(
    make: Callable[[], DataSet], *, image_size: tuple[int, int], num_queries: int
) -> tuple[Inspection, DataSet | None]:
    """Read all annotations and images.

    Args:
        make: builds the data set.
        image_size: (height, width) of the network.
        num_queries: of that network.

    Returns:
        the result, and the data set; None where not even its classes can be read.
    """
    found = Inspection()
    data = found.read("the data set", make)
    if data is not None:
        missing = [name for name in SPLITS if name not in data.content.read]
        found.add("note", data.content.origin, "splits that the data set does not have", missing)
        found.read("the data set", data.check)
        with collected():  # unreadable splits were already reported
            splits = {name: split for name in data.content.read if (split := _readable(data, name)) is not None}
        tables = {f"{n} {of}".strip(): t for n, split in splits.items() for of, t in tables_of(split).items()}
        check_images(found, tables, data.on_error)
        found.splits = {
            name: split_facts(found, name, split, image_size, num_queries) for name, split in splits.items()
        }
        found.classes = class_facts(found, data, splits)
        check_names(found, data)
    found.findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return found, data


def _readable(data: DataSet, name: str) -> Split | None:
    try:
        return data.split(name)
    except ValueError:
        return None


def from_problems(problems: Sequence[Problems]) -> Iterator[Finding]:
    """The problems that the readers reported."""
    for part in problems:
        for level, kinds in (("error", part.errors), ("warning", part.warnings), ("note", part.notes)):
            yield from (Finding(level, part.source, kind, cases) for kind, cases in kinds.items())


# ----------------------------------------------------------------------------------------------------------- images


def check_images(found: Inspection, splits: Mapping[str, TableSplit], on_error: str) -> None:
    """Decode every image; report those that cannot be read, are rotated or misnamed, or occur more than once."""
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    said = {case for finding in found.findings for case in finding.cases}  # of headers
    with ThreadPoolExecutor(THREADS) as pool:
        for name, split in splits.items():
            problems = Problems(name, on_error)
            for index, (digest, remarks) in enumerate(in_turn(pool, partial(_looked_at, split), len(split))):
                if digest is None:
                    if remarks[0] not in said:
                        problems.image(remarks[0])
                    continue
                places[digest].append((name, index))
                for remark in remarks:
                    problems.warn(remark, split.paths[index])
            found.findings += from_problems([problems])
    repeated = [group for group in places.values() if len(group) > 1]
    across = [group for group in repeated if len({name for name, _ in group}) > 1]
    for source, kind, groups in (
        (
            "between splits",
            "images of one split are in another too: metrics on them are not on unseen images",
            across,
        ),
        ("within a split", "images occur more than once", [group for group in repeated if group not in across]),
    ):
        named = (" = ".join(f"{name} {splits[name].paths[i]}" for name, i in group) for group in groups)
        found.add("warning", source, kind, sorted(named))


def _looked_at(split: TableSplit, index: int) -> tuple[bytes | None, list[str]]:
    """(hash of the decoded pixels, remarks), or (None, [what is wrong])."""
    path = Path(split.paths[index])
    try:
        pixels = split.image(index)
        remarks = oddities(path, split.size(index), split.channels)
    except ImageError as error:
        return None, [str(error)]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, key=repr(pixels.shape).encode())
    return digest.digest(), remarks


# ------------------------------------------------------------------------------------------------------------ numbers


def split_facts(found: Inspection, name: str, split: Split, image_size: tuple[int, int], num_queries: int) -> Values:
    """Statistics of one split: images, objects, sizes; unusual values are reported."""
    all_of = flat(split)
    counts, sizes, boxes, owner = all_of.counts, all_of.sizes, all_of.boxes_xyxy, all_of.owner
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(1)
    scale = np.array(image_size[::-1]) / sizes[owner][:, ::-1]
    tiny = np.flatnonzero((sides * scale).min(1) < LEAST_SIDE) if len(sides) else np.zeros(0, int)
    found.add(
        "warning",
        name,
        f"objects under {LEAST_SIDE} pixels at {image_size[0]} x {image_size[1]}; a larger model.image_size shows more",
        [f"{split.name(owner[i])}: {sides[i, 0]:.3g}x{sides[i, 1]:.3g}" for i in tiny.tolist()],
    )
    crowded = [f"{split.name(i)}: {counts[i]} objects" for i in np.flatnonzero(counts > num_queries).tolist()]
    found.add("warning", name, f"images with more objects than the {num_queries} queries", crowded)
    return {
        "images": len(split),
        "empty": int((counts == 0).sum()),
        "objects": int(counts.sum()),
        "per_image": spread(counts),
        "height": spread(sizes[:, 0]),
        "width": spread(sizes[:, 1]),
        "aspect": spread(sizes[:, 1] / sizes[:, 0]),
        "object_side": spread(np.sqrt(areas)),
        "object_aspect": spread(sides[:, 0] / sides[:, 1]),
        "small": int((areas < SMALL).sum()),
        "medium": int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        "large": int((areas >= MEDIUM).sum()),
        "masks": split.has_masks,
        "keypoints": split.has_keypoints,
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Minimum, median, mean, 99th percentile and maximum; empty without values."""
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, [0, 50, 99])
    numbers = {"min": low, "median": middle, "mean": values.mean(), "p99": high, "max": values.max()}
    return {name: round(float(value), 3) for name, value in numbers.items()}


def class_facts(found: Inspection, data: DataSet, splits: Mapping[str, Split]) -> list[Values]:
    """Per class: objects, images and the median side of its objects in each split."""
    rows: list[Values] = [
        {"label": label, "id": number, "name": name}
        for label, (number, name) in enumerate(zip(data.category_ids, data.classes))
        if data.class_map.by_label[label] is not None
    ]
    for split_name, split in splits.items():
        all_of = flat(split)
        sides = np.sqrt((all_of.boxes_xyxy[:, 2:] - all_of.boxes_xyxy[:, :2]).prod(1))
        owner, missing = all_of.owner, []
        for row in rows:
            own = all_of.categories == row["id"]
            row[split_name] = {
                "objects": int(own.sum()),
                "images": len(np.unique(owner[own])),
                "median_side": round(float(np.median(sides[own])), 1) if own.any() else None,
            }
            if not own.any():
                missing.append(f"{row['id']} {row['name']!r}")
        what = "never learned" if split_name == "train" else "not measured here"
        found.add("warning", split_name, f"classes without objects: {what}", missing)
    return rows


# -------------------------------------------------------------------------------------------------------------- names


def check_names(found: Inspection, data: DataSet) -> None:
    """Report names that become wrong when images are mirrored."""
    origin, augment = data.content.origin, data.augment
    for chance, words, key in ((augment.flip, SIDEWAYS, "flip"), (augment.vertical_flip, UPRIGHT, "vertical_flip")):
        if chance:
            kind = f"classes that name a direction, in images that are mirrored; if it matters: data.augment.{key}=0"
            found.add("warning", origin, kind, [repr(name) for name in data.classes if words & set(split_words(name))])
    schema = data.keypoints
    if schema is not None and (augment.flip or augment.vertical_flip):
        for kind, cases in mirror_remarks(schema, data.classes, sideways=augment.flip > 0).items():
            found.add("warning", origin, kind, cases)
        kind = "keypoints in no mirror pair, while others of their class are in one"
        paired = [{k for pair in pairs for k in pair} for pairs in schema.flip_pairs]
        kept = [[name for k, name in enumerate(names) if k not in paired[i]] for i, names in enumerate(schema.names)]
        cases = [f"{data.classes[i]!r}: {', '.join(kept[i])}" for i in range(len(kept)) if paired[i] and kept[i]]
        found.add("note", origin, kind, cases)
