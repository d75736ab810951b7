"""Checkpoint files: written atomically and durably, read without executing anything, verified."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from detr_exp.writing import write

FORMAT = 1
NEWEST = "checkpoint.pth"
BEST = {"raw": "checkpoint_best_regular.pth", "ema": "checkpoint_best_ema.pth"}
BEST_TOTAL = "checkpoint_best_total.pth"
SHARDS = "shards"
SAFE, HEADER = ".safetensors", "detr_exp"


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that at every instant the file under `path` is either the old one or the new one, whole.

    Raises:
        ValueError: when the folder cannot be written (read-only, disk full); the previous file is untouched.
    """
    write(path, lambda file: torch.save(state, file))


def duplicate(source: Path, path: Path) -> None:
    """Copy a checkpoint under another name, with the promises of `save`."""
    with open(source, "rb") as original:
        write(path, lambda file: shutil.copyfileobj(original, file))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` of the numbered checkpoints."""
    numbered = [p for p in folder.glob("checkpoint_*.pth") if p.stem.removeprefix("checkpoint_").isdigit()]
    numbered.sort(key=lambda p: int(p.stem.removeprefix("checkpoint_")))
    for old in numbered[: max(0, len(numbered) - keep)]:
        old.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, whole; `weights_only`, so nothing in it is executed.

    Raises:
        ValueError: when the file is absent, damaged (its checksums are compared) or not one of ours.
    """
    state = outlines(path)
    if SHARDS in state:
        from detr_exp.trainer.shards import filled

        state = filled(state, path.parent)
    return state


def outlines(path: Path) -> dict[str, Any]:
    """The same, but tensors that lie in a folder beside the file (see `shards`) are without values."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a checkpoint (.pth) or the folder of a run")
    advice = _alternatives(path)
    state = _read_safetensors(path) if path.suffix == SAFE else _read(path, advice)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} was not written by detr_exp; foreign weights go through model.weights={path}")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update detr_exp")
    return state


def save_safetensors(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint for inference as safetensors: tensors, and all else as JSON in the header.

    Raises:
        ValueError: as `save`.
    """
    from safetensors.torch import save as serialised

    tensors = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    rest = json.dumps({name: value for name, value in state.items() if name != "model"})
    write(path, serialised(tensors, {HEADER: rest}))


def _read_safetensors(path: Path) -> dict[str, Any] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}){_alternatives(path)}") from error
    return None if header is None else json.loads(header) | {"model": tensors}


def _read(path: Path, advice: str) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or no checkpoint ({error}){advice}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged!r} does not match{advice}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; every one means "not a file of plain tensors"
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" (it asks for {wanted[1]})" if wanted else ""
        raise ValueError(
            f"{path} holds more than tensors and plain values and was not opened{reason}{advice}"
        ) from error


def resolve(checkpoint: str | Path, weights: str | None = None) -> Path:
    """The file meant by a path to a checkpoint or to a run folder (its best, else its newest).

    Args:
        checkpoint: file or folder.
        weights: "ema" or "raw": the best of these; None: the best of both.

    Raises:
        ValueError: when there is none.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_dir():
        return path
    bests = (BEST_TOTAL, BEST["ema"], BEST["raw"]) if weights is None else (BEST[weights],)
    for name in (*bests, NEWEST):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no checkpoint; a run writes {NEWEST} and {BEST_TOTAL} there")


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a resolved config."""
    canonical = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _alternatives(path: Path) -> str:
    others = sorted(p.name for p in path.parent.glob("checkpoint*.pth") if p != path)
    return f"; also in this folder: {', '.join(others)}" if others else ""
