"""Before the first step, and after evaluations that found nothing: is it the data, the maps, or the training?"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.ops.draw import draw_objects, sheet
from detr_exp.structures import Target

SAMPLES = "training_samples.png"


def save_samples(path: Path, data: Any, loader: Any, count: int) -> Path:
    """A sheet of the first training samples of the running epoch, exactly as the network gets them.

    Args:
        path: the file.
        data: gives class names and skeletons.
        loader: of training batches.
        count: samples on the sheet.
    """
    keys = islice((key for batch in loader.batch_sampler for key in batch), count)
    skeletons = [] if data.keypoints is None else data.keypoints.skeletons
    pictures = []
    for key in keys:
        sample = loader.dataset[key]
        pictures.append(_drawn(sample.image.numpy(), sample.target, data.classes, skeletons))
    sheet(pictures, tile=360).save(path)
    return path


def _drawn(pixels: np.ndarray, target: Target, names: list[str], skeletons: list[list[tuple[int, int]]]) -> Image.Image:
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
