"""The folder of a run: nothing in it changes before the run is accepted, Hydra's own files and the log included."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp.tracker.base import RECORD
from detr_exp.tracker.secrets import masked
from detr_exp.writing import LOCK, write


def hydra_files(cfg: DictConfig) -> dict[str, str]:
    """What Hydra would keep of this job in `.hydra`: file name -> content, without secrets."""
    known = {
        "config.yaml": cfg,
        "hydra.yaml": HydraConfig.instance().cfg,
        "overrides.yaml": HydraConfig.get().overrides.task,
    }
    plain = {
        name: masked(OmegaConf.to_container(node, resolve=False, enum_to_str=True)) for name, node in known.items()
    }
    return {name: yaml.safe_dump(values, sort_keys=False, allow_unicode=True) for name, values in plain.items()}


def start_writing(folder: Path, files: Mapping[str, str]) -> None:
    """Start to keep files in a folder: `files` in its `.hydra`, and the log with what was held back of it."""
    for name, text in files.items():
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        write(folder / ".hydra" / name, text)
    root = logging.getLogger()
    for held in [handler for handler in root.handlers if isinstance(handler, MemoryHandler)]:
        if isinstance(held.target, logging.FileHandler):
            held.target.baseFilename = str(folder.resolve() / Path(held.target.baseFilename).name)
            held.flush()
            root.removeHandler(held)
            root.addHandler(held.target)


def refuse_run_folder(folder: Path) -> None:
    """Keep commands that do not train out of the folders of trainings, whose files they would mix with theirs.

    Raises:
        ValueError: there is a training in it.
    """
    if (folder / RECORD).exists():
        raise ValueError(f"{folder} is the folder of a training; give the results one of their own: hydra.run.dir=...")


@contextmanager
def exclusive_access(folder: Path) -> Iterator[None]:
    """Hold the folder; a second run in it would mix its files with those of the first.

    Raises:
        ValueError: another process holds it.
    """
    from filelock import FileLock, Timeout

    is_new = not (folder / LOCK).exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise in_use_error(folder) from None
    try:
        yield
    finally:
        if is_new and not (folder / RECORD).exists():  # refused
            with suppress(OSError):
                (folder / LOCK).unlink()
        lock.release()


def in_use_error(folder: Path) -> ValueError:
    """What is said where another process holds a folder."""
    return ValueError(f"{folder} is in use by a run that is still going on; use another: hydra.run.dir=...")


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in a folder."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def remove_empty_folders(folder: Path, since: float) -> None:
    """Remove a folder that was made for a command that is refused, and what was made above it.

    Args:
        since: time at which the command was started; a folder that nothing has changed since then stays.
    """
    changed = {path: path.stat().st_mtime for path in (folder, *folder.parents) if path.exists()}
    for path, when in changed.items():
        if when < since or path == Path.cwd():
            return
        try:
            path.rmdir()
        except OSError:  # something is in it
            return
