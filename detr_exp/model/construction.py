"""What is checked and set in every network after it is built, before it gets weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from detr_exp.data.fit import STRETCH, checked_fit
from detr_exp.protocols import Attending, Network


def refuse_wrong_size(network: Network) -> None:
    """Refuse image sizes that are not multiples of the stride of the network.

    Raises:
        ValueError: says which sizes are valid.
    """
    size, stride = list(network.image_size), network.stride
    if any(side % stride for side in size):
        nearest = [[max(1, side // stride + up) * stride for side in size] for up in (0, 1)]
        valid = " or ".join(f"model.image_size=[{height},{width}]" for height, width in nearest)
        raise ValueError(f"model.image_size is {size}, but its sides must be multiples of {stride}; use {valid}")


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
