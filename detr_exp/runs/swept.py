"""The folders of the runs of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from detr_exp.tracker.secrets import masked

LONGEST = 80  # characters of the part that can be read; disks allow names of 255 bytes, some paths of 260 in all
LONGEST_VALUE = 24
UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")  # on some disk, or in some shell


def folder_of(sweep: Path, hash_: str, swept: Iterable[str]) -> Path:
    """The folder of a run: `<swept overrides>-<hash>`, such as `loss=focal,focal_gamma=1.5-0a1b2c3d4e`.

    Runs of earlier versions, whose folder is named by the hash alone, keep it.

    Args:
        sweep: the folder of the sweep.
        hash_: of the run.
        swept: overrides that differ between the runs, in any order.
    """
    old = sweep / hash_
    name = readable(swept)
    return old if not name or old.exists() else sweep / f"{name}-{hash_}"


def hash_in(name: str) -> str:
    """The hash in the name of a folder."""
    return name.rpartition("-")[2]


def readable(swept: Iterable[str]) -> str:
    """Keys, without the groups above them where that is clear, and values, without secrets; safe on every disk."""
    pairs = sorted(tuple(word.lstrip("+~").split("=", 1)) for word in masked(list(swept)) if "=" in word)
    last = Counter(key.rpartition(".")[2] for key, _ in pairs)
    parts = []
    for key, value in pairs:
        short = key.rpartition(".")[2]
        name = UNSAFE.sub("_", short if last[short] == 1 else key).lstrip(".")
        parts.append(f"{name}={UNSAFE.sub('_', value)[:LONGEST_VALUE]}")
    return ",".join(parts)[:LONGEST]


def alone(words: Sequence[str]) -> list[str]:
    """The overrides of a run of a sweep as those of a run by itself, with what an option of `sweep` sets besides."""
    return [*words, "hydra.mode=RUN"] if any(word.partition("=")[0] == "sweep" for word in words) else [*words]
