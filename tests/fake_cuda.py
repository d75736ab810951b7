"""A CUDA device without one: fake tensors, and what would make the host wait for the device is an error.

`FakeTensorMode` knows device, type and shape of every tensor and computes nothing. It refuses by itself to read a value
(`item`, `tolist`, a mask as an index, `nonzero`). Copies it does not refuse; `NoWaits` does, but for those from
page-locked memory that are not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from detr_exp.matcher import hungarian

aten = torch.ops.aten
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
CUDA = torch.device("cuda", 0)
FAKE = FakeTensorMode()


class WaitError(AssertionError):
    """The host would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Refuses copies between host and device that wait; inside of `FAKE`."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = operator.overloadpacket
        if packet is aten._local_scalar_dense and args[0].device.type == "cpu":
            return 32  # a value of the host is there, whatever it is
        if packet is aten.is_pinned:
            return args[0] in self.pinned
        if packet is aten._pin_memory:
            copy = args[0].clone() if isinstance(args[0], FakeTensor) else FAKE.from_tensor(args[0])
            self.pinned[copy] = True
            return copy
        if packet is aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device).type
            self.refuse_copy(args[0], target, kwargs.get("non_blocking", False))
        elif packet is aten.copy_ and args[1].ndim:  # one number of the host is an argument of the kernel
            self.refuse_copy(args[1], args[0].device.type, kwargs.get("non_blocking", len(args) > 2 and args[2]))
        elif packet in INDEXED and any(i is not None and i.device != args[0].device for i in args[1]):
            raise WaitError(f"{operator} of {args[0].device} by an index that is elsewhere")
        return operator(*args, **kwargs)

    def refuse_copy(self, source: Tensor, target: str, non_blocking: bool) -> None:
        if source.device.type == target:
            return
        if target == "cuda" and non_blocking and source in self.pinned:
            return
        raise WaitError(f"a copy of {list(source.shape)} from {source.device} to {target} that waits")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake, waits are errors, autocast to CUDA works, and the matcher gets costs of zero."""
    with (
        FAKE,
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(hungarian, "to_host", wraps=lambda costs: np.zeros(tuple(costs.shape), np.float32)),
        NoWaits(),
    ):
        yield


def on_cuda(module: nn.Module) -> nn.Module:
    """Give a module of the CPU fake parameters and buffers on CUDA, in place."""

    def moved(tensor: Tensor) -> Tensor:
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
        return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there

    with FAKE:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                store.update({name: moved(tensor) for name, tensor in store.items() if tensor is not None})
    return module
