"""How an image is brought to the size of the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from detr_exp.ops.canvas import content_size, padding_mask

FITS = ("stretch", "letterbox")


@dataclass(frozen=True)
class Fit:
    """One of the ways.

    Attributes:
        name: `stretch`: to the whole input, whatever its shape. `letterbox`: as large as it fits with its proportions,
            in the top left corner; the rest is padding, which the network leaves out.
        fill: colour of the padding, a value for each channel. The mean colour of the network is zero after its
            normalisation, as is what its convolutions add beyond the border of an image, so that there is no edge where
            the padding begins.
    """

    name: str = "stretch"
    fill: tuple[int, ...] = (0, 0, 0)

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

    pixel_mean: Tensor  # of RGB in 0..1


def fit_of(name: str | None, network: Coloured) -> Fit:
    """The fit of a network.

    Args:
        name: of `FITS`; None: `stretch`.
        network: gives the colour of the padding.
    """
    if checked_fit(name) == STRETCH.name:
        return STRETCH
    return Fit(checked_fit(name), tuple(round(255 * value) for value in network.pixel_mean.flatten().tolist()))


def checked_fit(name: str | None) -> str:
    """The name of a fit.

    Raises:
        ValueError: there is none of this name.
    """
    if name is not None and name not in FITS:
        raise ValueError(f"data.fit is {name!r}; use one of {', '.join(FITS)}: data.fit=letterbox")
    return name or FITS[0]
