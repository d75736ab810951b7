"""Usual causes of evaluations with almost no correct detections; each cause is checked before it is reported."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from detr_exp.data.content import Split
from detr_exp.ops.boxes import box_iou
from detr_exp.protocols import PerImage
from detr_exp.tracker.follower import METRICS
from detr_exp.tracker.jsonl import JsonLines
from detr_exp.trainer.console import Console
from detr_exp.trainer.state import Run, State

LOW = 0.01  # AP50
EVALUATIONS = 3
FEW_STEPS = 1000  # networks with random initial weights detect little before
SMALL = 8  # pixels at the input of the network
MIN_DECREASE = 0.1  # of the loss
HIGH_LR = 1e-3
MAX_INITIAL_SHARE = 0.3  # of the initial weights in the average


def check_evaluation(console: Console, run: Run, state: State, which: str, found: dict[str, float]) -> None:
    """Count evaluations with an AP50 below 0.01; after the third in a row, print likely causes once.

    Args:
        console: prints the causes.
        run: data, metric and settings.
        state: holds the count.
        which: the weights that were evaluated, `ema` or `raw`.
        found: their metrics.
    """
    if "mAP50" not in found:  # another evaluator, with another scale
        return
    state.num_low_evaluations = state.num_low_evaluations + 1 if found["mAP50"] < LOW else 0
    if state.num_low_evaluations == EVALUATIONS:
        causes = list(likely_causes(run, state, which)) or [
            "none of the usual causes: objects are large enough, classes agree, the loss falls. See whether a few "
            "images can be overfitted: trainer.overfit_batches=1"
        ]
        lines = "".join(f"\n  - {cause}" for cause in causes)
        console.line(f"AP50 has been below {LOW} in {EVALUATIONS} evaluations. Likely causes:{lines}")


def likely_causes(run: Run, state: State, which: str) -> Iterator[str]:
    """Causes that were confirmed, the most informative first."""
    metric = run.make_metric("val")
    if isinstance(metric, PerImage):
        yield from _wrong_classes(run, metric)
    yield from _never_trained(run)
    yield from _small_objects(run, state)
    yield from _no_learning(run, state)
    if which == "ema" and state.ema is not None:
        start = math.prod(state.ema.decay_at(update) for update in range(1, state.ema.updates + 1))
        if start > MAX_INITIAL_SHARE:
            yield (
                f"{start:.0%} of the averaged weights are still the initial weights; use a smaller "
                "trainer.ema_decay, or evaluate the raw weights, too: trainer.evaluate_weights=both"
            )
    if state.position < FEW_STEPS and run.config["model"]["weights"] is None:
        yield (
            f"only {state.position} steps from random weights; start from pretrained weights (model.weights=...) or "
            "use more trainer.epochs"
        )


def _wrong_classes(run: Run, metric: PerImage) -> Iterator[str]:
    """Boxes that match objects, but with other classes."""
    label_of = {number: label for label, number in enumerate(run.data.category_ids)}
    split = run.data.split("val")
    objects = right = anywhere = 0
    best = 0.0
    for index, image_id in enumerate(split.image_ids):
        if image_id not in metric.images:
            continue
        found, truth = metric.images[image_id], split.objects(index)
        best = max(best, float(found.scores.max(initial=0)))
        if not len(truth) or not len(found.scores):
            continue
        top = np.argsort(-found.scores)[: 2 * len(truth)]
        x, y, width, height = torch.from_numpy(found.boxes[top]).T
        boxes = torch.stack([x, y, x + width, y + height], 1)
        hits = box_iou(boxes[:, None], torch.from_numpy(truth.boxes_xyxy)[None]).numpy() >= 0.5
        labels = np.array([label_of[number] for number in truth.categories.tolist()])
        objects += len(truth)
        anywhere += int(hits.any(0).sum())
        right += int((hits & (found.labels[top][:, None] == labels)).any(0).sum())
    if objects and anywhere > 0.3 * objects and right < 0.1 * anywhere:
        yield (
            f"{anywhere} of {objects} objects have a box with another class: the names or the order of the classes "
            "do not fit the annotations (python -m detr_exp.check_data), or the weights were trained on other classes"
        )
    if best < 0.05:
        yield f"no detection has a score above {best:.3f}: the network does not yet distinguish objects from background"


def _never_trained(run: Run) -> Iterator[str]:
    seen, wanted = (_categories(run.data.split(name)) for name in ("train", "val"))
    names = dict(zip(run.data.category_ids, run.data.classes))
    if missing := sorted(wanted - seen):
        listed = ", ".join(repr(names[number]) for number in missing[:8])
        yield f"{len(missing)} of {len(wanted)} classes in validation have no object in training: {listed}"


def _categories(split: Split) -> set[int]:
    return {number for index in range(len(split)) for number in split.objects(index).categories.tolist()}


def _small_objects(run: Run, state: State) -> Iterator[str]:
    height, width = state.network.image_size
    split, sides = run.data.split("val"), []
    for index in range(len(split)):
        tall, wide = split.size(index)
        boxes = split.objects(index).boxes_xyxy
        sides += ((boxes[:, 2:] - boxes[:, :2]) * (width / wide, height / tall)).min(1).tolist()
    if sides and (middle := float(np.median(sides))) < SMALL:
        yield (
            f"half of the objects are narrower than {middle:.1f} pixels at {height} x {width}; a larger "
            f"model.image_size=[{2 * height},{2 * width}], or tiles of the images, would help"
        )


def _no_learning(run: Run, state: State) -> Iterator[str]:
    """Learning rate, loss and skipped steps, from the logged metrics."""
    lr = max(group["initial_lr"] for group in state.optimizer.param_groups)
    lines = JsonLines.read(run.output_dir / METRICS)
    if skipped := sum(line.get("train/nonfinite_steps") or 0 for line in lines):
        yield f"{skipped:.0f} steps were skipped because they were not finite; lower optim.lr or use amp=null"
    losses = [line["train/loss"] for line in lines if line.get("train/loss") is not None]
    if len(losses) >= 2 and min(losses[1:]) > (1 - MIN_DECREASE) * losses[0]:
        advice = "it may be too high" if lr >= HIGH_LR else "try a value ten times higher or lower"
        fall = f"({losses[0]:.2f} at first, {losses[-1]:.2f} now)"
        yield f"the training loss does not fall {fall}; optim.lr is {lr:g}: {advice}"
    elif lr > HIGH_LR:
        yield f"optim.lr is {lr:g}; these networks are usually trained with 1e-4 to 5e-4"
