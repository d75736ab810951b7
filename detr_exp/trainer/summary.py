"""What a run prints at its start and at its end."""

from __future__ import annotations

from detr_exp.data.content import SPLITS
from detr_exp.data.splits import HELD_OUT
from detr_exp.published.table import named
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.trainer.console import Console
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import Run, State


def print_start(console: Console, settings: Settings, run: Run, state: State) -> None:
    """Print the network, the data, the device and the length of the run."""
    parameters = sum(p.numel() for p in state.network.parameters())
    trained = sum(p.numel() for p in state.parameters)
    height, width = state.network.image_size
    ranks = distributed.world_size()
    splits = [(name, getattr(run.data, name)) for name in (*SPLITS, HELD_OUT)]
    sizes = ", ".join(f"{len(split)} {name}" for name, split in splits if split is not None)
    names = ", ".join(run.data.classes[:8]) + (", ..." if len(run.data.classes) > 8 else "")
    console.summary(
        f"training {run.config['model']['_target_'].rpartition('.')[2]}",
        {
            "network": f"{parameters:,} parameters ({trained:,} trained), {height} x {width} px",
            "start": _start(run),
            "data": f"{run.data.content.origin}: {sizes} images",
            "classes": f"{run.data.num_classes}: {names}",
            "device": settings.hardware.describe(),
            "batch": f"{state.batch_size * state.grad_accum_steps * ranks} images a step "
            f"({state.batch_size} x {state.grad_accum_steps} accumulated{f' x {ranks} ranks' if ranks > 1 else ''})",
            "length": f"{settings.epochs} epochs, {state.total_steps} steps, seed {run.seed}",
            "folder": str(run.output_dir),
        },
    )


def _start(run: Run) -> str:
    """What the weights are that training begins with."""
    if run.resume_from is not None:
        return f"the checkpoint {run.resume_from}"
    if run.start is None:
        return "random weights"
    word = run.start.get("weights") or run.start["backbone"]
    entry = named(word)
    file = f"{word if entry is None else entry.title}, sha256 {run.start['sha256'][:12]}"
    return f"{file}, {run.share}" if "weights" in run.start else f"random weights, the backbone from {file}"


def print_result(console: Console, settings: Settings, run: Run, result: str) -> None:
    """Print the result and the paths of its files."""
    paths = {"run": run.output_dir, "checkpoint": run.output_dir / files.BEST_TOTAL}
    if settings.num_pictures:
        paths["figures"] = run.output_dir / "predictions"
    console.summary(result, {name: str(path) for name, path in paths.items()})
