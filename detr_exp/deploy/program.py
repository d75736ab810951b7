"""A graph in some format, run on images: makes its inputs from them, and detections from its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from detr_exp.data.render import fitted
from detr_exp.deploy.engines import Run
from detr_exp.deploy.graph import Graph
from detr_exp.model.head.mask import MASKS_AT_ONCE
from detr_exp.model.postprocess import detect
from detr_exp.structures import Detections, MaskLogits, Outputs, Prediction
from detr_exp.values import Values

Arrays = dict[str, np.ndarray]


class GateError(RuntimeError):
    """The outputs of a file differ from those of its checkpoint."""


@dataclass(frozen=True)
class Program:
    """A graph and a function that runs it.

    Attributes:
        graph: describes inputs and outputs, and postprocesses outputs where the file does not.
        run: runs it in PyTorch, or from a file.
        batch_size: images per run, exactly; None: any number.
    """

    graph: Graph
    run: Run
    batch_size: int | None = None

    def inputs(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays in the graph's order, from images `[H, W, 3]` uint8; of one size where the graph resizes."""
        if self.graph.preprocess:
            return [np.stack(images)]
        resized = np.stack([fitted(image, self.graph.network.image_size, self.graph.fit) for image in images])
        pixels = np.ascontiguousarray(resized.transpose(0, 3, 1, 2), dtype=np.float32) / 255
        sizes = np.array([image.shape[:2] for image in images])
        return [pixels, sizes] if "image_sizes" in self.graph.inputs else [pixels]

    def outputs(self, images: Sequence[np.ndarray]) -> Arrays:
        """Outputs by name, for any number of images of any sizes."""
        at_once = 1 if self.graph.preprocess else len(images)
        size = self.batch_size or at_once
        parts = []
        for start in range(0, len(images), min(size, at_once)):
            chunk = list(images[start : start + min(size, at_once)])
            filled = chunk + chunk[-1:] * (size - len(chunk))
            parts.append([output[: len(chunk)] for output in self.run(self.inputs(filled))])
        return {name: np.concatenate(outputs) for name, outputs in zip(self.graph.outputs, zip(*parts))}

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of each image in its pixels."""
        outputs = {name: torch.from_numpy(value) for name, value in self.outputs(images).items()}
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        if self.graph.postprocess:
            return [_of_image(outputs, index, size, self.graph) for index, size in enumerate(sizes)]
        masks = None
        if "masks" in outputs:
            # dense masks are the inner products of themselves with unit vectors
            count = outputs["masks"].shape[1]
            masks = MaskLogits(outputs["masks"][None], torch.eye(count).expand(1, len(sizes), -1, -1), torch.zeros(1))
        keypoints = outputs["keypoints"][None] if "keypoints" in outputs else None
        layers = Prediction(outputs["logits"][None], outputs["boxes"][None], masks, keypoints)
        padding = self.graph.fit.padding(sizes, self.graph.network.image_size)
        return detect(self.graph.network, Outputs(layers), torch.tensor(sizes), padding)


def _of_image(outputs: dict[str, torch.Tensor], index: int, size: tuple[int, int], graph: Graph) -> Detections:
    """Detections of one image from the outputs of a graph with postprocessing."""
    canvas = graph.network.image_size
    whole = [round(side * all_of / seen) for side, all_of, seen in zip(size, canvas, graph.fit.content(size, canvas))]
    parts = {name: value[index] for name, value in outputs.items()}
    if "masks" in parts:
        chunks = parts["masks"][:, None].split(MASKS_AT_ONCE)
        large = [F.interpolate(chunk, size=whole, mode="bilinear", align_corners=False)[:, 0] > 0 for chunk in chunks]
        parts["masks"] = torch.cat(large)[:, : size[0], : size[1]]
    return Detections(**parts)


def differences(expected: Arrays, actual: Arrays, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Differences of the outputs of two programs, in each query of each image.

    Queries are matched one to one by their outputs, because the last digits decide the order of nearly equal ones.

    Args:
        expected, actual: results of `Program.outputs`.
        sizes: `[B, 2]` (height, width) of the images.

    Returns:
        for each output `[B * Q]`, the largest difference in the query: of scores where there are logits, of boxes and
        points in units of the image's size.

    Raises:
        ValueError: scores or boxes of one of them are not finite.
    """
    apart: dict[str, list[np.ndarray]] = {name: [] for name in expected}
    for image, size in enumerate(sizes):
        one, other = (dict(_in_units(outputs, image, size)) for outputs in (expected, actual))
        names = [name for name in ("logits", "scores", "labels", "boxes") if name in one]
        cost = np.abs(_stacked(one, names)[:, None] - _stacked(other, names)[None]).max(-1)
        if not np.isfinite(cost).all():
            raise ValueError(
                "scores or boxes are not finite, so nothing can be compared; export a checkpoint of a run that "
                "has not diverged; where the checkpoint's outputs are finite, use full precision: export.half=false"
            )
        rows, columns = linear_sum_assignment(cost)
        for name, value in one.items():
            gap = np.abs(value[rows] - other[name][columns])
            apart[name].append(np.nanmax(gap, axis=1, initial=0))
    return {name: np.concatenate(parts) for name, parts in apart.items()}


def _in_units(outputs: Arrays, image: int, size: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    height, width = size
    for name, batch in outputs.items():
        value = batch[image].astype(np.float64)
        value = value.reshape(len(value), -1)
        if name in ("logits", "masks"):
            value = 1 / (1 + np.exp(-value.clip(-50, 50)))
        elif name == "boxes" and "scores" in outputs:
            value = value / [width, height, width, height]
        elif name == "keypoints" and "scores" in outputs:
            value = value / np.tile([width, height, 1], value.shape[1] // 3)
        elif name == "keypoint_covariance":
            value = value / (height * width)
        yield name, value


def _stacked(outputs: Values, names: Sequence[str]) -> np.ndarray:
    return np.concatenate([outputs[name] for name in names], axis=1)
