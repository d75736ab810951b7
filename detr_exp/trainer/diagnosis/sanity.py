"""Checks before the first step: whether the evaluator fits the data, and a figure of training samples."""

from __future__ import annotations

from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_exp.data.augment import plain
from detr_exp.data.content import Split
from detr_exp.data.loader import Samples
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.ops.draw import draw_objects, sheet
from detr_exp.protocols import Labels, PerClass
from detr_exp.runs.next_commands import SAMPLES
from detr_exp.structures import Detections, Target
from detr_exp.trainer.diagnosis.predictions import names_in
from detr_exp.trainer.distributed import on_first_rank
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import Run, State
from detr_exp.trainer.validation import refuse_unmeasured_monitor
from detr_exp.writing import write

MOST_IMAGES = 64  # takes about a second for data sets of any size
MAX_OBJECTS = 20  # of an image: the protocol evaluates at most so many poses
MIN_SIDE = 8  # pixels; rounding changes smaller objects too much
MIN_BOX_AS_MASK = 64  # without an outline a box is used as mask, and its sides are rounded to whole pixels
MIN_SCORE = 0.99


def save_sample_sheet(path: Path, data: Labels, loader: Any, count: int) -> Path:
    """Draw the first training samples of the current epoch, exactly as the network receives them.

    Args:
        path: the file.
        data: gives class names and skeletons.
        loader: of training batches.
        count: samples on the sheet.
    """
    keys = islice((key for batch in loader.batch_sampler for key in batch), count)
    skeletons = [] if data.keypoints is None else data.keypoints.skeletons
    images, texts = [], []
    name_of = names_in(loader.dataset.split)
    for key in keys:
        sample = loader.dataset[key]
        texts.append(Path(name_of(sample.image_id)).name)
        images.append(_draw(sample.image.numpy(), sample.target, data.classes, skeletons))
    drawn = sheet(images, texts, tile=360)
    write(path, lambda file: drawn.save(file, "PNG"))
    return path


def refuse_wrong_evaluator(run: Run) -> None:
    """Check the evaluator with the ground truth of the validation split.

    Raises:
        ValueError: the evaluator does not give the ground truth a score of 1.
    """
    if run.data.val is not None:
        on_first_rank(refuse_low_ground_truth_score, run)


def save_training_samples(settings: Settings, run: Run, state: State) -> None:
    """Save a figure of training samples to the run folder and the tracker."""
    if settings.num_pictures:
        state.loader.batch_sampler.set_epoch(state.epoch)
        path = run.output_dir / SAMPLES
        on_first_rank(save_sample_sheet, path, run.data, state.loader, 2 * settings.num_pictures)
        run.tracker.image(path, "training_samples", state.step)


def refuse_low_ground_truth_score(run: Run, split: str = "val") -> None:
    """Evaluate the training targets as if they were predictions: their score must be 1.

    The targets use the class map and the geometry of training, the ground truth those of the evaluator; a mistake in
    either gives a score below 1. A few images with all classes are enough. Images where even perfect predictions score
    less are not used: those with truncated or tiny objects, or more objects than the protocol evaluates.

    Raises:
        ValueError: the score is lower, with the classes; or the evaluator does not measure `trainer.monitor`.
    """
    data = copy(run.data)
    data.tiles = None  # the ground truth is that of whole images
    samples = data.loader(split, network=run.network, batch_size=1, seed=run.seed).dataset
    assert isinstance(samples, Samples)
    indices = _comparable(samples)
    if not indices:
        return
    metric = run.make_metric(split, tuple(samples.split.image_ids[i] for i in indices))
    for index in indices:
        metric.update([samples.split.image_ids[index]], [_as_detections(samples, index)])
    found = metric.compute()
    refuse_unmeasured_monitor(run, found)
    wrong = {name: value for name, value in found.items() if name.endswith("mAP") and 0 <= value < MIN_SCORE}
    if wrong:
        rows = metric.table() if isinstance(metric, PerClass) else []
        classes = [row["class"] for row in rows if 0 <= row["AP"] < MIN_SCORE]
        raise ValueError(
            f"the evaluator gives the ground truth {', '.join(f'{n} {v:.3f}' for n, v in wrong.items())} instead of 1 "
            f"({', '.join(classes[:8]) or 'all classes'}): labels or sizes of the {split} split do not fit; "
            "compare them with python -m detr_exp.check_data"
        )


def _comparable(samples: Samples) -> list[int]:
    """Images for the comparison: spread over the split, every class among them."""
    split = samples.split
    chosen: list[int] = []
    known: set[int] = set()
    stride = max(1, len(split) // MOST_IMAGES)
    for turn in range(stride):
        for index in range(turn, len(split), stride):
            objects = split.objects(index)
            classes = set(objects.categories.tolist())
            if (turn and classes <= known) or not 0 < len(objects) <= MAX_OBJECTS or not _is_comparable(split, index):
                continue
            chosen.append(index)
            known |= classes
        if turn and len(chosen) >= 2 * MOST_IMAGES:
            break
    return sorted(chosen)


def _is_comparable(split: Split, index: int) -> bool:
    """Whether all objects of an image are inside it, and large enough that rounding changes little."""
    height, width = split.size(index)
    objects = split.objects(index)
    boxes, segments = objects.boxes_xyxy, objects.segments or []
    points = [boxes, *(np.array(part) for segment in segments if isinstance(segment, list) for part in segment)]
    corners = np.concatenate([np.reshape(part, (-1, 2)) for part in points])
    least = MIN_SIDE if all(segment is not None for segment in segments) else MIN_BOX_AS_MASK
    large = (boxes[:, 2:] - boxes[:, :2]).min() >= least
    return bool(large and (corners >= 0).all() and (corners <= (width, height)).all())


def _as_detections(samples: Samples, index: int) -> Detections:
    """The targets of an image as detections with score 1, in pixels of the image."""
    split = samples.split
    height, width = split.size(index)
    objects = split.objects(index)
    target = samples.target(objects, plain((height, width), objects.boxes_xyxy, (height, width)))
    boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
    scores = torch.ones(len(boxes))
    keypoints = None
    if target.keypoints is not None:
        keypoints = target.keypoints * torch.tensor([width, height, 1.0])
        labelled = keypoints[..., 2:] > 0
        # COCO ignores objects without labelled keypoints, and detections near their centres; they come last
        keypoints = torch.where(labelled, keypoints, _middles(boxes))
        scores[~labelled.flatten(1).any(1)] = 0.5
    return Detections(scores, target.labels, boxes, target.masks, keypoints)


def _middles(boxes: Tensor) -> Tensor:
    """`[n, 1, 3]` x, y, 0 of the centres of boxes `[n, 4]`."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, torch.zeros(len(boxes), 1)], 1)[:, None]


def _draw(pixels: np.ndarray, target: Target, names: list[str], skeletons: list[list[tuple[int, int]]]) -> Image.Image:
    height, width = pixels.shape[:2]
    keypoints = None
    if target.keypoints is not None:
        keypoints = target.keypoints.numpy() * np.array([width, height, 1], np.float32)
    return draw_objects(
        pixels,
        boxes_xyxy_px=cxcywh_to_xyxy(target.boxes).numpy() * np.array([width, height, width, height]),
        labels=target.labels.tolist(),
        names=names,
        masks=None if target.masks is None else target.masks.numpy(),
        keypoints_px=keypoints,
        skeletons=skeletons,
    )
