"""Python's garbage collector: off while the first training of a process starts, on while it trains.

Importing torch and building a network create about a million objects that stay. Scanning them repeatedly for garbage
takes a tenth of the start time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def off_until_training() -> Iterator[None]:
    """Turn collection off until a training begins or the `with` block ends.

    Has no effect if torch is already imported: garbage of the previous run of a sweep must be collected.
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
    """Exclude the objects that exist when a training begins from collection, and collect only newer ones.

    This also keeps memory shared with forked loader workers. After the training all objects are included again, so
    that the network can be freed.
    """
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()
