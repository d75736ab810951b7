import errno
import os

import pytest
import torch
from torch.utils.data import DataLoader

from detr_exp.data.loader import Loading, WorkerError, _begin, batches
from detr_exp.data.sampler import EvalSampler

resource = pytest.importorskip("resource")


class Unsendable:
    """A batch that cannot be handed over."""

    def __init__(self, samples: list[int]) -> None:
        pass

    def __reduce__(self) -> None:
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")


class Pieces(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return index


def test_a_batch_that_cannot_be_handed_over_is_not_waited_for():
    loader = DataLoader(Pieces(), num_workers=1, collate_fn=Unsendable, worker_init_fn=_begin)
    with pytest.raises(WorkerError, match=r"Too many open files.*ulimit -n 4096.*data\.num_workers=1, or 0"):
        list(batches(loader))


def fail_beside(samples: list[int]) -> int:
    """As the thread of a worker does that passes open files on."""
    import sys

    sys.excepthook(OSError, OSError(errno.EMFILE, os.strerror(errno.EMFILE)), None)
    return 0


@pytest.mark.slow
def test_a_worker_that_cannot_pass_its_files_on_ends():
    loader = DataLoader(Pieces(), num_workers=1, collate_fn=fail_beside, worker_init_fn=_begin)
    with pytest.raises(WorkerError, match=r"may not open further files.*ulimit -n 4096.*data\.num_workers=1, or 0"):
        list(batches(loader))


def test_the_limit_of_open_files_is_raised_where_workers_load():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        Loading(num_workers=0).loader(samples := Pieces(), EvalSampler([0], 1, (8, 8)))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
        samples.augment = None
        Loading(num_workers=1).loader(samples, EvalSampler([0], 1, (8, 8)))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
