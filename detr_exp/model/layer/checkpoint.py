"""Gradient checkpointing that does not change batch statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, *inputs: Tensor | int | None) -> Tensor:
    """`module(*inputs)` whose activations are recomputed in the backward pass instead of being stored."""
    if not torch.is_grad_enabled():
        return module(*inputs)
    if torch.compiler.is_compiling():
        return checkpoint(module, *inputs, use_reentrant=False)
    return checkpoint(
        module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_untouched(module))
    )


@contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """The second forward pass over the same batch must not update the running statistics again."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, count
