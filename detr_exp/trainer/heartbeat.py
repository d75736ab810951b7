"""A heartbeat between ranks: the ranks of a training end when one of them, or its machine, is silent.

A machine that vanishes closes no connection, and whoever waits for it in a collective waits for long. So each rank
counts in a store that all can read, and watches the counts of the others. It does so in threads: a rank that is alive
counts whatever it computes, however long.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from detr_exp.signals import REQUEUE, end_at_once

BEATS = 10  # exchanges within the timeout
LEFT = "left"  # the last value of a rank


class PeerSilentError(RuntimeError):
    """Nothing was heard of another rank for `trainer.hardware.timeout`.

    Attributes:
        exit_status: 75, which schedulers read as "please requeue".
    """

    exit_status = REQUEUE


def key_of(rank: int) -> str:
    """The key in which a rank counts."""
    return f"beat/{rank}"


def connected(prefix: str, patience: float) -> dist.Store:
    """A connection to the store of the ranks that no other thread uses: calls of one connection wait for each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience))
    return dist.PrefixStore(prefix, store)


class Peers:
    """What this rank has heard of the others.

    Args:
        rank: of this process.
        count: of all ranks.
        timeout: seconds of silence after which a rank counts as dead.
        connect: patience in seconds -> a store in which every rank has a value.
    """

    def __init__(self, rank: int, count: int, timeout: float, connect: Callable[[float], dist.Store]) -> None:
        self.rank, self.count, self.timeout, self.connect = rank, count, timeout, connect
        self.values = [""] * count
        self.left = threading.Event()
        self.forget()

    def forget(self) -> None:
        """Start to wait anew."""
        self.heard = [time.monotonic()] * self.count
        self.answered = time.monotonic()  # the store

    def exchange(self) -> None:
        """Count, and read the counts of the others, until this rank leaves; a call may wait for ever."""
        keys, beat, store, is_last = [key_of(rank) for rank in range(self.count)], 0, None, False
        while not is_last:
            is_last = self.left.is_set()
            beat += 1
            try:
                store = store or self.connect(self.timeout)
                store.set(key_of(self.rank), LEFT if is_last else f"{socket.gethostname()} {beat}")
                values = [value.decode() for value in store.multi_get(keys)]
            except RuntimeError:  # the connection is lost
                store = None
            else:
                self.answered = time.monotonic()
                for rank, value in enumerate(values):
                    if value != self.values[rank]:
                        self.values[rank], self.heard[rank] = value, self.answered
            self.left.wait(self.timeout / BEATS)

    def silence(self) -> str:
        """Which rank has been silent for too long; "": none. The store may be gone after rank 0 has left."""
        now = time.monotonic()
        if self.values[0] == LEFT:
            return ""
        if now - self.answered >= self.timeout:
            host = self.values[0].partition(" ")[0] or os.environ.get("MASTER_ADDR", "this one")
            return f"the machine of rank 0 ({host}) has not answered"
        for rank, (value, heard) in enumerate(zip(self.values, self.heard, strict=True)):
            if rank != self.rank and value != LEFT and now - heard >= self.timeout:
                host = value.partition(" ")[0]
                return f"nothing was heard of rank {rank}{f' on {host}' if host else ''}"
        return ""

    def watch(self, end: Callable[[str], object]) -> None:
        """Call `end` with the reason when a peer is silent, until this rank leaves."""
        pause, before = min(1.0, self.timeout / BEATS), time.monotonic()
        while not self.left.wait(pause):
            if time.monotonic() - before > self.timeout / 2:  # this process was stopped, by a scheduler for example
                self.forget()
            before = time.monotonic()
            if reason := self.silence():
                end(f"{reason} for {self.timeout:g} s")
                return


@contextmanager
def heartbeat(rank: int, count: int, timeout: float, connect: Callable[[float], dist.Store]) -> Iterator[None]:
    """Inside the block, this process ends if another rank is silent; see `Peers`."""
    peers = Peers(rank, count, timeout, connect)
    threads = [
        threading.Thread(target=peers.exchange, name="heartbeat", daemon=True),
        threading.Thread(target=peers.watch, args=(_end,), name="heartbeat-watch", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        peers.left.set()
        threads[0].join(timeout / BEATS)  # so that the others know


def _end(reason: str) -> None:
    """End this process, whose main thread may wait in a collective that nothing ends."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    error = PeerSilentError(
        f"{reason}, so this rank ends; the run resumes from its last checkpoint: trainer.resume=auto; "
        "to wait longer: trainer.hardware.timeout=600"
    )
    with suppress(Exception):
        get_error_handler().record_exception(error)
        if multiprocessing.parent_process() is not None:  # `launch`, which prints it
            os._exit(REQUEUE)
    end_at_once(f"error: {error}", REQUEUE)
