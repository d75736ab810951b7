from __future__ import annotations

import re
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from detr_exp import torchrun

WORDS = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "-m", "detr_exp.train", "trainer.epochs=1"]


def ended(rank: int, status: int) -> ChildFailedError:
    failure = SimpleNamespace(exitcode=status, timestamp=1, signal_name=lambda: signal.Signals(-status).name)
    error = ChildFailedError.__new__(ChildFailedError)
    error.get_first_failure = lambda: (rank, failure)  # type: ignore[method-assign]
    return error


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], object]:
    """How a `torchrun` that raises this ends."""

    def call(error: BaseException) -> object:
        def run(args: object) -> None:
            raise error

        monkeypatch.setattr(sys, "argv", WORDS)
        monkeypatch.setattr(torch.distributed.run, "run", run)
        with pytest.raises(SystemExit) as end:
            torchrun.main()
        return end.value.code

    return call


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SignalException("death", signal.SIGTERM), 143, "ended by SIGTERM"),
        (SignalException("death", signal.SIGUSR1), 75, "ended by SIGUSR1"),
        (ended(1, 75), 75, ""),
        (ended(1, 143), 143, ""),
        (ended(1, 2), 2, ""),
        (ended(1, -9), 1, "rank 1 was ended by SIGKILL.*trainer.resume=auto"),
        (ended(1, -15), 143, "SIGTERM"),
        (RendezvousConnectionError("the store is gone"), 75, "the store is gone.*trainer.resume=auto"),
    ],
)
def test_its_status_is_that_of_the_ranks(
    error: BaseException,
    code: int,
    words: str,
    status: Callable[[BaseException], object],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert status(error) == code
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert len(told.splitlines()) == (1 if words else 0)
    assert re.search(words, told)


def test_its_arguments_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "argv", WORDS)
    monkeypatch.setattr(torch.distributed.run, "run", seen.append)
    torchrun.main()
    (args,) = seen
    assert args.nnodes == "2"
    assert args.training_script == "detr_exp.train"
    assert args.training_script_args == ["trainer.epochs=1"]
    assert "SIGUSR1" in args.signals_to_handle


def test_it_ends_when_the_ranks_have_and_it_waits_for_a_lost_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def hang(args: Namespace) -> None:
        folder = Path(args.log_dir) / "run" / "attempt_0" / "1"
        folder.mkdir(parents=True)
        (folder / "error.json").write_text('{"message": {"message": "PeerSilentError: nothing was heard of rank 0"}}')
        assert ended.wait(20)

    monkeypatch.setattr(sys, "argv", WORDS)
    monkeypatch.setattr(torch.distributed.run, "run", hang)
    monkeypatch.setattr(torchrun, "PATIENCE", 0.0)
    monkeypatch.setattr(torchrun, "end_at_once", lambda reason, status: ended.set() if status == 75 else None)
    torchrun.main()
    assert ended.is_set()


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [("127.0.0.1:29500", "127.0.0.1"), ("localhost", "localhost"), ("no.such.host.invalid:1", None)],
)
def test_a_machine_is_known_by_where_it_reaches_the_others(endpoint: str, address: str | None) -> None:
    assert torchrun.own_address(endpoint) == address


def test_a_name_that_is_a_loopback_here_is_what_the_others_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 29400))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert torchrun.own_address("node7") == "node7"
