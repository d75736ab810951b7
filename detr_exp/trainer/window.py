"""The micro-batches of an optimiser step: how they are grouped, and how their random numbers are seeded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from detr_exp.structures import Batch
from detr_exp.trainer import distributed


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups of `size` consecutive batches; the last one may be smaller."""
    while window := list(islice(batches, size)):
        yield window


def seed_step(seed: int, step: int, micro: int) -> None:
    """Make the random numbers of a micro-batch a function of (seed, step, micro-batch), counted over all ranks."""
    micro = micro * distributed.world_size() + distributed.rank()
    (state,) = np.random.SeedSequence((seed, step, micro)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))
