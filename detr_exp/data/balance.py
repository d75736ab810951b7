"""How often an epoch uses each training image: more often with a rare class, less often without objects."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from detr_exp.data.content import Split
from detr_exp.data.joined import Joined
from detr_exp.data.table import Flat, flat

log = logging.getLogger(__name__)
UNIT = 2**20  # parts of one use: sums of whole numbers are exact, in any order


@dataclass(frozen=True)
class Balance:
    """Settings of the balance.

    Attributes:
        repeat_threshold: images with a class that a smaller share of all images has are repeated; None: none are.
        keep_empty: share of the images without objects that an epoch uses.

    Raises:
        ValueError: a value out of its range.
    """

    repeat_threshold: float | None = None
    keep_empty: float = 1.0

    def __post_init__(self) -> None:
        if self.repeat_threshold is not None and not 0 < self.repeat_threshold <= 1:
            raise ValueError(
                f"data.repeat_threshold is {self.repeat_threshold}; it must be a share of the images above 0, at most "
                "1, or null for no repeats: data.repeat_threshold=0.001"
            )
        if not 0 <= self.keep_empty <= 1:
            raise ValueError(
                f"data.keep_empty is {self.keep_empty}; it must be a share of the images without objects, from 0 to 1: "
                "data.keep_empty=0.5"
            )

    def uses(self, split: Split) -> np.ndarray | None:
        """How often an epoch uses each image of a split, on average.

        Returns:
            `[I]` int64 in parts of `UNIT`; None: each image once.

        Raises:
            ValueError: no image is left.
        """
        joined = split if isinstance(split, Joined) and split.shares is not None else None
        if self.repeat_threshold is None and self.keep_empty == 1 and joined is None:
            return None
        found = flat(split)
        factors = np.ones(len(found.counts))
        if self.repeat_threshold is not None:
            factors = repeat_factors(found, self.repeat_threshold)
        factors[found.counts == 0] = self.keep_empty
        if joined is not None:
            factors = shared(factors, joined)
        uses = np.round(factors * UNIT).astype(np.int64)
        if uses.sum() < UNIT:
            raise ValueError(
                f"data.keep_empty is {self.keep_empty}, but only {(found.counts > 0).sum()} of {len(uses)} training "
                "images have objects, so that none is left to train on; use images without objects: data.keep_empty=1"
            )
        log.info(
            "an epoch uses %d images of %d: %d are repeated, up to %.2f times; of %d without objects the share %.3g",
            *(uses.sum() // UNIT, len(uses), (uses > UNIT).sum(), uses.max() / UNIT),
            *((found.counts == 0).sum(), self.keep_empty),
        )
        return None if (uses == UNIT).all() else uses


def repeat_factors(objects: Flat, threshold: float) -> np.ndarray:
    """Repeat factors of images (Gupta et al. 2019, LVIS, section 5.2): `r = max(1, sqrt(t / f))`.

    `f` is the share of the images that have a class; an image has the largest factor of its classes.

    Args:
        objects: of the I images.
        threshold: t.

    Returns:
        `[I]`, at least 1.
    """
    pairs = np.unique(np.stack([objects.owner, objects.categories]), axis=1)  # each image and class once
    _, place, having = np.unique(pairs[1], return_inverse=True, return_counts=True)
    of_class = np.sqrt(threshold * len(objects.counts) / having)
    factors = np.ones(len(objects.counts))
    np.maximum.at(factors, pairs[0], of_class[place])
    return factors


def shared(factors: np.ndarray, split: Joined) -> np.ndarray:
    """Factors `[I]` scaled so that each member of a split has its share of their sum, which stays the same.

    Raises:
        ValueError: a member has a share, but no image that is used.
    """
    sums = [factors[start : start + size].sum() for start, size in zip(split.starts, split.sizes)]
    shares = split.shares or []
    if empty := [name for name, share, total in zip(split.members, shares, sums) if share and not total]:
        raise ValueError(
            f"data.source.sets: {', '.join(empty)} has a weight but no training image that is used; remove it, or use "
            "images without objects: data.keep_empty=1"
        )
    scales = [share * sum(sums) / total if total else 0.0 for share, total in zip(shares, sums)]
    return factors * np.repeat(scales, split.sizes)


def sampled_uses(uses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers of uses: each its own average rounded down or up, with the chance that the average says.

    One random number, and the images in random order, decide for all (systematic sampling), so that their sum is that
    of the averages, rounded down or up: every epoch has the same length.

    Args:
        uses: `[I]` averages in parts of `UNIT`.
        rng: of the epoch.

    Returns:
        `[I]` int64.
    """
    order = rng.permutation(len(uses))
    ends = (np.cumsum(uses[order]) + rng.integers(UNIT)) // UNIT
    counts = np.empty_like(uses)
    counts[order] = np.diff(ends, prepend=0)
    return counts


def earlier_uses(images: np.ndarray) -> np.ndarray:
    """`[n]` int64: how often the image of each entry of `[n]` has occurred before it."""
    order = np.argsort(images, kind="stable")
    _, first, counts = np.unique(images[order], return_index=True, return_counts=True)
    earlier = np.empty_like(images)
    earlier[order] = np.arange(len(images)) - np.repeat(first, counts)
    return earlier
