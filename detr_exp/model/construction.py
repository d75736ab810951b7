"""What is checked and set in every network after it is built, before it gets weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from detr_exp.data.fit import STRETCH, Bucketed, Size, checked_fit, written
from detr_exp.model.member import Elastic, Member, become
from detr_exp.protocols import Attending, Network


def settle(
    network: Network,
    sizes: Sequence[Size],
    channels: int,
    fit: str | None,
    num_classes: int,
    prior: float | str | None,
) -> None:
    """Adapt a new network to its data.

    Args:
        network: to adapt, in place.
        sizes: of its images, (height, width), with its own first; empty: one size.
        channels: of the images.
        fit: of images to its input.
        num_classes, prior: see `set_class_prior`.

    Raises:
        ValueError: they do not fit each other.
    """
    refuse_wrong_sizes(sizes or [network.image_size], network.stride)
    set_channels(network, channels)
    set_sizes(network, sizes)
    refuse_padding(network, fit)
    set_class_prior(network, num_classes, prior)


def refuse_wrong_sizes(sizes: Sequence[Size], stride: int) -> None:
    """Refuse image sizes that are not multiples of the stride of the network.

    Raises:
        ValueError: says which sizes are valid.
    """
    if any(side % stride for size in sizes for side in size):
        shown = list(sizes[0]) if len(sizes) == 1 else list(map(list, sizes))
        nearest = [[_multiples(size, stride, up) for size in sizes] for up in (0, 1)]
        valid = " or ".join(f"model.image_size={written(each)}" for each in nearest)
        raise ValueError(f"model.image_size is {shown}, but its sides must be multiples of {stride}; use {valid}")


def _multiples(size: Size, stride: int, up: int) -> Size:
    height, width = (max(1, side // stride + up) * stride for side in size)
    return height, width


def set_sizes(network: Network, sizes: Sequence[Size]) -> None:
    """Let a network be shown images of several sizes.

    Raises:
        ValueError: it cannot compute one of them.
    """
    for size in sizes[1:] if isinstance(network, Elastic) else ():
        try:
            become(network, Member(image_size=size))
        except ValueError as error:
            reason = str(error).partition(": at.")[0].removeprefix(f"at.image_size is {list(size)}, but ")
            raise ValueError(
                f"model.image_size has {list(size)}, which this network cannot compute: "
                f"{reason.partition('; leave it')[0]}; choose others, or one: model.image_size={written(sizes[:1])}"
            ) from error
        finally:
            cast(Elastic, network).set_member(Member())
    if sizes:
        cast(Bucketed, network).buckets = tuple(sizes)


def refuse_padding(network: Network, fit: str | None) -> None:
    """Refuse a fit that pads images, for a backbone that would attend to the padding.

    Raises:
        ValueError: it has attention and does not know the padding.
    """
    backbone = dict(network.named_modules()).get("backbone")
    if backbone is None or isinstance(backbone, Attending) or checked_fit(fit) == STRETCH.name:
        return
    attends = {type(one).__name__ for one in backbone.modules() if type(one).__name__.endswith(("Attention", "ViT"))}
    if attends:
        raise ValueError(
            f"data.fit is {fit}, but the {', '.join(sorted(attends))} of model.backbone would attend to the padding; "
            "choose a backbone of convolutions or model/backbone=dinov2_windowed_small, or data.fit=stretch"
        )


@torch.no_grad()
def set_channels(network: Network, channels: int) -> None:
    """Let a network for three channels read others: its first layers and normalisation are adapted, in place.

    Raises:
        ValueError: no layer of the backbone reads three channels.
    """
    if channels == len(network.pixel_mean):
        return
    backbone = dict(network.named_modules()).get("backbone", nn.Module())
    first = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]
    if not first:
        raise ValueError(
            f"data.channels is {channels}, but no convolution of model.backbone reads three channels and could be "
            "adapted; choose another backbone, or data.channels=3"
        )
    for layer in first:
        layer.weight.data, layer.in_channels = for_channels(layer.weight, channels), channels
    for name in ("pixel_mean", "pixel_std"):
        colours = getattr(network, name)
        setattr(network, name, colours[_colours(channels)] if channels > 3 else colours.mean(0).repeat(channels, 1, 1))


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """`[O, channels, h, w]` the weights of a first layer for other channels, from `[O, 3, h, w]` for colours.

    Three or more get those of red, green and blue in turn, divided by the number of channels with the same colour;
    fewer share the sum over the colours. So an image whose channels are equal gives what it gave with three (with
    fewer, up to means and deviations that differ between colours), and every channel acts from the start.
    """
    if channels < 3:
        return (weight.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1).contiguous()
    colours = _colours(channels)
    return weight[:, colours] / colours.bincount()[colours].to(weight)[:, None, None]


def _colours(channels: int) -> Tensor:
    return torch.arange(channels) % 3


@torch.no_grad()
def set_class_prior(network: Network, num_classes: int, prior: float | str | None) -> None:
    """Start all class scores at one probability (focal loss, arXiv 1708.02002, section 4.1), in place.

    Args:
        network: with independent (sigmoid) class scores.
        num_classes: of the data.
        prior: in (0, 1), or "auto" for 1 / (num_classes + 1); None: as the network has them.

    Raises:
        ValueError: the scores of the classes are not independent.
    """
    if prior is None:
        return
    if network.activation != "sigmoid":
        raise ValueError(
            f"model.class_prior is {prior}, but scores of a {network.activation} are not independent of each other: "
            "model.class_prior=null"
        )
    score = 1 / (num_classes + 1) if prior == "auto" else float(prior)
    state = network.state_dict()
    for name in network.class_tensors():
        if name.endswith("bias"):
            nn.init.constant_(state[name], math.log(score / (1 - score)))
