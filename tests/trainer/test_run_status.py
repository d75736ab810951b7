import errno

import pytest

from detr_exp.trainer.run_status import status_of


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=str,
)
def test_all_out_of_memory_messages_are_recognised(error):
    assert status_of(error) == "oom"


def test_other_faults_are_failures():
    assert status_of(RuntimeError("the segment of memory was found")) == "failed"
