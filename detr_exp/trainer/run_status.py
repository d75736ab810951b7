"""Final statuses of runs, shared by the tracker and sweeps; works without torch."""

from __future__ import annotations

STATUSES = {
    "Interrupted": "killed",
    "KeyboardInterrupt": "killed",
    "LostError": "killed",
    "NonFiniteError": "nan",
    "OutOfMemoryError": "oom",
    "MemoryError": "oom",
    "PrunedError": "pruned",
}
OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc"),
    *("unable to allocate", "failed to map segment", "can't start new thread", "thread constructor failed"),
)


class PrunedError(Exception):
    """The run was pruned because other trials of its study are better; its files are complete.

    Attributes:
        best: its best value of the monitored metric so far.
        exit_status: 0, pruning is no failure.
    """

    exit_status = 0

    def __init__(self, best: float | None, epoch: int) -> None:
        super().__init__(best, epoch)
        self.best, self.epoch = best, epoch

    def __str__(self) -> str:
        return f"pruned after epoch {self.epoch}: other trials were better"


def status_of(error: BaseException) -> str:
    """`killed`, `nan`, `oom`, `pruned`, or `failed`."""
    for kind in type(error).__mro__:
        if kind.__name__ in STATUSES:
            return STATUSES[kind.__name__]
    return "oom" if any(words in str(error).lower() for words in OUT_OF_MEMORY) else "failed"
