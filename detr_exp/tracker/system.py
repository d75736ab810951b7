"""Use of processors and memory, for the `system/*` metrics."""

from __future__ import annotations

import psutil

GIB = 2**30


def system_use() -> dict[str, float]:
    """Processors in use since the last call (0..100, of all cores), memory in use, and the share of this process.

    The memory of loader workers is only in `system/ram_gib`. Costs about 0.1 ms.
    """
    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/ram_gib": psutil.virtual_memory().used / GIB,
        "system/process_ram_gib": psutil.Process().memory_info().rss / GIB,
    }
