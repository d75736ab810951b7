"""Process of a job of a sweep, on any machine: `python -m hydra_plugins.detr_exp._job_process TASK ANSWER`.

TASK is a file with the pickled job; ANSWER is written when it has returned or raised, and is missing when the process
was killed. A process that another one owns (`signals.OWNED`) ends when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import threading
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus, run_job, setup_globals

from detr_exp.config.hydra_private import returned
from detr_exp.signals import OWNED, Interrupt, Interrupted
from detr_exp.terminal import guard_messages, say
from detr_exp.writing import write
from hydra_plugins.detr_exp._ledger import first_line

NOT_SHARED = 72  # exit status on a machine that does not see the run folder


def main(task: str, answer: str) -> None:
    guard_messages()
    if os.path.exists(answer):
        return  # a scheduler has started it again, although it had ended
    if not os.path.exists(task):
        say(f"error: {socket.gethostname()} does not see {task}", file=sys.stderr)
        sys.exit(NOT_SHARED)
    try:
        with Interrupt(raises=True):
            work(task, answer)
    except Interrupted as ended:
        sys.exit(ended.exit_status)


def work(task: str, answer: str) -> None:
    if OWNED in os.environ:
        threading.Thread(target=end_with_parent, daemon=True).start()
    with open(task, "rb") as file:
        folder, sys.path[:] = pickle.load(file)
        try:
            os.chdir(folder)  # relative paths of the config begin there
        except OSError as error:
            reason = f"{socket.gethostname()} does not see {folder} ({error.strerror}); start the sweep in a folder "
            write(Path(answer), json.dumps({"error": reason + "that all machines share"}))
            return
        context, function, config, singletons = pickle.load(file)
    setup_globals()
    Singleton.set_state(singletons)
    result = run_job(
        hydra_context=context,
        task_function=function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    value = returned(result)
    failed = result.status is not JobStatus.COMPLETED
    reply = {"error": first_line(value)} if failed else {"value": value if isinstance(value, int | float) else None}
    write(Path(answer), json.dumps(reply))
    os.unlink(task)


def end_with_parent() -> None:
    """The sweep holds the other end of standard input: when it is closed, save the state and end."""
    os.read(0, 1)  # not through `sys.stdin`, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
