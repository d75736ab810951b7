"""Where a run begins: anew, or at the checkpoint of one that stopped, found by what decides its numbers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from detr_exp.config.keys import FREE, is_under
from detr_exp.config.stored import as_first_version
from detr_exp.folder import in_use_error, is_locked
from detr_exp.tracker.base import RECORD, RunRecord
from detr_exp.trainer import checkpoint as files
from detr_exp.values import Values, flat

IDENTITY_TAG = "config.hash"


class Origin(NamedTuple):
    """Where a run begins.

    Attributes:
        folder: the run folder: the one asked for, or that of the run that goes on.
        checkpoint: to go on from; None: from the start.
        record: of the run that goes on; None: it is a new one.
        identity: of the config.
    """

    folder: Path
    checkpoint: Path | None
    record: RunRecord | None
    identity: str

    @property
    def seed(self) -> int | None:
        """The seed of the run that goes on."""
        seed = None if self.record is None else self.record.tags.get("seed")
        return None if seed is None else int(seed)


def origin(resume: str | None, output_dir: Path, config: Values) -> Origin:
    """Where a run with this config begins.

    A run goes on in its own folder, under its own name. One that was killed before its first checkpoint begins again,
    but is still the same run.

    Args:
        resume: null, a checkpoint, a run folder, or `auto`; see `find_checkpoint`.
        output_dir: the run folder asked for.
        config: the resolved config as it was asked for.

    Raises:
        ValueError: a named checkpoint is not there, or another run is in the folder.
    """
    wanted = identity(config)
    checkpoint = find_checkpoint(resume, output_dir, wanted)
    if checkpoint is not None and (checkpoint.parent / RECORD).exists():
        return Origin(checkpoint.parent, checkpoint, RunRecord.load(checkpoint.parent), wanted)
    if resume == "auto" and checkpoint is None and is_unfinished(output_dir, wanted):
        return Origin(output_dir, None, RunRecord.load(output_dir), wanted)
    if checkpoint is None or checkpoint.parent.resolve() != output_dir.resolve():
        refuse_existing_run(output_dir)
    return Origin(output_dir, checkpoint, None, wanted)


def refuse_existing_run(folder: Path) -> None:
    """Refuse to begin a run where there is one, whose checkpoints it would replace.

    Raises:
        ValueError: says how to go on with that one, and how to replace it.
    """
    if not (folder / RECORD).exists() and not any(folder.glob("checkpoint*.pth")):
        return
    if is_locked(folder):
        raise in_use_error(folder)
    try:
        status = RunRecord.load(folder).status
    except ValueError:
        status = "of which no record can be read"
    told = {"ok": "that is finished", "running": "that was killed"}.get(status, f"that has ended ({status})")
    further = "go on with it: trainer.resume=auto; " if (folder / files.NEWEST).exists() else ""
    raise ValueError(
        f"{folder} holds a run {told}; {further}replace it: rm -r {shlex.quote(str(folder))}; "
        "or use another folder: hydra.run.dir=..."
    )


def identity(config: Values) -> str:
    """The hash of everything in a resolved config that decides the numbers of a run."""
    kept = {key: value for key, value in flat(as_first_version(config)).items() if not is_under(key, FREE)}
    return files.config_hash(kept)


def find_checkpoint(resume: str | None, output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that `trainer.resume` means.

    Args:
        resume: null, a checkpoint, a run folder, or `auto`: the run folder itself, else the newest unfinished run
            beside it with the same config that nobody is at work in, else none.
        output_dir: the run folder.
        wanted: `identity` of the config.

    Raises:
        ValueError: when a named checkpoint is not there.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(str(resume)).expanduser()  # a switch or a number is no file either
        path = path / files.NEWEST if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"trainer.resume is {resume}, but no checkpoint is there; use trainer.resume=auto or null")
        return path
    if (output_dir / files.NEWEST).is_file():
        return output_dir / files.NEWEST
    # run folders are outputs/<day>/<time>: look at the folders beside this one and beside its parent
    near = [*output_dir.parent.glob(f"*/{files.NEWEST}"), *output_dir.parent.parent.glob(f"*/*/{files.NEWEST}")]
    newest = sorted(set(near), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in newest if is_unfinished(path.parent, wanted)), None)


def is_unfinished(folder: Path, wanted: str) -> bool:
    """Whether a folder holds a run with this `identity` that did not come to its end and is not going on now."""
    try:
        record = RunRecord.load(folder)
    except ValueError:
        return False
    if record.tags.get(IDENTITY_TAG) != wanted or record.status in ("ok", "pruned"):
        return False
    return not is_locked(folder)
