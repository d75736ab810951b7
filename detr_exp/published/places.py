"""Where weights lie on this machine, and the hashes that were recorded when a file was first used.

Looked at are the folders in `DETR_EXP_WEIGHTS`, our cache, that of the Hugging Face hub, torch's, and Python packages.
Only our cache is written to, and nothing in it that we have not written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from detr_exp.locks import lock
from detr_exp.published.source import Source
from detr_exp.writing import caches, write

FOLDERS = "DETR_EXP_WEIGHTS"  # folders of the user, separated as in PATH
RECORD = "weights.lock.json"  # in the cache: key -> sha256 and size
BLOCK = 1 << 20

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder that files are downloaded to."""
    return caches() / "detr_exp" / "weights"


def own_place(source: Source) -> Path:
    """Where a download of ours lies, and where a user may put the file."""
    return cache_folder() / source.places[0]


def candidates(source: Source) -> Iterator[tuple[Path, bool]]:
    """Files that may be the one meant, and whether they lie where nothing else is meant to lie."""
    users = [Path(word).expanduser() for word in os.environ.get(FOLDERS, "").split(os.pathsep) if word]
    for folder in (*users, cache_folder()):
        for place in source.places:
            if (folder / place).is_file():
                yield folder / place, True
    if source.repo and (hubs := _in_hub_cache(source)) is not None:
        yield hubs, False
    if source.files[0] in source.places and (torchs := _torch_folder() / source.files[0]).is_file():
        yield torchs, False
    if (installed := _in_package(source)) is not None:
        yield installed, False


def _in_hub_cache(source: Source) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in source.files:
        found = try_to_load_from_cache(source.repo, file, revision=source.revision)
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None


def _in_package(source: Source) -> Path | None:
    if source.package is None:
        return None
    requirement, path = source.package
    try:
        found = Path(str(distribution(requirement.partition("==")[0]).locate_file(path)))
    except PackageNotFoundError:
        return None
    return found if found.is_file() else None


def _torch_folder() -> Path:
    """Of `torch.hub`, without loading torch."""
    base = caches() / "torch"
    return Path(os.environ.get("TORCH_HOME") or base).expanduser() / "hub" / "checkpoints"


def digests(path: Path) -> dict[str, str]:
    """MD5 and SHA-256 of a file, in hex digits."""
    state = path.stat()
    return _digests(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _digests(path: Path, stamp: tuple[int, ...]) -> dict[str, str]:
    known: dict[str, Any] = {kind: hashlib.new(kind, usedforsecurity=False) for kind in ("md5", "sha256")}
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            for digest in known.values():
                digest.update(block)
    return {kind: digest.hexdigest() for kind, digest in known.items()}


def recorded() -> dict[str, dict[str, Any]]:
    """Key of a source -> `sha256` and `size` of its file when it was first used.

    Raises:
        ValueError: the record is damaged.
    """
    path = cache_folder() / RECORD
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not all(isinstance(v, dict) and "sha256" in v for v in known.values()):
            raise ValueError("it holds other things")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}, the hashes of files in use, cannot be read ({error}); restore or remove it"
        ) from None
    return known


def record(source: Source, sha256: str, size: int) -> None:
    """Keep the hash of a file that is used for the first time; a cache that cannot be written to records nothing."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f".{RECORD}.lock"):
            known = recorded() | {source.key: {"sha256": sha256, "size": size}}
            write(folder / RECORD, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    except (OSError, ValueError) as error:
        logger.info("the hash of %s is not recorded: %s", source.title, error)
