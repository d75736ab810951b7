"""`torchrun` with the exit status of its ranks: `python -m detr_exp.torchrun --nnodes=2 ... -m detr_exp.train ...`.

It has the arguments of `torchrun`, which prints tracebacks where ranks have saved their state and ended, and whose exit
status is 1 whatever happened. Here it is that of the rank that ended first, 75 if the machines lost each other, and for
a signal, which all ranks receive, the same as on one machine.
"""

from __future__ import annotations

import os
import sys

from detr_exp.launch import silence_the_launcher
from detr_exp.signals import REQUEUE, Interrupted, ended_by
from detr_exp.terminal import guard_messages, say

SAVING = "600"  # seconds; `torchrun` kills ranks 30 seconds after the signal


def main() -> None:
    """
    Raises:
        SystemExit: with the status of the ranks.
    """
    guard_messages()
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    silence_the_launcher()
    args = parse_args(sys.argv[1:])
    if hasattr(args, "signals_to_handle"):  # not in older versions of torch
        args.signals_to_handle += ",SIGUSR1,SIGUSR2"
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


if __name__ == "__main__":
    main()
