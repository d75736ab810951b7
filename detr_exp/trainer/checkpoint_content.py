"""What checkpoints contain: everything needed to resume, or the small part that inference needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from detr_exp.protocols import PerClass
from detr_exp.tensor_files import Stored
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.trainer.background import Background, nothing
from detr_exp.trainer.sharding import copied, full_tensor, is_sharded, local_part
from detr_exp.trainer.state import Run, State, nonfinite_costs

DEFAULT_THRESHOLD = 0.5  # where the checkpoint has never been evaluated


class NonFiniteError(RuntimeError):
    """Loss, gradients or weights were not finite."""


def save_training(run: Run, state: State, name: str = files.NEWEST, background: Background | None = None) -> None:
    """Write everything needed to resume, to `checkpoint.pth` or under another name.

    Args:
        run, state: of the training.
        name: of the file.
        background: copy the state to the host, and write it there while training goes on.

    Raises:
        NonFiniteError: the weights are not finite; the previous file is not changed.
    """
    saved = state.state_dict()
    refuse_non_finite(saved["model"], name)
    counted = {"logged_lines": run.tracker.lines, "nonfinite_costs": nonfinite_costs(run)}
    content = common_content(run) | saved | counted | {"kind": "training"}
    path = run.output_dir / name
    if any(is_sharded(tensor) for tensor in saved["model"].values()):
        from detr_exp.trainer import shards  # torch.distributed.checkpoint is slow to import

        shards.save(content, path, _save_named, background)
    elif background is None:
        distributed.on_first_rank(files.save, content, path)
    else:
        background.add(partial(files.save, copied(content), path) if distributed.rank() == 0 else nothing)


def _save_named(content: Stored, path: Path) -> None:
    """Write a checkpoint that names the folder of its shards, and remove the folders that none names any more."""
    files.save(content, path)
    files.remove_unnamed_parts(path.parent)


def copy_as_numbered(run: Run, state: State, keep: int, background: Background | None = None) -> None:
    """Copy `checkpoint.pth` to `checkpoint_<epoch>.pth`, and delete all but the last `keep` numbered checkpoints."""
    newest, path = run.output_dir / files.NEWEST, run.output_dir / f"checkpoint_{state.epoch}.pth"

    def copy() -> None:
        files.duplicate(newest, path)
        files.prune(run.output_dir, keep)

    if background is None:
        distributed.on_first_rank(copy)
    else:
        background.add(copy if distributed.rank() == 0 else nothing)


def inference_content(run: Run, state: State, which: str, metrics: dict[str, float]) -> Stored:
    """The content of a checkpoint for inference, with the EMA or the raw weights.

    Raises:
        NonFiniteError: the weights are not finite.
    """
    weights = state.ema.swapped(state.network) if which == "ema" and state.ema else nullcontext()
    with weights:
        model = {name: full_tensor(tensor).clone() for name, tensor in state.weights().items()}
    refuse_non_finite(model, files.BEST[which])
    metric = run.make_metric("val") if metrics else None
    return common_content(run) | {
        "kind": "inference",
        "model": model,
        "weights": which,
        "epoch": state.epoch_number,
        "step": state.step,
        "batch_size": state.batch_size,
        "metrics": metrics,
        "threshold": metrics.get("F1_threshold", DEFAULT_THRESHOLD),
        "operating_points": metric.operating_points() if isinstance(metric, PerClass) else {},
        "pixel_mean": state.network.pixel_mean.flatten().tolist(),
        "pixel_std": state.network.pixel_std.flatten().tolist(),
        "image_size": list(state.network.image_size),
    }


def common_content(run: Run) -> Stored:
    """The fields that every checkpoint has."""
    return {
        "format": files.FORMAT,
        "config": run.config,
        "config_identity": run.identity,
        "classes": list(run.data.classes),
        "category_ids": list(run.data.category_ids),
        "keypoints": None if run.data.keypoints is None else asdict(run.data.keypoints),
        "data_fingerprint": run.data.fingerprint,
        **({} if run.base is None else {"base": asdict(run.base)}),
        **({} if run.start is None else {"start": run.start}),
        **({} if run.teaching is None else {"teacher": run.teaching.teacher.record}),
    }


def refuse_non_finite(model: dict[str, Tensor], name: str) -> None:
    """Raises: NonFiniteError when a tensor of `model` is not finite; reads the device once."""
    floating = {key: local_part(tensor) for key, tensor in model.items() if tensor.is_floating_point()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in floating.values()]).all()
    if not all(distributed.gather(bool(finite))):
        wrong = [key for key, tensor in floating.items() if not torch.isfinite(tensor).all()]
        raise NonFiniteError(
            f"{name} was not written, because weights are not finite ({len(wrong)} tensors: {', '.join(wrong[:5])}); "
            "the previous one is unchanged. Lower optim.lr, or try trainer.hardware.amp=null"
        )
