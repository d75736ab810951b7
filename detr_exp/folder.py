"""The folder of a run: no file in it changes before the run is accepted, including the files of Hydra and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp.locks import LockedError, lock
from detr_exp.tracker.base import RECORD
from detr_exp.tracker.secrets import masked
from detr_exp.writing import LOCK, write

TICK = 0.05  # seconds by which the clock of a file system may be late


def hydra_files(cfg: DictConfig) -> dict[str, str]:
    """The files that Hydra would write to `.hydra` for this job: file name -> content, without secrets."""
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
    """Start writing to a folder: `files` to its `.hydra`, and the log, including the records buffered so far."""
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
    """Refuse the folder of a training for commands that do not train, to keep their files apart.

    Raises:
        ValueError: the folder holds a training.
    """
    if (folder / RECORD).exists():
        raise ValueError(f"{folder} is the folder of a training; use another folder for the results: hydra.run.dir=...")


@contextmanager
def exclusive_access(folder: Path) -> Iterator[None]:
    """Lock the folder, so that no second run writes to it.

    Raises:
        ValueError: another process has locked it.
    """
    is_new = not (folder / LOCK).exists()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / LOCK, timeout=0))
        except LockedError:
            raise in_use_error(folder) from None
        try:
            yield
        finally:
            if is_new and not (folder / RECORD).exists():  # refused
                with suppress(OSError):
                    (folder / LOCK).unlink()


def in_use_error(folder: Path) -> ValueError:
    """The error for a folder that another process has locked."""
    return ValueError(f"{folder} is in use by another run; use another folder: hydra.run.dir=...")


def remove_empty_folders(folder: Path, since: float) -> None:
    """Remove an empty folder that was created for a refused command, and its empty new parents.

    Args:
        since: time at which the command was started; older folders are kept, also where the new one is in them.
    """
    made = {path: _made(path) for path in (folder, *folder.parents) if path.exists()}
    for path, when in made.items():
        if when < since - TICK or path == Path.cwd():
            return
        try:
            path.rmdir()
        except OSError:  # not empty
            return


def _made(folder: Path) -> float:
    """When a folder was made, or a later time before it was written to and read."""
    stat = folder.stat()
    return getattr(stat, "st_birthtime", min(stat.st_atime, stat.st_mtime))  # Python does not know Linux's
