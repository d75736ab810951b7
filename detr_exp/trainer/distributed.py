"""Communication between ranks, the processes of one training. With one process, each function returns its argument.

Counts and decisions are exchanged between hosts (gloo), so that no rank waits for a device; gradients and losses
between devices (NCCL on CUDA). Everything that decides the course of a run is either the same on all ranks by
construction or decided by rank 0.
"""

from __future__ import annotations

import functools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from detr_exp.protocols import Network
from detr_exp.structures import Batch
from detr_exp.trainer.heartbeat import PeerSilentError, connected, heartbeat, key_of

T = TypeVar("T")
CLOSING = timedelta(seconds=20)
START = timedelta(minutes=10)  # for all ranks to import, and rank 0 to read the config
UNLIMITED = timedelta(days=100)
POLL = 0.05  # seconds
PREFIX = "detr_exp"
FOLDER = f"{PREFIX}/folder"


class PeerFailed(RuntimeError):
    """This rank could not continue because another rank failed.

    Attributes:
        exit_status: of the other rank: 2 for a mistake in configuration or data, else 1.
    """

    def __init__(self, reason: str, exit_status: int) -> None:
        super().__init__(reason)
        self.exit_status = exit_status


class StepCounts(NamedTuple):
    """Counts of an optimiser step over all ranks.

    Attributes:
        num_boxes: objects of the accumulation window, mean over ranks, because gradients are averaged over ranks, too.
        num_images: images of the accumulation window, mean over ranks.
        most_objects: for each micro-batch, the largest number of objects in an image on any rank.
    """

    num_boxes: float
    num_images: float
    most_objects: list[int]


# ------------------------------------------------------------------------------------------------------- process group


def started_as_rank() -> bool:
    """Whether this process was started as one of several (by `launch`, by `torchrun`)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@functools.cache
def _environment() -> tuple[dist.Store, int, int]:
    """The store that `torchrun` or `launch` gives to all ranks; this rank; the number of ranks."""
    return next(dist.rendezvous("env://"))


@functools.cache
def _name_of_start() -> str:
    return _name_for(*_environment())


def _name_for(store: dist.Store, number: int, count: int) -> str:
    """The prefix of keys of this start: the store of `torchrun` survives restarts of ranks, with all earlier keys.

    Each rank shows a new name. Rank 0 answers to every name with that of the start, until all ranks have confirmed it.

    Raises:
        PeerSilentError: a rank did not come within `START`.
    """
    own = f"{PREFIX}/{uuid.uuid4().hex}"
    if number > 0:
        store.set(f"{PREFIX}/rank/{number}", own)
        try:
            store.wait([own], START)
        except dist.DistStoreError:
            raise PeerSilentError(_absent(0)) from None
        name = store.get(own).decode()
        store.set(f"{name}/{number}", "")
        return name
    for peer in range(count):
        store.set(f"{own}/{key_of(peer)}", "")
    answered, until, absent = set(), time.monotonic() + START.total_seconds(), set(range(1, count))
    while absent := {peer for peer in absent if not store.check([f"{own}/{peer}"])}:
        for peer in absent:
            if store.check([key := f"{PREFIX}/rank/{peer}"]) and (shown := store.get(key).decode()) not in answered:
                store.set(shown, own)
                answered.add(shown)
        if time.monotonic() > until:
            raise PeerSilentError(_absent(min(absent)))
        time.sleep(POLL)
    return own


def _absent(peer: int) -> str:
    return (
        f"rank {peer} did not come within {START.total_seconds():.0f} s, so this rank ends; look at its output, and "
        "whether the machines reach each other"
    )


@functools.cache
def rendezvous() -> tuple[dist.Store, int, int]:
    """A store for the ranks of this start alone; this rank; the number of ranks. From environment variables.

    Raises:
        PeerSilentError: a rank did not come.
    """
    store, number, count = _environment()
    return dist.PrefixStore(_name_of_start(), store), number, count


def earlier_folder() -> Path | None:
    """The run folder before `torchrun` restarted the ranks; None: it has not."""
    store, _, _ = _environment()
    return Path(store.get(FOLDER).decode()) if store.check([FOLDER]) else None


def keep_folder(folder: Path) -> None:
    """Store the run folder for restarts; called on rank 0."""
    if started_as_rank():
        _environment()[0].set(FOLDER, str(folder))


@contextmanager
def process_group(device: torch.device, timeout: float, status_of: Callable[[BaseException], int]) -> Iterator[None]:
    """Join the process group if this process is one of several ranks, and leave it at the end.

    Collectives wait for living ranks without limit; a heartbeat ends this process if another rank is silent.

    Args:
        device: CUDA exchanges gradients by NCCL, everything else by gloo.
        timeout: seconds of silence.
        status_of: exit status for an error.

    Raises:
        PeerFailed: in place of the original error, if another rank failed first.
    """
    if not started_as_rank():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(local_rank())
    store, number, count = rendezvous()
    beating = heartbeat(number, count, timeout, partial(connected, _name_of_start()))
    with beating, _joined(device, store, number, count, status_of):
        yield


@contextmanager
def _joined(
    device: torch.device, store: dist.Store, number: int, count: int, status_of: Callable[[BaseException], int]
) -> Iterator[None]:
    """In the process group; see `process_group`."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=number, world_size=count, timeout=UNLIMITED
    )
    try:
        yield
    except BaseException as error:
        agreed = hasattr(error, "exit_status")  # all ranks raise this error, at the same step
        peer_failed = None if agreed else _reason(store, error, status_of)
        dist.destroy_process_group()
        # a launcher ends all ranks when one has failed; rank 0 may still be closing its files
        if number > 0:
            with suppress(Exception):
                store.wait(["closed"], CLOSING)
        if peer_failed:
            raise peer_failed from error
        raise
    else:
        dist.destroy_process_group()
    finally:
        if number == 0:
            with suppress(Exception):
                store.set("closed", "")


def _reason(store: dist.Store, error: BaseException, status_of: Callable[[BaseException], int]) -> PeerFailed | None:
    """The first rank that fails stores its error; the other ranks, which fail because of it, report that error."""
    with suppress(Exception):
        if store.add("failures", 1) == 1:
            store.set("reason", f"{status_of(error)} {type(error).__name__}: {error}")
        else:
            status, _, text = store.get("reason").decode().partition(" ")
            return PeerFailed(text, int(status))
    return None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------------- objects and decisions


def on_first_rank(do: Callable[..., T], *args: object) -> T:
    """The result of `do(*args)`, called on rank 0 and broadcast to all ranks; all ranks wait for it."""
    if world_size() == 1:
        return do(*args)
    result = [do(*args) if rank() == 0 else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The values of all ranks, by rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def signal_of_any_rank(number: int | None) -> int | None:
    """The signal that any rank has received; checked at step boundaries, so that all ranks end at the same step."""
    if world_size() == 1:
        return number
    highest = torch.tensor(number or 0)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest) or None


def gather_on_first_rank(part: T) -> list[T]:
    """On rank 0 the parts of all ranks, by rank; on the others their own."""
    if world_size() == 1:
        return [part]
    parts = [part] * world_size() if rank() == 0 else None
    dist.gather_object(part, parts)
    return [part] if parts is None else parts


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 goes through the block alone (it downloads, it fills caches), then all others."""
    if rank() > 0:
        gather(None)
    yield
    if rank() == 0:
        gather(None)


class NullTracker:
    """Accepts every call and does nothing: the tracker of ranks other than the first."""

    lines = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **settings: None


# --------------------------------------------------------------------------------------------------- training steps


def count_over_ranks(window: list[Batch]) -> StepCounts:
    """Counts over all ranks of the micro-batches of one step; one exchange between ranks."""
    counts = sum(len(batch.targets) for batch in window), sum(len(batch) for batch in window)
    most = [max(batch.targets.counts, default=0) for batch in window]
    if world_size() == 1:
        return StepCounts(*counts, most)
    everyone = torch.empty(world_size(), 2 + len(most), dtype=torch.int64)
    dist.all_gather(list(everyone.unbind()), torch.tensor([*counts, *most]))
    boxes, images = (everyone[:, :2].sum(0) / world_size()).tolist()
    return StepCounts(boxes, images, everyone[:, 2:].amax(0).tolist())


def sync_denoising(network: Network, most_objects: int) -> None:
    """Make all ranks use the number of denoising groups of the rank whose image has the most objects."""
    if world_size() > 1:
        network.agree_on_denoising(most_objects)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over ranks."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def sync_buffers(buffers: list[Tensor]) -> None:
    """Copy the batch statistics of rank 0 to all ranks; during training each rank has its own."""
    if world_size() > 1:
        for buffer in buffers:
            dist.broadcast(buffer, src=0)
