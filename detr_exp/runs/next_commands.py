"""The commands that a run, a sweep and a report name to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from detr_exp.runs.past import PastRun

SAMPLES = "training_samples.png"  # in a run folder: what the network was given
IMAGE_TAG = "data.image"  # of a run: an image of its data
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def next_commands(folder: Path, image: str | None, allowed: Sequence[str] | None) -> list[list[str]]:
    """Two commands for the best checkpoint that run as they are: predict on an image that is there, and export.

    Without an image on the disk, as for synthetic data, it is a figure of the run; evaluate stands for what cannot be.

    Args:
        folder: of the run.
        image: one of its data.
        allowed: `allow_targets` of the run.

    Returns:
        module, then overrides.
    """
    words = [f"checkpoint={folder}", *([f"allow_targets=[{','.join(allowed)}]"] if allowed else [])]
    known = [["detr_exp.evaluate", *words]]
    if all(map(find_spec, EXPORT_PACKAGES)):
        known.insert(0, ["detr_exp.export", *words])
    source = next((path for path in (image, folder / SAMPLES) if path is not None and Path(path).is_file()), None)
    if source is not None:
        known.insert(0, ["detr_exp.predict", *words, f"source={source}"])
    return known[:2]


def commands_of(run: PastRun) -> list[list[str]]:
    """Those of a run that has ended."""
    return next_commands(run.folder, run.record.tags.get(IMAGE_TAG), run.config.get("allow_targets"))
