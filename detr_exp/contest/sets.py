"""The data of the proof suite: any folder that `data=auto` reads, as COCO folders that every program can read.

All annotations go through our readers once. What programs are given, and what they are scored by, are files.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from detr_exp import build
from detr_exp.contest.job import ANNOTATIONS
from detr_exp.data.content import SPLITS
from detr_exp.data.part import restricted
from detr_exp.values import Values

FEW = 8  # images of `valid`


@dataclass(frozen=True)
class Fold:
    """One training: which images it learns from and which it is scored by.

    Attributes:
        train: image ids.
        held_out: image ids.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class ImageSet:
    """One set of images.

    Attributes:
        name: of the config.
        content: all images and objects, as a COCO file; `file_name` is an absolute path.
        folds: one, or several whose held-out images together are all images.
        fingerprint: a hash of objects, sizes and files of all images, and of the folds.
    """

    name: str
    content: Values
    folds: tuple[Fold, ...]
    fingerprint: str

    @cached_property
    def truth(self) -> Values:
        """The held-out images of all folds with their objects."""
        return restricted(self.content, [number for fold in self.folds for number in fold.held_out])


def read_set(name: str, root: str, folds: int | None) -> ImageSet:
    """Read a set from its folder.

    Args:
        name: of the config.
        root: in any layout that `data=auto` knows.
        folds: None: train on `train`, and hold out all other splits. A number: that many parts of all images, each
            held out once; for sets too small to spare images.

    Raises:
        ValueError: it cannot be read, or has no split to hold out.
    """
    if not Path(root).is_dir():
        raise ValueError(
            f"sets.{name}.root is {root}, and there is no such folder; name the folder of the sets, data=FOLDER, or of "
            f"this one, sets.{name}.root=FOLDER, or choose others: only=[...]"
        )
    data = build.data(build.compose(["data=auto", f"data.root={json.dumps(root)}"]))
    content: Values = {"info": {}, "images": [], "annotations": [], "categories": []}
    ids: dict[str, list[int]] = {}
    for split in SPLITS:
        if split in data.content.read:
            ids[split] = _append(content, data.split(split).truth())
    if folds is None and len(ids) == 1:
        raise ValueError(
            f"{root} has only a training split, and nothing is held out; make folds of it: sets.{name}.folds=5"
        )
    if folds is None:
        held_out = [number for split in ids if split != "train" for number in ids[split]]
        made: tuple[Fold, ...] = (Fold(tuple(ids["train"]), tuple(held_out)),)
    else:
        made = _folds([number for split in ids for number in ids[split]], folds)
    return ImageSet(name, content, made, _fingerprint(content, made))


def _append(content: Values, split: Values) -> list[int]:
    """Add the images of a split under new ids, and return these."""
    content["categories"] = content["categories"] or split["categories"]
    new = {image["id"]: len(content["images"]) + place for place, image in enumerate(split["images"], start=1)}
    content["images"] += [{**image, "id": new[image["id"]]} for image in split["images"]]
    for one in split["annotations"]:
        number = len(content["annotations"]) + 1
        content["annotations"].append({**one, "id": number, "image_id": new[one["image_id"]]})
    return list(new.values())


def _folds(ids: Sequence[int], count: int) -> tuple[Fold, ...]:
    mixed = list(ids)
    random.Random(0).shuffle(mixed)
    parts = [mixed[place::count] for place in range(count)]
    return tuple(Fold(tuple(sorted(set(mixed) - set(part))), tuple(sorted(part))) for part in parts)


def _fingerprint(content: Values, folds: Sequence[Fold]) -> str:
    digest = hashlib.sha256(repr([(fold.train, fold.held_out) for fold in folds]).encode())
    for image in content["images"]:
        digest.update(Path(image["file_name"]).read_bytes())
    anonymous = [{**image, "file_name": Path(image["file_name"]).name} for image in content["images"]]
    digest.update(json.dumps([anonymous, content["annotations"], content["categories"]], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def write_fold(content: Values, fold: Fold, folder: Path) -> None:
    """Write `train`, `valid` (a few images of `train`) and `held_out` (without objects), with copies of the images."""
    for name, ids in (("train", fold.train), ("valid", fold.train[:FEW]), ("held_out", fold.held_out)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        part = restricted(content, ids)
        images = []
        for image in part["images"]:
            source = Path(image["file_name"])
            copy = folder / name / f"{image['id']:06d}{source.suffix}"
            shutil.copyfile(source, copy)
            images.append({**image, "file_name": copy.name})
        part = {**part, "images": images, **({"annotations": []} if name == "held_out" else {})}
        (folder / name / ANNOTATIONS).write_text(json.dumps(part), "utf-8")
