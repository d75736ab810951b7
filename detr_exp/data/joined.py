"""Splits of several data sets as one: image after image, with the classes of all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from detr_exp.data.content import Category, Objects, Split, identity_of, read_ahead
from detr_exp.data.part import Part
from detr_exp.data.table import Flat, TableSplit, category_entry, flat
from detr_exp.values import Values


@dataclass(frozen=True)
class Member:
    """A split of one data set.

    Attributes:
        split: with the category ids of its data set.
        number_of: category id of the data set -> of all data sets together; ids that are not in it are ignored.
        annotated: the category ids of all together of which this data set has all objects; None: all that there are.
            Objects of others are trained on, and are not in the ground truth.
    """

    split: Split
    number_of: Mapping[int, int]
    annotated: tuple[int, ...] | None


class Joined:
    """The images of several splits, one split after another; see `content.Split`.

    Image ids are those of the data sets, increased by a constant for each, so that they are unique.

    Args:
        members: by the names of their data sets, in order.
        categories: of all together.
        shares: of the images of an epoch that are from each member; None: every image once.
    """

    def __init__(
        self, members: Mapping[str, Member], categories: list[Category], shares: Sequence[float] | None = None
    ) -> None:
        self.members, self.categories, self.shares = dict(members), categories, shares
        parts = [member.split for member in self.members.values()]
        self.sizes = [len(part) for part in parts]
        self.starts = np.cumsum([0, *self.sizes])
        self.image_ids: list[int] = []
        self.added: list[int] = []
        for part in parts:
            own = list(part.image_ids)
            taken = max(self.image_ids, default=None)
            self.added.append(0 if taken is None or not own or min(own) > taken else taken + 1 - min(own))
            self.image_ids += [number + self.added[-1] for number in own]
        self.has_masks = all(part.has_masks for part in parts)
        self.has_keypoints = any(part.has_keypoints for part in parts)
        self.most_keypoints = max((len(category.keypoints) for category in categories), default=0)
        self.most_objects = max((part.most_objects for part in parts), default=0)
        lines = [
            f"{name} {one.split.fingerprint} {sorted(one.number_of.items())}" for name, one in self.members.items()
        ]
        self.fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, index: int) -> tuple[Member, int]:
        """The member that has an image, and the index there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return [*self.members.values()][number], index - int(self.starts[number])

    def name(self, index: int) -> str:
        member, inner = self.place(index)
        return member.split.name(inner)

    def size(self, index: int) -> tuple[int, int]:
        member, inner = self.place(index)
        return member.split.size(inner)

    def objects(self, index: int) -> Objects:
        member, inner = self.place(index)
        return self._ours(member, member.split.objects(inner))

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        member, inner = self.place(index)
        return member.split.image(inner, smallest)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        member, inner = self.place(index)
        image, objects = member.split.load(inner)
        return image, self._ours(member, objects)

    def ahead(self, indices: Sequence[int]) -> None:
        """Pass on which images are used next; see `content.Afar`."""
        places = [self.place(index) for index in indices]
        for member in self.members.values():
            read_ahead(member.split, [inner for owner, inner in places if owner is member])

    def identity(self, index: int) -> str | None:
        """See `content.Afar`."""
        member, inner = self.place(index)
        return identity_of(member.split, inner)

    def flat(self) -> Flat:
        """What `objects` returns of every image, without outlines and keypoints, in one."""
        parts = []
        for member in self.members.values():
            part = flat(member.split)
            keep = np.isin(part.categories, [*member.number_of])
            counts = np.bincount(part.owner[keep], minlength=len(part.counts))
            categories = _renumbered(part.categories[keep], member)
            parts.append(Flat(part.sizes, counts, categories, part.boxes_xyxy[keep]))
        names = ("sizes", "counts", "categories", "boxes_xyxy")
        return Flat(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def truth(self) -> Values:
        images: list[Values] = []
        annotations: list[Values] = []
        for (name, member), added in zip(self.members.items(), self.added):
            truth = member.split.truth()
            known = {} if member.annotated is None else {"annotated": list(member.annotated)}
            images += [{**image, "id": image["id"] + added, "set": name, **known} for image in truth["images"]]
            for one in truth["annotations"]:
                number = member.number_of.get(one["category_id"])
                if number is not None and (member.annotated is None or number in member.annotated):
                    ids = {"id": len(annotations) + 1, "image_id": one["image_id"] + added, "category_id": number}
                    annotations.append({**one, **ids})
        categories = [category_entry(category) for category in self.categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _ours(self, member: Member, objects: Objects) -> Objects:
        """The objects of one image of a member, with the category ids of all together."""
        keep = np.flatnonzero(np.isin(objects.categories, [*member.number_of]))
        points = objects.keypoints
        if self.has_keypoints:
            wide = np.zeros((len(keep), self.most_keypoints, 3), np.float32)
            if points is not None:
                wide[:, : points.shape[1]] = points[keep]
            points = wide
        return replace(
            objects,
            categories=_renumbered(objects.categories[keep], member),
            boxes_xyxy=objects.boxes_xyxy[keep],
            segments=None if objects.segments is None else [objects.segments[i] for i in keep],
            keypoints=points,
            extra={name: values[keep] for name, values in objects.extra.items()},
            annotated=None if member.annotated is None else np.array(member.annotated, np.int64),
        )


def _renumbered(categories: np.ndarray, member: Member) -> np.ndarray:
    return np.array([member.number_of[number] for number in categories.tolist()], np.int64)


def tables_of(split: Split) -> dict[str, TableSplit]:
    """The parts of a split that were read from annotation files, by the name of their data set; "" of a single one."""
    if isinstance(split, TableSplit):
        return {"": split}
    members = split.members if isinstance(split, Joined) else {}
    return {name: one.split for name, one in members.items() if isinstance(one.split, TableSplit)}


def image_ids_by_set(split: Split) -> dict[str, tuple[int, ...]]:
    """The image ids of each of several data sets in a split; empty for a single data set."""
    if isinstance(split, Part):
        kept = set(split.image_ids)
        inner = image_ids_by_set(split.whole)
        return {name: found for name, ids in inner.items() if (found := tuple(i for i in ids if i in kept))}
    if not isinstance(split, Joined):
        return {}
    ends = split.starts[1:].tolist()
    return {
        name: tuple(split.image_ids[end - size : end])
        for name, size, end in zip(split.members, split.sizes, ends)
        if size
    }
