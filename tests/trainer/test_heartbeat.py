from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist

from detr_exp.trainer import distributed, heartbeat
from detr_exp.trainer.heartbeat import LEFT, Peers, key_of

BLOCKED = """
import os, sys, time
import torch.distributed as dist
from detr_exp.trainer.heartbeat import heartbeat, connected
with heartbeat(0, 2, 1.0, lambda patience: connected("start", patience)):
    dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False).get("never comes")
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of an agent, with the environment of its ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for rank in (0, 1):
        store.set(f"start/{key_of(rank)}", "")
    return store


def peers(rank: int = 0, timeout: float = 60.0) -> Peers:
    return Peers(rank, 2, timeout, partial(heartbeat.connected, "start"))


@pytest.mark.parametrize(
    ("values", "heard", "answered", "reason"),
    [
        (["a 1", "b 1"], [100, 59], 59, ""),
        (["a 1", "b 1"], [0, 61], 0, "rank 1 on b"),
        (["a 1", ""], [0, 61], 0, "rank 1"),
        (["a 1", "b 1"], [0, 61], 61, "machine of rank 0"),
        (["a 1", LEFT], [0, 1000], 0, ""),
        ([LEFT, "b 1"], [0, 1000], 1000, ""),
    ],
)
def test_who_is_silent(values: list[str], heard: list[float], answered: float, reason: str) -> None:
    """`heard` and `answered`: seconds ago."""
    known, now = peers(), time.monotonic()
    known.values, known.heard, known.answered = values, [now - ago for ago in heard], now - answered
    assert reason in known.silence()
    assert bool(reason) == bool(known.silence())


def test_ranks_that_count_hear_each_other_and_say_that_they_leave(server: dist.TCPStore) -> None:
    pair = [peers(rank, timeout=1.0) for rank in (0, 1)]
    threads = [threading.Thread(target=each.exchange) for each in pair]
    for thread in threads:
        thread.start()
    time.sleep(2.0)  # two timeouts
    assert [each.silence() for each in pair] == ["", ""]
    pair[1].left.set()
    threads[1].join(20)
    until = time.monotonic() + 20
    while pair[0].values[1] != LEFT:
        assert time.monotonic() < until
        time.sleep(0.01)
    pair[0].left.set()
    threads[0].join(20)


def test_a_lost_connection_is_made_again(server: dist.TCPStore) -> None:
    calls: list[float] = []

    def connect(patience: float) -> dist.Store:
        calls.append(patience)
        if len(calls) < 3:
            raise dist.DistNetworkError("connection reset")
        return heartbeat.connected("start", patience)

    known = Peers(0, 2, 0.5, connect)
    thread = threading.Thread(target=known.exchange)
    thread.start()
    until = time.monotonic() + 20
    while not known.values[0]:
        assert time.monotonic() < until
        time.sleep(0.01)
    known.left.set()
    thread.join(20)
    assert len(calls) == 3


def test_a_process_that_waits_for_a_silent_rank_ends_with_a_sentence(server: dist.TCPStore) -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 75
    assert "nothing was heard of rank 1 for 1 s" in ended.stderr
    assert "trainer.hardware.timeout=" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - began < 300


def test_a_process_that_was_stopped_waits_anew() -> None:
    known, reasons = peers(timeout=0.2), []
    known.heard = [time.monotonic() - 100] * 2
    known.left.wait = lambda pause: time.sleep(0.15) or len(reasons) > 0 or time.monotonic() > until  # type: ignore
    until = time.monotonic() + 0.5
    known.watch(reasons.append)
    assert not reasons


def test_every_start_has_keys_of_its_own(server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun` keeps its store when it restarts ranks; a rank of the new start may meet names of the earlier one."""
    port = int(os.environ["MASTER_PORT"])

    def start(rank: int, names: list[str]) -> Callable[[], None]:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        return lambda: names.append(distributed._name_for(store, rank, 3))

    seen = set()
    for first in (0, 1, 2):  # which comes first
        names: list[str] = []
        threads = [threading.Thread(target=start((first + rank) % 3, names)) for rank in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(20)
        assert len(names) == 3
        assert len(set(names)) == 1
        seen.add(names[0])
    assert len(seen) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come_is_named(rank: int, server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "START", timedelta(seconds=0.2))
    with pytest.raises(heartbeat.PeerSilentError, match=f"rank {1 - rank} did not come") as error:
        distributed._name_for(server, rank, 2)
    assert error.value.exit_status == 75
