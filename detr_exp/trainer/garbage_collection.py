"""Python's garbage collector: off while the first training of a process starts, on while it trains.

Importing torch and building a network make a million objects that stay. To look through them for garbage, again and
again while there are ever more, takes a tenth of a start.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def off_until_training() -> Iterator[None]:
    """Nothing is collected from here on until a training begins, or this ends.

    Where torch is there already nothing changes: what a sweep's run has left behind must not outlive the next start.
    """
    is_first = gc.isenabled() and "torch" not in sys.modules
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.enable()


@contextmanager
def on_for_training() -> Iterator[None]:
    """What there is when a training begins is set aside, and only what it makes from then on is looked through.

    Memory that forked loader workers share with this process stays shared, too. After the training all of it counts
    again, so that its network can go.
    """
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()
