"""Where a run starts: from the beginning, or at a checkpoint of a stopped run with the same identity."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from detr_exp.config.keys import is_free
from detr_exp.config.stored import as_first_version
from detr_exp.folder import in_use_error
from detr_exp.locks import is_locked
from detr_exp.published.table import UNKNOWN, named
from detr_exp.tracker.base import RECORD, RunRecord
from detr_exp.trainer import checkpoint as files
from detr_exp.values import Values, flat
from detr_exp.writing import LOCK

IDENTITY_TAG = "config.hash"


class Origin(NamedTuple):
    """Where a run starts.

    Attributes:
        folder: the run folder: the requested one, or that of the resumed run.
        checkpoint: file to resume from; None: start from the beginning.
        record: of the resumed run; None: it is a new run.
        identity: of the config.
    """

    folder: Path
    checkpoint: Path | None
    record: RunRecord | None
    identity: str

    @property
    def seed(self) -> int | None:
        """The seed of the resumed run."""
        seed = None if self.record is None else self.record.tags.get("seed")
        return None if seed is None else int(seed)


def origin(resume: str | None, output_dir: Path, config: Values) -> Origin:
    """Find where a run with this config starts.

    A resumed run continues in its folder, under its name. A run that was killed before its first checkpoint starts
    from the beginning, but is the same run.

    Args:
        resume: null, a checkpoint, a run folder, or `auto`; see `find_checkpoint`.
        output_dir: the requested run folder.
        config: the resolved config as it was requested.

    Raises:
        ValueError: a given checkpoint does not exist, or the folder holds another run.
    """
    run_identity = identity(config)
    checkpoint = find_checkpoint(resume, output_dir, run_identity)
    if checkpoint is not None and (checkpoint.parent / RECORD).exists():
        return Origin(checkpoint.parent, checkpoint, RunRecord.load(checkpoint.parent), run_identity)
    if resume == "auto" and checkpoint is None and is_unfinished(output_dir, run_identity):
        return Origin(output_dir, None, RunRecord.load(output_dir), run_identity)
    if checkpoint is None or checkpoint.parent.resolve() != output_dir.resolve():
        refuse_existing_run(output_dir)
    return Origin(output_dir, checkpoint, None, run_identity)


def refuse_existing_run(folder: Path) -> None:
    """Refuse to start a run in a folder that holds one, because it would replace its checkpoints.

    Raises:
        ValueError: tells how to resume the existing run, and how to replace it.
    """
    if not (folder / RECORD).exists() and not any(folder.glob("checkpoint*.pth")):
        return
    if is_locked(folder / LOCK):
        raise in_use_error(folder)
    try:
        status = RunRecord.load(folder).status
    except ValueError:
        status = "of which no record can be read"
    state = {"ok": "that is finished", "running": "that was killed"}.get(status, f"that has ended ({status})")
    further = "resume it: trainer.resume=auto; " if (folder / files.NEWEST).exists() else ""
    raise ValueError(
        f"{folder} holds a run {state}; {further}replace it: rm -r {shlex.quote(str(folder))}; "
        "or use another folder: hydra.run.dir=..."
    )


def identity(config: Values) -> str:
    """The hash of all keys of a resolved config that influence the numbers of a run."""
    relevant = {key: value for key, value in flat(as_first_version(config)).items() if not is_free(key)}
    entry = named(str(relevant.get("model.weights")))
    if entry is not None and entry.hash != UNKNOWN:  # other files are locked to the hash of their first use
        relevant["model.weights.hash"] = entry.hash
    return files.config_hash(relevant)


def find_checkpoint(resume: str | None, output_dir: Path, run_identity: str) -> Path | None:
    """The checkpoint that `trainer.resume` selects.

    Args:
        resume: null, a checkpoint, a run folder, or `auto`: the run in the run folder, else the newest unfinished
            run next to it with the same config that no process is using, else none.
        output_dir: the run folder.
        run_identity: `identity` of the config.

    Raises:
        ValueError: when a given checkpoint does not exist.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(str(resume)).expanduser()  # also for booleans and numbers
        path = path / files.NEWEST if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"trainer.resume is {resume}, but there is no such checkpoint; use trainer.resume=auto or null"
            )
        return path
    if (output_dir / files.NEWEST).is_file():
        return output_dir / files.NEWEST
    if (output_dir / RECORD).exists():  # killed before its first checkpoint
        return None
    # run folders are outputs/<day>/<time>: search the folders next to this one and next to its parent
    near = [*output_dir.parent.glob(f"*/{files.NEWEST}"), *output_dir.parent.parent.glob(f"*/*/{files.NEWEST}")]
    newest = sorted(set(near), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in newest if is_unfinished(path.parent, run_identity)), None)


def is_unfinished(folder: Path, run_identity: str) -> bool:
    """Whether a folder holds a run with this `identity` that did not finish and is not running now."""
    try:
        record = RunRecord.load(folder)
    except ValueError:
        return False
    if record.tags.get(IDENTITY_TAG) != run_identity or record.status in ("ok", "pruned"):
        return False
    return not is_locked(folder / LOCK)
