"""Checkpoint files: written atomically and durably, read without executing anything, verified."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from detr_exp import tensor_files
from detr_exp.tensor_files import FORMAT as FORMAT
from detr_exp.tensor_files import Stored
from detr_exp.trainer.sharding import PREFIX, SHARDS
from detr_exp.writing import write

NEWEST = "checkpoint.pth"
BEST = {"raw": "checkpoint_best_regular.pth", "ema": "checkpoint_best_ema.pth"}
BEST_TOTAL = "checkpoint_best_total.pth"
FIRST_STAGE = "checkpoint_first_stage.pth"  # the best of the first stage, to go back to
SAFE = ".safetensors"


def save(state: Stored, path: Path) -> None:
    """Write `state` so that at every instant the file under `path` is either the old one or the new one, whole.

    Raises:
        ValueError: when the folder cannot be written (read-only, disk full); the previous file is untouched.
    """
    write(path, lambda file: torch.save(state, file))


def duplicate(source: Path, path: Path) -> None:
    """Copy a checkpoint under another name, with the guarantees of `save`."""
    with open(source, "rb") as original:
        write(path, lambda file: shutil.copyfileobj(original, file))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` of the numbered checkpoints."""
    numbered = [p for p in folder.glob("checkpoint_*.pth") if p.stem.removeprefix("checkpoint_").isdigit()]
    numbered.sort(key=lambda p: int(p.stem.removeprefix("checkpoint_")))
    for old in numbered[: max(0, len(numbered) - keep)]:
        old.unlink()


def load(path: Path, needs: tuple[str, ...] = ()) -> Stored:
    """Read a checkpoint on the CPU, whole; nothing in it is executed.

    Args:
        path: of the file.
        needs: names that the checkpoint must have, besides the weights.

    Raises:
        ValueError: when the file is missing, damaged (its checksums are compared) or was not written by this package.
    """
    state = load_without_shards(path, needs)
    if SHARDS in state:
        from detr_exp.trainer.shards import load_shards  # torch.distributed.checkpoint is slow to import

        state = load_shards(state, path.parent)
    return state


def load_without_shards(path: Path, needs: tuple[str, ...] = ()) -> Stored:
    """Like `load`, but tensors that are stored in a folder next to the file (see `shards`) have no values."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a checkpoint (.pth) or the folder of a run")
    state = tensor_files.read(path, _alternatives(path))
    if "format" not in state:
        raise ValueError(f"{path} was not written by detr_exp; foreign weights go through model.weights={path}")
    tensor_files.refuse_misshapen(state, path, needs)
    return state


def remove_unnamed_parts(folder: Path) -> None:
    """Delete the parts of sharded states that no checkpoint of a run folder refers to any more."""
    states = [load_without_shards(path) for path in folder.glob("checkpoint*.pth")]
    named = {state[SHARDS]["folder"] for state in states if SHARDS in state}
    for parts in folder.glob(f"{PREFIX}*"):
        if parts.name not in named:
            shutil.rmtree(parts, ignore_errors=True)


def save_safetensors(state: Stored, path: Path) -> None:
    """Write a checkpoint for inference as safetensors: tensors, and everything else as JSON in the header.

    Raises:
        ValueError: as `save`.
    """
    from safetensors.torch import save as serialised

    tensors = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    rest = json.dumps({name: value for name, value in state.items() if name != "model"})
    write(path, serialised(tensors, {tensor_files.HEADER: rest}))


def resolve(checkpoint: str | Path, weights: str | None = None) -> Path:
    """The checkpoint file for a path to a checkpoint or to a run folder (its best, else its newest).

    Args:
        checkpoint: file or folder.
        weights: "ema" or "raw": the best checkpoint of these weights; None: the best of both.

    Raises:
        ValueError: when there is no checkpoint.
    """
    path = Path(str(checkpoint)).expanduser()
    if not path.is_dir():
        return path
    bests = (BEST_TOTAL, BEST["ema"], BEST["raw"]) if weights is None else (BEST[weights],)
    for name in (*bests, NEWEST):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no checkpoint; a run writes {NEWEST} and {BEST_TOTAL} there")


def config_hash(config: Stored) -> str:
    """Twelve hex digits that identify a resolved config."""
    canonical = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _alternatives(path: Path) -> str:
    others = sorted(p.name for p in path.parent.glob("checkpoint*.pth") if p != path)
    return f"; also in this folder: {', '.join(others)}" if others else ""
