"""Modules whose gradients are averaged over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr_exp.protocols import Network
from detr_exp.trainer.distributed import world_size
from detr_exp.trainer.sharding import is_fsdp_module, shard


def parallel(network: nn.Module | Network, strategy: str) -> nn.Module:
    """The module that training steps call: gradients are averaged over ranks.

    Args:
        network: on its device; with `fsdp` its parameters are split in place.
        strategy: `ddp` or `fsdp`.
    """
    assert isinstance(network, nn.Module)
    if world_size() == 1:
        return network
    if strategy == "fsdp":
        return shard(network)
    # raised for depthwise weights, whose memory layout has two equal descriptions; users cannot change it
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch rename the argument
        return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def gradient_exchange(modules: Sequence[nn.Module], last: bool) -> Iterator[None]:
    """Forward and backward pass of a micro-batch; gradients are exchanged in the `last` micro-batch of a window.

    Args:
        modules: results of `parallel`.
    """
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
            if is_fsdp_module(module):
                module.set_requires_gradient_sync(last)
        yield
