"""`torchrun` with the exit status of its ranks: `python -m detr_exp.torchrun --nnodes=2 ... -m detr_exp.train ...`.

It has the arguments of `torchrun`, which prints tracebacks where ranks have saved their state and ended, and whose exit
status is 1 whatever happened. Here it is that of the rank that ended first, 75 if the machines lost each other, and for
a signal, which all ranks receive, the same as on one machine.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from detr_exp.launch import silence_the_launcher
from detr_exp.signals import REQUEUE, Interrupted, end_at_once, ended_by
from detr_exp.terminal import guard_messages, say

SAVING = "600"  # seconds; `torchrun` kills ranks 30 seconds after the signal
PATIENCE = 5.0  # seconds for `torchrun` to end after a rank has found that another machine is silent


def main() -> None:
    """
    Raises:
        SystemExit: with the status of the ranks.
    """
    guard_messages()
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING)
    from torch.distributed.run import parse_args, run

    silence_the_launcher()
    args = parse_args(sys.argv[1:])
    if hasattr(args, "signals_to_handle"):  # not in older versions of torch
        args.signals_to_handle += ",SIGUSR1,SIGUSR2"
    if args.rdzv_endpoint and args.local_addr is None:
        args.local_addr = own_address(args.rdzv_endpoint)
    with TemporaryDirectory(prefix="detr_exp-") as folder:
        args.log_dir = args.log_dir or folder
        if args.max_restarts == 0:
            known = _errors(args.log_dir)
            Thread(target=_end_after_the_ranks, args=(args.log_dir, known), daemon=True).start()
        _run(run, args)


def own_address(endpoint: str) -> str | None:
    """The address of this machine for others: that from which it reaches the rendezvous.

    `torchrun` gives them its name, which often only the machine itself can resolve, and they wait for it in silence.

    Args:
        endpoint: host, and port if there is one.

    Returns:
        None if the host cannot be resolved.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(endpoint, default_port=29400)
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    # many machines have their own name at 127.0.1.1; the others know this one by the name that they were given
    return host if ipaddress.ip_address(address).is_loopback else address


def _run(run: Callable[[Namespace], None], args: Namespace) -> None:
    """Call `torchrun`, and turn its exceptions into messages and exit statuses."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run(args)
    except SignalException as signal:
        interrupted = Interrupted(signal.sigval)
        say(interrupted, file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = failure.signal_name()
            say(f"error: rank {rank} was ended by {name}; to resume: trainer.resume=auto", file=sys.stderr)
        ended = ended_by(failure.exitcode)
        sys.exit(max(failure.exitcode, 1) if ended is None else Interrupted(ended).exit_status)
    except RendezvousError as error:
        say(
            f"error: the machines did not meet, or lost each other ({error}); check --rdzv-endpoint, and the network; "
            "to resume: trainer.resume=auto",
            file=sys.stderr,
        )
        sys.exit(REQUEUE)


def _end_after_the_ranks(logs: str, known: set[Path]) -> None:
    """End this process after a rank that has found another one silent, because `torchrun` calls lost machines for long.

    Args:
        logs: folder to which the ranks write their errors.
        known: errors of earlier calls.
    """
    from detr_exp.trainer.heartbeat import PeerSilentError

    while not any(PeerSilentError.__name__ in path.read_text("utf-8") for path in _errors(logs) - known):
        time.sleep(1)
    time.sleep(PATIENCE)
    end_at_once("error: torchrun waits for a machine that does not answer; to resume: trainer.resume=auto", REQUEUE)


def _errors(logs: str) -> set[Path]:
    return set(Path(logs).rglob("error.json"))


if __name__ == "__main__":
    main()
