"""Batch norms of a member: their statistics depend on the size of images, and a training keeps those of all members."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from detr_exp.protocols import Network
from detr_exp.structures import Batch
from detr_exp.trainer.precision import Precision


@torch.no_grad()
def reestimate(network: Network, batches: Iterable[Batch], precision: Precision, count: int) -> None:
    """Estimate the statistics of all batch norms anew, as means over some batches; in place.

    Args:
        network: on its device, as the member that is meant; stays in evaluation mode.
        batches: of training images at its size.
        precision: of the evaluation.
        count: batches to use.

    Raises:
        ValueError: it has no batch norms with statistics.
    """
    kept = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [module for module in kept if module.track_running_stats]
    if not norms:
        raise ValueError(
            f"norm_batches is {count}, but {type(network).__name__} has no batch norms with statistics here, so that "
            "images change nothing: norm_batches=0"
        )
    before = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    try:
        for batch in islice(batches, count):
            moved = batch.to(precision.device)
            with precision.autocast():
                network(moved.pixels(precision.memory_format), padding_mask=moved.padding_mask)
    finally:
        network.eval()
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum
