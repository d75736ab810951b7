"""Exit statuses and what a user sees when something goes wrong."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from detr_exp import cli
from detr_exp.mistakes import ConfigError
from detr_exp.signals import Interrupted
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.trainer import NonFiniteError


def a_mistake() -> None:
    Hardware(
        device="abacus",
        amp="bf16",
        eval_amp=None,
        channels_last=False,
        gradient_checkpointing=False,
        compile=False,
        threads=None,
    )


def a_bug() -> None:
    int("ten")


def a_library_stumbles() -> None:
    """As Hydra does where it is interrupted while it reads a file."""
    try:
        raise Interrupted(10)
    finally:
        int("ten")


def raised(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("action", "status", "traceback"),
    [
        (a_mistake, 2, False),
        (a_bug, 1, True),
        (raised(ConfigError("x")), 1, True),  # raised by a test, which is none of ours
        (raised(NonFiniteError("images [3]")), 1, False),
        (raised(KeyError("x")), 1, True),
        (raised(OSError(errno.ENOSPC, "No space left on device")), 2, False),
        (raised(OSError(errno.EROFS, "Read-only file system", "ro/run")), 2, False),
        (raised(OSError(errno.EFBIG, "File too large")), 2, False),
        (raised(OSError(errno.EMFILE, "Too many open files")), 1, False),
        (raised(MemoryError()), 1, False),
        (raised(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")), 1, False),
        (raised(OSError(errno.EIO, "Input/output error")), 1, True),
        (raised(Interrupted(15)), 143, False),
        (raised(Interrupted(2)), 130, False),
        (raised(KeyboardInterrupt()), 130, False),
        (a_library_stumbles, 75, False),
    ],
)
def test_the_status_says_whose_fault_it_was(
    action: Callable[[], None], status: int, traceback: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        action()
    assert cli.report(caught.value) == status
    told = capsys.readouterr().err
    assert ("Traceback" in told) == traceback
    assert told.strip()
