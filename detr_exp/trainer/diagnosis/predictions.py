"""Validation predictions beside the ground truth, as images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from detr_exp.data.content import Split
from detr_exp.metric.backend import CocoEvaluation
from detr_exp.metric.charts import save_charts
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.ops.canvas import contents_of
from detr_exp.ops.draw import draw_objects, sheet, shown
from detr_exp.protocols import Labels
from detr_exp.structures import Batch, Detections
from detr_exp.trainer.state import Run
from detr_exp.writing import write

LONGEST_SIDE = 640


def save_evaluation_charts(run: Run, found: dict[str, float], step: int) -> None:
    """Draw the curves and the confusion matrix of an evaluation with detections to `charts/`, if it has curves.

    Args:
        run: its folder and its tracker receive the charts.
        found: values of the metric of its validation split.
        step: of the training.
    """
    metric = run.make_metric("val")
    if isinstance(metric, CocoEvaluation) and found.get("F1", 0) > 0:
        for path in save_charts(metric, run.output_dir / "charts"):
            run.tracker.image(path, path.stem, step)


def names_in(split: Split) -> Callable[[int], str]:
    """Image id -> the name of its file."""
    return lambda image_id: split.name(list(split.image_ids).index(image_id))


def captions(name: str, objects: int, detections: int, threshold: float) -> list[str]:
    """Texts above the two drawings of an image: its ground truth, and its predictions."""
    return [f"{Path(name).name}: {objects} annotated", f"{detections} predicted, scores from {threshold:.2f}"]


class PredictionSheet:
    """Collects the first `count` images of an evaluation, then writes one sheet: ground truth left, predictions right.

    Args:
        data: the data set; gives class names and the keypoint schema.
        names: image id -> name of its file.
        count: images on the sheet; 0 writes none.
        threshold: detections with a lower score are not drawn.
    """

    def __init__(self, data: Labels, names: Callable[[int], str], count: int, threshold: float) -> None:
        self.data, self.names, self.count, self.threshold = data, names, count, threshold
        self.pairs: list[Image.Image] = []
        self.captions: list[str] = []

    def add(self, batch: Batch, detections: list[Detections]) -> None:
        start = 0
        for i, count in enumerate(batch.targets.counts):
            if len(self.pairs) // 2 >= self.count:
                return
            end = start + count
            height, width = content = _content(batch, i)
            image = np.asarray(_in_shape(batch.images[i, :height, :width], batch.image_sizes[i]))
            found = detections[i].above(self.threshold)
            self.captions += captions(self.names(batch.image_ids[i]), count, len(found), self.threshold)
            self.pairs.append(self._ground_truth(image, batch, content, start, end))
            self.pairs.append(self._prediction(image, batch.image_sizes[i], found))
            start = end

    def save(self, folder: Path, step: int) -> Path | None:
        """Write `step_<step>.png`; None if there was nothing to draw."""
        if not self.pairs:
            return None
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:07d}.png"
        drawn = sheet(self.pairs, self.captions, columns=4)
        write(path, lambda file: drawn.save(file, "PNG"))
        return path

    def _ground_truth(
        self, image: np.ndarray, batch: Batch, content: tuple[int, int], start: int, end: int
    ) -> Image.Image:
        seen_height, seen_width = content
        # of the whole canvas, to which the objects are relative
        height, width = (a * b / c for a, b, c in zip(image.shape, batch.images.shape[1:3], content))
        targets = batch.targets
        keypoints = None
        if targets.keypoints is not None:
            keypoints = targets.keypoints[start:end].numpy() * np.array([width, height, 1], np.float32)
        masks = None
        if targets.masks is not None:
            seen = targets.masks[start:end, :seen_height, :seen_width]
            masks = _resized_masks(seen, image.shape[1], image.shape[0])
        return draw_objects(
            image,
            boxes_xyxy_px=cxcywh_to_xyxy(targets.boxes[start:end]).numpy() * np.array([width, height, width, height]),
            labels=targets.labels[start:end].tolist(),
            names=self.data.classes,
            masks=masks,
            keypoints_px=keypoints,
            skeletons=self._skeletons(),
        )

    def _prediction(self, image: np.ndarray, size: Tensor, found: Detections) -> Image.Image:
        height, width = image.shape[:2]
        scale = width / float(size[1])
        keypoints = None
        if found.keypoints is not None:
            keypoints = found.keypoints.numpy() * np.array([scale, scale, 1], np.float32)
        return draw_objects(
            image,
            boxes_xyxy_px=found.boxes.numpy() * scale,
            labels=found.labels.tolist(),
            names=self.data.classes,
            scores=found.scores.tolist(),
            masks=None if found.masks is None else _resized_masks(found.masks, width, height),
            keypoints_px=keypoints,
            skeletons=self._skeletons(),
        )

    def _skeletons(self) -> list[list[tuple[int, int]]]:
        return [] if self.data.keypoints is None else self.data.keypoints.skeletons


def _content(batch: Batch, index: int) -> tuple[int, int]:
    """(height, width) of an image on its canvas."""
    if batch.padding_mask is None:
        return batch.images.shape[1], batch.images.shape[2]
    height, width = contents_of(batch.padding_mask[index : index + 1])[0].tolist()
    return height, width


def _in_shape(pixels: Tensor, size: Tensor) -> Image.Image:
    """What the network sees of an image, in the aspect ratio of the original image, large enough for labels."""
    height, width = size.tolist()
    scale = LONGEST_SIDE / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(shown(pixels.cpu().numpy())).resize(shape, Image.Resampling.BILINEAR)


def _resized_masks(masks: Tensor, width: int, height: int) -> np.ndarray:
    resized = [np.asarray(Image.fromarray(mask).resize((width, height))) for mask in masks.cpu().numpy()]
    return np.stack(resized) if resized else np.zeros((0, height, width), bool)
