"""Members of a network: networks of fewer layers or queries, or for another image size, that are read from its weights.

A layer of a decoder is trained to predict, and queries are ranked, so the first ones work alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch

from detr_exp.protocols import missing
from detr_exp.structures import Outputs, mapped

if TYPE_CHECKING:
    from torch import Tensor

    from detr_exp.protocols import Network


class Extent(NamedTuple):
    """How much of a network is computed; as in `Member`, without gaps."""

    layers: int
    queries: int
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Member:
    """What is chosen of a network; None: as the network itself has it.

    Attributes:
        layers: of the decoder, counted from the first.
        queries: of every image.
        image_size: (height, width) in pixels.
    """

    layers: int | None = None
    queries: int | None = None
    image_size: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Such as `l2-q100-320` or `q100-320x480` (height x width); `whole` where nothing is chosen."""
        height, width = self.image_size or (0, 0)
        size = f"{height}" if height == width else f"{height}x{width}"
        parts = [(self.layers, f"l{self.layers}"), (self.queries, f"q{self.queries}"), (self.image_size, size)]
        return "-".join(text for value, text in parts if value is not None) or "whole"

    def of(self, own: Extent) -> Extent:
        """With the values of `own` where it has none."""
        return Extent(self.layers or own.layers, self.queries or own.queries, self.image_size or own.image_size)


@runtime_checkable
class Elastic(Protocol):
    """A network that can compute as any of its members; an optional ability of a `protocols.Network`."""

    own: Extent  # what evaluation computes if nothing is chosen
    member: Member  # as which it computes now

    @property
    def most_layers(self) -> int:
        """Of a member; those of `own` where its decoder cannot be stopped."""

    def set_member(self, member: Member, *, every_layer: bool = False) -> None:
        """Compute as a member from now on, in training and in evaluation; quick, and `Member()` undoes it.

        Args:
            member: parts that are None get the values of the network, also where they had others before.
            every_layer: evaluation gives what each layer of the member predicts, and not only the last one.

        Raises:
            ValueError: the network has no such member.
        """

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
        """The first part of `forward`, which depends on the image size only: the maps that its decoder reads."""

    def decode(self, maps: list[Tensor], padding_mask: Tensor | None, size: torch.Size) -> Outputs:
        """The rest of `forward` in evaluation, for maps of images of (height, width) `size`."""


def refuse_impossible(
    member: Member, own: Extent, *, most_layers: int, stride: int, strides: Sequence[int], may_lack_cells: bool
) -> None:
    """Refuse a member that a network cannot be without training.

    Args:
        member: to be.
        own: of the network.
        most_layers: see `Elastic`.
        stride: both sides of images have to be multiples of it.
        strides: of the maps from whose cells queries are chosen.
        may_lack_cells: whether the network itself uses fewer queries where an image has fewer cells.

    Raises:
        ValueError: says what would be possible.
    """
    if member.layers is not None and not 1 <= member.layers <= most_layers:
        raise ValueError(
            f"at.layers is {member.layers}, but the decoder gives predictions after "
            f"{'1' if most_layers == 1 else f'1 to {most_layers}'} layers: at.layers={most_layers}"
        )
    if member.queries is not None and not 1 <= member.queries <= own.queries:
        raise ValueError(
            f"at.queries is {member.queries}, but the network was trained with {own.queries}, and has no more without "
            f"training: at.queries={own.queries}, or fewer"
        )
    size = member.image_size or own.image_size
    if any(side < 1 or side % stride for side in size):
        nearest = [[max(1, side // stride + up) * stride for side in size] for up in (0, 1)]
        valid = " or ".join(f"at.image_size=[{height},{width}]" for height, width in nearest)
        raise ValueError(
            f"at.image_size is {list(size)}, but its sides must be multiples of {stride} in this network; use {valid}"
        )
    cells = sum(math.ceil(size[0] / step) * math.ceil(size[1] / step) for step in strides)
    queries = member.queries or (0 if may_lack_cells else own.queries)
    if queries > cells:
        raise ValueError(
            f"{queries} queries are too many for images of {size[0]} x {size[1]} pixels, which have {cells} cells, one "
            f"for each query: at.queries={cells}, or a larger at.image_size"
        )


def refuse_rigid(member: Member, part: object, contract: type, *names: str) -> None:
    """Refuse members that need more of a part of a network than it can.

    Args:
        member: to be.
        part: a decoder, or a head that follows one.
        contract: the protocol of parts that can.
        names: fields of the member that it decides.

    Raises:
        ValueError: it lacks something.
    """
    lacking = missing(part, contract)
    for name in names:
        if lacking and (value := vars(member)[name]) is not None:
            raise ValueError(
                f"at.{name} is {value}, but {type(part).__name__} computes all {name} that it has, for it lacks "
                f"{', '.join(lacking)} of {contract.__module__}.{contract.__name__}: add what is missing, or "
                f"at.{name}=null"
            )


def become(network: Network, member: Member) -> None:
    """Make a network with weights compute as a member, in place.

    Args:
        network: on its device.
        member: to be.

    Raises:
        ValueError: it cannot without training, or its parts cannot be given images of another size.
    """
    if member == Member():
        return
    chosen = next(name for name, value in vars(member).items() if value is not None)
    if not isinstance(network, Elastic):
        raise ValueError(
            f"at.{chosen} is set, but {type(network).__name__} can only be what it was trained as; it needs what "
            f"detr_exp.model.member.Elastic lists: add it, or use the network as it is: at.{chosen}=null"
        )
    network.set_member(member)
    if network.image_size != network.own.image_size:
        _refuse_fixed_size(network, network.image_size)


@torch.inference_mode()
def _refuse_fixed_size(network: Network, size: tuple[int, int]) -> None:
    """Try the size on one image: parts of other libraries say in their own way that they have only one.

    Raises:
        ValueError: they cannot compute it.
    """
    was_training = network.training
    network.eval()
    try:
        mean = network.pixel_mean
        network(torch.zeros(1, len(mean), *size, dtype=mean.dtype, device=mean.device))
    except Exception as error:  # each library has its own
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"at.image_size is {list(size)}, but parts of this network work at the size of its training only ({said}); "
            f"leave it: at.image_size=null"
        ) from error
    finally:
        network.train(was_training)


def outputs_of(
    network: Elastic, images: Tensor, members: Sequence[Member], padding_mask: Tensor | None = None
) -> Iterator[tuple[Member, Outputs]]:
    """The outputs of several members of one image size, each equal to those of the member alone, to the last bit.

    Backbone and encoder are computed once, and the decoder once for each number of queries: queries see each other, but
    no layer sees a later one. Until the next member is asked for, the network is set to one with as many queries.

    Args:
        network: in evaluation mode.
        images: `[B, 3, H, W]` RGB in 0..1, of the image size of the members.
        members: complete or not; one image size.
        padding_mask: as in `forward`.

    Yields:
        members, by their queries, with outputs of one layer.
    """
    before = network.member
    try:
        network.set_member(replace(members[0], layers=None))
        maps = network.encode(images, padding_mask)
        for queries in dict.fromkeys(member.queries for member in members):
            depths = {one: one.of(network.own).layers for one in members if one.queries == queries}
            stops = any(one.layers for one in depths)  # a decoder that cannot has one layer of predictions
            network.set_member(
                Member(max(depths.values()) if stops else None, queries, members[0].image_size), every_layer=stops
            )
            layers = network.decode(maps, padding_mask, images.shape[-2:]).layers
            for member, depth in depths.items():
                yield member, Outputs(mapped(layers, itemgetter(slice(depth - 1, depth) if stops else slice(0, 1))))
    finally:
        network.set_member(before)
