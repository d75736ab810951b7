"""Numbers from the host to the device and back, without waiting for the device where that can be avoided.

A wait empties the queue of a GPU, and nothing that waits can be captured in a CUDA graph. `torch.tensor(..., device=)`,
an index that is a list, and a copy from memory that is not page-locked all wait, although they do not look like it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """On the device; from the host to CUDA through page-locked memory, in the order of its stream."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def filled(values: Sequence[int], device: torch.device) -> Tensor:
    """`[n]` int64, written on the device: the same as `torch.tensor(values, device=device)`, which would wait."""
    return torch.stack([torch.full((), value, device=device) for value in values])
