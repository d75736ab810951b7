"""A split in two halves that show the same classes, so that one may choose what the other judges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from detr_exp.data.content import Split
from detr_exp.data.table import flat


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
