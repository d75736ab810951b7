"""Samplers: the images and the size of each batch, as pure functions of (seed, epoch)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from detr_exp.data.balance import UNIT, earlier_uses, sampled_uses
from detr_exp.data.phases import Phases

_ORDER, _SIZE = 1, 2  # separate streams of random numbers


class Key(NamedTuple):
    """What a loader worker needs to make a sample.

    Attributes:
        epoch: counted from 0.
        image: its index, plus the number of images for each earlier use in the same epoch.
        height: of the output.
        width: of the output.
    """

    epoch: int
    image: int
    height: int
    width: int


class Keys(list[Key]):
    """The keys of a batch.

    Attributes:
        coming: of the batch that the same loader worker makes next.
    """

    coming: Sequence[Key] = ()


def _with_coming(batches: Iterable[list[Key]], turns: int) -> Iterator[Keys]:
    waiting = deque[Keys]()
    for keys in batches:
        waiting.append(Keys(keys))
        if len(waiting) > turns:
            waiting[0].coming = keys
            yield waiting.popleft()
    yield from waiting


class TrainSampler:
    """Shuffled batches without a remainder; a set smaller than a batch is repeated until it fills one.

    An epoch uses every image once, or as often as `uses` says; its length is the same in every epoch. All ranks shuffle
    in the same order and take turns, so the images of a step do not depend on the number of ranks.

    Args:
        count: images.
        batch_size: per rank.
        seed: decides the order and the sizes.
        size: (height, width) of the network.
        sizes: (height, width) to choose from for each optimiser step; empty: always `size`.
        step_batches: batches of an optimiser step, which share one size (as in RF-DETR): a step does not depend on how
            it is split into batches.
        phases: epochs in which `sizes` apply; in others every batch has `size`.
        uses: `[count]` how often an epoch uses each image on average (see `balance.Balance.uses`); None: once.
        canvases: `[count]` the size for each image: the images of a step have one, as far as there are enough of them;
            what is left has `size`. None: `size` or `sizes`.
        rank: of this process.
        world_size: processes that share the epoch.

    Attributes:
        turns: loader workers that make batches in turns; see `Keys.coming`.
    """

    turns = 1

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        size: tuple[int, int],
        *,
        sizes: Sequence[tuple[int, int]] = (),
        step_batches: int = 1,
        phases: Phases | None = None,
        uses: np.ndarray | None = None,
        canvases: Sequence[tuple[int, int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.canvases = canvases
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.step_batches = step_batches
        self.size, self.sizes = size, list(sizes) or [size]
        self.phases, self.rank, self.world_size = phases or Phases(), rank, world_size
        self.uses, self.per_round = uses, count if uses is None else int(uses.sum() // UNIT)
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return max(1, self.per_round // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, which starts at its first batch."""
        self.epoch, self.start = epoch, 0

    def set_start(self, batch: int) -> None:
        """Skip the first `batch` batches of the next pass, which an interrupted run has already used."""
        self.start = batch

    def __iter__(self) -> Iterator[Keys]:
        return _with_coming(self._batches(), self.turns)

    def _batches(self) -> Iterator[list[Key]]:
        order, size_of = self._order(), self._sizes()
        if self.canvases is not None:
            order, size_of = self._by_shape(order, self.canvases)
        order = order.reshape(len(self), self.world_size, self.batch_size)[:, self.rank]
        for batch in range(self.start, len(self)):
            yield [Key(self.epoch, image, *size_of[batch]) for image in order[batch].tolist()]

    def _sizes(self) -> list[tuple[int, int]]:
        """The size of each batch."""
        sizes = self.sizes if self.phases.has("multi_scale", self.epoch) else [self.size]
        which = np.random.default_rng((self.seed, _SIZE, self.epoch)).integers(len(sizes), size=len(self))
        return [sizes[which[batch // self.step_batches]] for batch in range(len(self))]

    def _by_shape(
        self, order: np.ndarray, canvases: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The same images, those of a step of one size, and the size of each batch.

        A step is complete with its last image in the shuffled order, so that the sizes of an epoch are mixed.
        """
        waiting: dict[tuple[int, int], list[int]] = {}
        steps, sizes, step = list[int](), list[tuple[int, int]](), self.step_batches
        for image in order.tolist():
            alike = waiting.setdefault(canvases[image % self.count], [])
            alike.append(image)
            if len(alike) == step * self.batch_size * self.world_size:
                steps += alike
                sizes += [canvases[image % self.count]] * step
                alike.clear()
        left = set[int]().union(*waiting.values())
        steps += [image for image in order.tolist() if image in left]
        return np.array(steps, order.dtype), sizes + [self.size] * (len(self) - len(sizes))

    def _order(self) -> np.ndarray:
        """`[n]` the images of the epoch as `Key` counts them, for all ranks."""
        needed = len(self) * self.batch_size * self.world_size
        rounds = []
        for turn in range(math.ceil(needed / self.per_round)):
            rng = np.random.default_rng((self.seed, _ORDER, self.epoch, turn))
            images = np.arange(self.count)
            rounds.append(rng.permutation(images if self.uses is None else images.repeat(sampled_uses(self.uses, rng))))
        order = np.concatenate(rounds)[:needed]
        return order + self.count * earlier_uses(order)


class EvalSampler:
    """Every image once, in order; ranks take turns and no image is repeated.

    Args:
        owners: the number of the image of each item of the split, in order; a rank has all items of an image.
        batch_size: per rank; the last batch may be smaller.
        size: (height, width) of the output.
        canvases: the size for each item: those of a batch have one; None: `size`.
        rank: of this process.
        world_size: processes that share the split.

    Attributes:
        turns: as of `TrainSampler`.
    """

    turns = 1

    def __init__(
        self,
        owners: Sequence[int],
        batch_size: int,
        size: tuple[int, int],
        *,
        canvases: Sequence[tuple[int, int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        indices = [index for index, owner in enumerate(owners) if owner % world_size == rank]
        alike: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            alike.setdefault(size if canvases is None else canvases[index], []).append(index)
        self.batches = [
            [Key(0, index, *shape) for index in those[first : first + batch_size]]
            for shape, those in alike.items()
            for first in range(0, len(those), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Keys]:
        return _with_coming(self.batches, self.turns)


def multi_scale_sizes(rule: str | Sequence[int] | None, size: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """The sizes from which that of each step is sampled.

    An image is resized once, to the sampled size, with antialiasing. RT-DETR resizes to `size` first and from there to
    the sampled size by nearest neighbour, which loses detail; this is the only part of its recipe that is not followed.

    Args:
        rule: `rtdetr`: 0.75 to 1.25 times, in steps of the stride, the size itself three times (as D-FINE
            writes RT-DETR's list); `rfdetr`: up to five steps of the stride down and up; a list of longer sides; null:
            only `size`.
        size: (height, width) of the network.
        stride: every side must be a multiple of it.

    Raises:
        ValueError: an unknown rule, or a side that is not a multiple of the stride.
    """
    if any(side % stride for side in size):
        raise ValueError(
            f"model.image_size is {list(size)}, but this network needs multiples of {stride}: "
            f"model.image_size=[{_near(size[0], stride)},{_near(size[1], stride)}]"
        )
    longest = max(size)
    if rule is None:
        sides = []
    elif rule == "rtdetr":
        low, high = int(0.75 * longest / stride) * stride, int(1.25 * longest / stride) * stride
        steps = (longest - low) // stride
        sides = [low + stride * i for i in range(steps)] + [high - stride * i for i in range(steps)] + [longest] * 2
    elif rule == "rfdetr":
        sides = [s for s in range(longest - 5 * stride, longest + 6 * stride, stride) if s >= 2 * stride]
        sides.remove(longest)
    elif isinstance(rule, str):
        raise ValueError(
            f"data.multi_scale is {rule!r}; use null, rtdetr, rfdetr or a list of sides: data.multi_scale=[480,512,544]"
        )
    else:
        sides = [int(side) for side in rule]
        wrong = [side for side in sides if side < stride or side % stride]
        if wrong:
            raise ValueError(
                f"data.multi_scale has {wrong}, but this network needs multiples of {stride}; for example "
                f"data.multi_scale=[{_near(wrong[0], stride)}]"
            )
        return [_scaled(size, side, stride) for side in sides] or [size]
    return [*(_scaled(size, side, stride) for side in sides), size]


def _scaled(size: tuple[int, int], longest: int, stride: int) -> tuple[int, int]:
    height, width = (_near(side * longest / max(size), stride) for side in size)
    return height, width


def _near(side: float, stride: int) -> int:
    return max(stride, round(side / stride) * stride)
