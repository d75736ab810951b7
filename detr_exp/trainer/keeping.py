"""What of a run is kept in checkpoints: everything to go on with, or the little that inference needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.resume import identity
from detr_exp.trainer.state import Run, State


def save_newest(run: Run, state: State) -> None:
    """Everything to go on with, as `checkpoint.pth`."""
    files.save(facts(run) | state.state_dict() | {"kind": "training"}, run.output_dir / files.NEWEST)


def number_newest(run: Run, state: State, keep: int) -> None:
    """A copy of `checkpoint.pth` under the number of its epoch; all but the last `keep` of these are deleted."""
    files.duplicate(run.output_dir / files.NEWEST, run.output_dir / f"checkpoint_{state.epoch}.pth")
    files.prune(run.output_dir, keep=keep)


def slim(run: Run, state: State, which: str, metrics: dict[str, float]) -> dict[str, Any]:
    """All that inference needs of the EMA or the raw weights, and nothing else."""
    weights = state.ema.swapped(state.network) if which == "ema" and state.ema else nullcontext()
    with weights:
        model = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    return facts(run) | {
        "kind": "inference",
        "model": model,
        "weights": which,
        "epoch": state.epoch,
        "step": state.step,
        "metrics": metrics,
    }


def facts(run: Run) -> dict[str, Any]:
    """What every checkpoint says about itself."""
    return {
        "format": files.FORMAT,
        "config": run.config,
        "config_identity": identity(run.config),
        "classes": list(run.data.classes),
        "category_ids": list(run.data.category_ids),
        "keypoints": None if run.data.keypoints is None else asdict(run.data.keypoints),
        "data_fingerprint": run.data.fingerprint,
    }
