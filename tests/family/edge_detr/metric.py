"""An evaluator that is not COCO's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from detr_exp.structures import Detections


class CentreRecall:
    """The share of objects with a detection of their class near their centre; the members of `protocols.Metric`.

    Args:
        truth: COCO-style dict of the split.
        category_ids: of every label.
        classes: a name per label.
        iou_types: what the network predicts.
        keypoint_sigmas: of its keypoints.
        radius: in pixels.
    """

    def __init__(
        self,
        *,
        truth: dict[str, Any],
        category_ids: Sequence[int],
        classes: Sequence[str],
        iou_types: Sequence[str],
        keypoint_sigmas: object,
        radius: float,
    ) -> None:
        self.radius = radius
        self.objects: dict[int, list[tuple[int, float, float]]] = {image["id"]: [] for image in truth["images"]}
        label_of = {number: label for label, number in enumerate(category_ids)}
        for one in truth["annotations"]:
            x, y, width, height = one["bbox"]
            self.objects[one["image_id"]].append((label_of[one["category_id"]], x + width / 2, y + height / 2))
        self.reset()

    def reset(self) -> None:
        self.found: dict[int, list[bool]] = {}

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        for number, one in zip(image_ids, detections):
            centres = (one.boxes[:, :2] + one.boxes[:, 2:]) / 2
            self.found[number] = [
                bool((((centres - torch.tensor([x, y])).norm(dim=1) < self.radius) & (one.labels == label)).any())
                for label, x, y in self.objects[number]
            ]

    def merge(self, gather: Callable[[dict[int, list[bool]]], list[dict[int, list[bool]]]]) -> None:
        self.found = {number: found for part in gather(self.found) for number, found in part.items()}

    def compute(self) -> dict[str, float]:
        every = [is_found for image in self.found.values() for is_found in image]
        return {"recall": sum(every) / max(1, len(every)), "objects": float(len(every))}
