"""Process of a job of `hydra/launcher=local`: `python -m hydra_plugins.detr_exp._job_process TASK ANSWER`.

TASK is a file with the pickled job; ANSWER is written when it has returned or raised, and is missing when the process
was killed.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus, run_job, setup_globals

from detr_exp.config.hydra_private import returned
from detr_exp.signals import Interrupt, Interrupted
from detr_exp.terminal import guard_messages
from detr_exp.writing import write
from hydra_plugins.detr_exp._ledger import first_line


def main(task: str, answer: str) -> None:
    guard_messages()
    try:
        with Interrupt(raises=True):
            work(task, answer)
    except Interrupted as ended:
        sys.exit(ended.exit_status)


def work(task: str, answer: str) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(task, "rb") as file:
        sys.path[:] = pickle.load(file)
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


def end_with_parent() -> None:
    """The sweep holds the other end of standard input: when it is closed, save the state and end."""
    os.read(0, 1)  # not through `sys.stdin`, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
