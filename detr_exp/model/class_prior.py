"""The scores of classes before training."""

from __future__ import annotations

import math

import torch
from torch import nn

from detr_exp.protocols import Network


@torch.no_grad()
def set_class_prior(network: Network, prior: float | str) -> None:
    """Start all class scores at one probability (focal loss, arXiv 1708.02002, section 4.1), in place.

    Args:
        network: with independent (sigmoid) class scores.
        prior: in (0, 1), or "auto" for 1 / (number of classes + 1).

    Raises:
        ValueError: the scores of the classes are not independent.
    """
    if network.activation != "sigmoid":
        raise ValueError(
            f"model.class_prior is {prior}, but scores of a {network.activation} are not independent of each other: "
            "model.class_prior=null"
        )
    score = 1 / (network.num_classes + 1) if prior == "auto" else float(prior)
    state = network.state_dict()
    for name in network.class_tensors():
        if name.endswith("bias"):
            nn.init.constant_(state[name], math.log(score / (1 - score)))
