"""A split in two halves that show the same classes, so that one may choose what the other judges."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from detr_exp.data.content import Split
from detr_exp.data.problems import DataError, listed
from detr_exp.data.table import flat

log = logging.getLogger(__name__)


def halves_of(split: Split, names: Mapping[int, str], origin: str) -> tuple[list[int], list[int]]:
    """Indices of the images of both halves of a split; says which classes only one of them shows.

    Args:
        split: the validation images.
        names: category id -> name.
        origin: of the data, for messages.

    Raises:
        DataError: there are too few images with objects.
    """
    shown = shown_by(split)
    if (count := sum(map(bool, shown))) < 2:
        raise DataError(
            f"{origin}: {count} validation image{'' if count == 1 else 's'} with objects cannot both "
            "choose and judge; add validation images, or choose on all there are: metric.honest_selection=false"
        )
    parts = halves(split.image_ids, shown)
    in_half = [set[int]().union(*(shown[i] for i in part)) for part in parts]
    if lone := sorted(in_half[0] ^ in_half[1]):
        log.warning(
            "%s: only one half of the validation images shows %s; the halves are means over other classes",
            *(origin, listed([names[number] for number in lone], ", ")),
        )
    return parts


def halves(image_ids: Sequence[int], classes: Sequence[Collection[int]]) -> tuple[list[int], list[int]]:
    """Indices of the images of both halves, in their order.

    The halves depend on ids and classes alone, not on the order of the images, on a run's seed, or on processes. The
    images of the rarest class are dealt out first, each to the half that has fewer of that class (Sechidis et al., On
    the Stratification of Multi-Label Data, ECML 2011).

    Args:
        image_ids: of the I images.
        classes: `[I]` the category ids that each of them shows.
    """
    order = sorted(range(len(image_ids)), key=lambda i: hashlib.sha256(str(image_ids[i]).encode()).digest())
    left = {i: set(classes[i]) for i in order}
    counts = Counter(number for shown in left.values() for number in shown)
    having, sizes = [Counter[int](), Counter[int]()], [0, 0]
    half_of: dict[int, int] = {}
    while left:
        rarest = min((number for number in counts if counts[number]), key=lambda n: (counts[n], n), default=None)
        for i in [i for i, shown in left.items() if rarest is None or rarest in shown]:
            half = min((0, 1), key=lambda h: (0 if rarest is None else having[h][rarest], sizes[h]))
            shown, half_of[i] = left.pop(i), half
            sizes[half] += 1
            having[half].update(shown)
            counts.subtract(shown)
    first, second = ([i for i in range(len(image_ids)) if half_of[i] == half] for half in (0, 1))
    return first, second


def shown_by(split: Split) -> list[set[int]]:
    """The category ids that each image shows."""
    all_of = flat(split)
    return [set(part.tolist()) for part in np.split(all_of.categories, np.cumsum(all_of.counts)[:-1])]
