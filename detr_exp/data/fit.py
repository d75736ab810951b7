"""How an image is brought to the size of the network's input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from detr_exp.ops.canvas import content_size, padding_mask

FITS = ("stretch", "letterbox", "short_side")
STEP = 1.2  # between the long sides of two buckets
Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """One of the ways.

    Attributes:
        name: `stretch`: to the whole input, whatever its shape. `letterbox`: as large as it fits with its proportions,
            in the top left corner; the rest is padding, which the network leaves out. `short_side`: the same in an
            input of about its proportions, one of `buckets_of`.
        buckets: sizes of the input, of which each image gets that which suits its shape; empty: one size.
        fill: colour of the padding, a value for each channel. The mean colour of the network is zero after its
            normalisation, as is what its convolutions add beyond the border of an image, so that there is no edge where
            the padding begins.
    """

    name: str = "stretch"
    fill: tuple[int, ...] = (0, 0, 0)
    buckets: tuple[Size, ...] = ()

    def canvas(self, size: Size, image_size: Size) -> Size:
        """(height, width) of the input for an image of `size`, with a network whose usual input is `image_size`.

        Of several sizes of the network, the nearest in proportions. For `short_side`, the smallest bucket in which its
        short side has full length; the longest one, if its long side fits in none.
        """
        if not self.buckets:
            return image_size
        if self.name != "short_side":
            shape = math.log(max(1, size[0]) / max(1, size[1]))
            return min(self.buckets, key=lambda one: abs(math.log(one[0] / one[1]) - shape))
        axis = 1 if size[1] >= size[0] else 0  # of the long side
        needed = self.buckets[0][0] * size[axis] / max(1, size[1 - axis])
        fitting = sorted((one for one in self.buckets if one[axis] >= one[1 - axis]), key=lambda one: one[axis])
        return next((one for one in fitting if one[axis] >= needed - 0.5), fitting[-1])

    @property
    def pads(self) -> bool:
        return self.name != "stretch"

    def content(self, size: tuple[int, int], out: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in the output of an image of (height, width) `size`."""
        return content_size(size, out) if self.pads else out

    def padding(self, sizes: Sequence[tuple[int, int]], out: tuple[int, int]) -> Tensor | None:
        """`[B, H, W]` bool, True beside images of (height, width) `sizes`; None where nothing is padded."""
        return padding_mask(torch.tensor([self.content(size, out) for size in sizes]), out) if self.pads else None


STRETCH = Fit()


class Coloured(Protocol):
    """What is needed of a network."""

    image_size: Size
    stride: int

    pixel_mean: Tensor  # of RGB in 0..1


def fit_of(name: str | None, network: Coloured) -> Fit:
    """The fit of a network.

    Args:
        name: of `FITS`; None: `stretch`.
        network: gives the colour of the padding.
    """
    sizes = sizes_of(network)
    if checked_fit(name) == STRETCH.name:
        return Fit(buckets=sizes)
    buckets = buckets_of(network.image_size, network.stride) if name == "short_side" else sizes
    return Fit(checked_fit(name), tuple(round(255 * value) for value in network.pixel_mean.flatten().tolist()), buckets)


@runtime_checkable
class Bucketed(Protocol):
    """A network that is trained on images of several sizes."""

    buckets: tuple[Size, ...]  # the first is that of the network; none: one size


def sizes_of(network: Coloured) -> tuple[Size, ...]:
    """The sizes of which an image gets one, with the size of the network first; none where it computes at one size."""
    buckets = network.buckets if isinstance(network, Bucketed) else ()
    return buckets if buckets and network.image_size == buckets[0] else ()


def use_one_size(network: Coloured) -> None:
    """Show a network images of its own size only, from now on."""
    if isinstance(network, Bucketed):
        network.buckets = ()


def buckets_of(image_size: Size, stride: int) -> tuple[Size, ...]:
    """Sizes with the short side of `image_size`, and long sides from that to its long side, in both directions.

    Raises:
        ValueError: both sides are equal, so that there is one size only.
    """
    short, longest = sorted(image_size)
    if short == longest:
        raise ValueError(
            f"data.fit is short_side and model.image_size is {list(image_size)}, which leaves one shape, that of a "
            "letterbox; give the length of the short side and the most for the long one: "
            f"model.image_size=[{short},{-(-short * 3 // 2 // stride) * stride}], or data.fit=letterbox"
        )
    count = max(2, 1 + round(math.log(longest / short) / math.log(STEP)))
    lengths = (short * (longest / short) ** (i / (count - 1)) for i in range(count))
    sides = sorted({round(length / stride) * stride for length in lengths} | {short, longest})
    return tuple((short, side) for side in sides) + tuple((side, short) for side in sides[1:])


def checked_fit(name: str | None) -> str:
    """The name of a fit.

    Raises:
        ValueError: there is none of this name.
    """
    if name is not None and name not in FITS:
        raise ValueError(f"data.fit is {name!r}; use one of {', '.join(FITS)}: data.fit=letterbox")
    return name or FITS[0]


def refuse_other_sizes(fit: str, **choosing: object) -> None:
    """Refuse settings of the data that choose sizes of batches beside `short_side`.

    Raises:
        ValueError: names the setting.
    """
    for key in (key for key, value in choosing.items() if value and fit == "short_side"):
        raise ValueError(
            f"data.fit is short_side, which chooses the size of a batch by the shape of its images, and data.{key} "
            f"chooses it otherwise; leave one out: data.{key}=null, or data.fit=letterbox"
        )


def refuse_several(network: Coloured, fit: str, **choosing: object) -> None:
    """Refuse what chooses sizes of batches beside a network that has several.

    Raises:
        ValueError: names the setting.
    """
    if not (sizes := sizes_of(network)):
        return
    one = f"model.image_size={written(sizes[:1])}"
    if fit == "short_side":
        raise ValueError(
            f"data.fit is short_side, which makes sizes of its own, and model.image_size has several, "
            f"{written(sizes)}; leave one out: data.fit=letterbox, or {one}"
        )
    for key in (key for key, value in choosing.items() if value):
        raise ValueError(
            f"model.image_size is {written(sizes)}, of which the shape of an image chooses one, and data.{key} chooses "
            f"sizes otherwise; leave one out: data.{key}=null, or {one}"
        )


def written(sizes: Sequence[Size]) -> str:
    """Sizes, or the only one, as an override has them."""
    each = [f"[{height},{width}]" for height, width in sizes]
    return each[0] if len(each) == 1 else f"[{','.join(each)}]"
