"""Operations of a network."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detr_exp.protocols import Network
from detr_exp.structures import predicted


def gigaflops(network: Network) -> float:
    """10^9 operations of an evaluation of one image; computed on the meta device."""
    assert isinstance(network, nn.Module)
    copied = copy.deepcopy(network).to("meta").eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)  # with gradients the counter would need their functions
    for compiled in ("body", "_compiled_call_impl"):
        copied.__dict__.pop(compiled, None)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        masks = predicted(copied(torch.empty(1, len(copied.pixel_mean), *copied.image_size)).pred, "masks")
        if masks is not None:
            masks.dense()
    return counter.get_total_flops() / 1e9
