"""Memory that a training step uses, and memory that is available."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp.protocols import Network
from detr_exp.trainer.distributed import local_world_size

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MOST = -1, -3, 2**31 - 1  # of glibc's mallopt; bytes


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of new pages from the system for every large tensor.

    The system fills new pages with zeros one by one: a sum of tensors of 64 MB takes 28 ms with them and 4 ms without.
    Up to 2 GiB stay with the process; what an earlier run of this process has left is given back.
    """
    if sys.platform != "linux":
        return
    try:
        allocator = ctypes.CDLL(None)
        for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            allocator.mallopt(setting, MOST)
        allocator.malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


class Saved(NamedTuple):
    """Bytes that a forward pass saves for the backward pass.

    Attributes:
        activations: proportional to the batch size.
        weights: copies of parameters in another type or layout; the same for every batch.
    """

    activations: int
    weights: int


def saved_bytes(network: Network, loss: Callable[[], object]) -> Saved:
    """Bytes that `loss` saves for its backward pass, without the parameters and buffers themselves.

    Activations that gradient checkpointing recomputes are not saved, so they are not counted.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(network.parameters(), network.buffers())}
    shapes = {shape for p in network.parameters() if p.dim() > 1 for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    activations: dict[int, int] = {}
    weights: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kind = weights if tuple(tensor.shape) in shapes else activations
            kind[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = loss()  # the graph keeps the tensors alive, so that no address is reused
    del result
    return Saved(sum(activations.values()), sum(weights.values()))


@contextmanager
def state_preserved(network: Network) -> Iterator[None]:
    """Restore buffers, training mode, gradients and random states at the end of the `with` block."""
    was_training, device = network.training, next(network.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            network.train(was_training)
            network.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)


def available(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None if the system does not report it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [free for free in (_free_in_machine(), _free_in_group()) if free is not None]
    return min(known) // local_world_size() if known else None


def _free_in_machine() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS reports only the installed memory
    except (AttributeError, OSError, ValueError):
        return None


def _free_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container may still allocate (cgroup v2); file caches count as free."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current"))
        caches = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + int(caches.get("inactive_file", 0))
