"""COCO metrics of a split, for boxes, masks and keypoints, from detections given batch by batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr_exp.metric import backend as protocol
from detr_exp.metric.operating_point import OperatingPoint, best_common_threshold, best_threshold
from detr_exp.structures import Detections
from detr_exp.values import Values

PREFIX = {"bbox": "", "segm": "segm_", "keypoints": "keypoint_"}
OFFICIAL = 100  # detections per image and category in the official protocol
OFFICIAL_KEYPOINTS = 20


@dataclass
class ImageDetections:
    """The detections of one image, compact and in host memory, so that ranks can exchange them.

    Attributes:
        scores: `[n]`.
        labels: `[n]`.
        boxes: `[n, 4]` float64, x, y, width, height in pixels.
        masks: run-length codes, or None.
        keypoints: `[n, K, 3]`, or None.
        nonfinite: number of predictions that were not finite and were dropped.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: list[Values] | None
    keypoints: np.ndarray | None
    nonfinite: int = 0


class CocoMetric:
    """Average precision and recall of one split by the COCO protocol (https://cocodataset.org/#detection-eval).

    Args:
        truth: the ground truth: images, annotations and categories as in a COCO file, with the original category ids.
        category_ids: the category of every label.
        classes: the name of every label.
        iou_types: what is compared: `bbox`, `segm`, `keypoints`.
        keypoint_sigmas: with `keypoints`, per label the standard deviations of its points relative to the object's
            scale; empty for a class without points.
        backend: `pycocotools`, or `fast` for a package that computes the same numbers faster where it is installed.
        eval_max_dets: besides the official limit of 100 detections per image and category, `*_max_dets` metrics
            are computed with this one (a detector of 300 queries is not cut by 500).

    Attributes:
        images: the detections since `reset`, by image id.

    Raises:
        ValueError: ground truth and settings do not fit.
    """

    def __init__(
        self,
        *,
        truth: Values,
        category_ids: Sequence[int],
        classes: Sequence[str],
        iou_types: Sequence[str] = ("bbox",),
        keypoint_sigmas: Sequence[Sequence[float]] | None = None,
        backend: str = "pycocotools",
        eval_max_dets: int = 500,
    ) -> None:
        if eval_max_dets < 1:
            raise ValueError(f"metric.eval_max_dets is {eval_max_dets}; it must be >= 1: metric.eval_max_dets=500")
        if "keypoints" in iou_types and keypoint_sigmas is None:
            raise ValueError("keypoints are to be evaluated but the data set defines none; use data with keypoints")
        self.category_ids, self.classes = list(category_ids), list(classes)
        self.iou_types, self.sigmas = tuple(iou_types), keypoint_sigmas
        self.backend, self.eval_max_dets = backend, eval_max_dets
        self.image_info = {image["id"]: image for image in truth["images"]}
        self.categories = [{"id": c, "name": name} for c, name in zip(self.category_ids, self.classes)]
        self.truth = self._index(_completed(truth["annotations"], set(self.category_ids), self.iou_types))
        self.images: dict[int, ImageDetections] = {}
        self.curves: dict[str, protocol.Curves] = {}

    def reset(self) -> None:
        self.images.clear()
        self.curves.clear()

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detections of some images; those of an image seen before are replaced.

        Raises:
            ValueError: for an image that is not in the ground truth.
        """
        for image_id, given in zip(image_ids, detections, strict=True):
            if image_id not in self.image_info:
                raise ValueError(
                    f"image {image_id} is not in the ground truth of this split; evaluate the split it belongs to"
                )
            found = self._annotated(image_id, given.finite())
            self.images[image_id] = ImageDetections(
                scores=_host(found.scores).astype(float),
                labels=_host(found.labels),
                boxes=_xywh(_host(found.boxes).astype(float)),
                masks=encode(found.masks) if found.masks is not None and "segm" in self.iou_types else None,
                keypoints=_host(found.keypoints).astype(float) if found.keypoints is not None else None,
                nonfinite=len(given) - len(given.finite()),
            )

    def _annotated(self, image_id: int, found: Detections) -> Detections:
        """The detections of classes that are annotated in an image: others are neither right nor wrong."""
        if (annotated := self.image_info[image_id].get("annotated")) is None:
            return found
        known = torch.tensor([number in annotated for number in self.category_ids], dtype=torch.bool)
        return found.kept(known.to(found.labels.device)[found.labels])

    def merge(self, gather: Callable[[dict[int, ImageDetections]], list[dict[int, ImageDetections]]]) -> None:
        """Add the detections of the other ranks; see `protocols.Metric`."""
        parts = gather(self.images)
        if len(parts) > 1:
            self.images = dict(sorted(item for part in parts for item in part.items()))

    def compute(self) -> dict[str, float]:
        """All metrics of the detections so far.

        Returns:
            `mAP`, `mAP50`, `mAP75`, `mAP_small/medium/large`, `mAR` and its variants, `F1`, `precision`, `recall` at
            the common `F1_threshold`, `AP/<class>`; with `segm_` or `keypoint_` before them for masks and keypoints.
            As in the official tool, -1 where the ground truth has no such object. `nonfinite` counts the predictions
            that were dropped because they are not finite.
        """
        values: dict[str, float] = {}
        for iou_type in self.iou_types:
            curves = self.curves[iou_type] = self._curves(iou_type)
            summary = _keypoint_summary(curves) if iou_type == "keypoints" else self._summary(curves)
            point = best_common_threshold(curves.matches, curves.objects.tolist())
            summary |= {"F1": point.f1, "precision": point.precision, "recall": point.recall}
            summary["F1_threshold"] = point.threshold
            summary |= {f"AP/{name}": row["AP"] for name, row in zip(self.metric_names(), self.table(iou_type))}
            values |= {PREFIX[iou_type] + name: value for name, value in summary.items()}
        return values | {"nonfinite": float(sum(found.nonfinite for found in self.images.values()))}

    def table(self, iou_type: str = "bbox") -> list[Values]:
        """One row per label: class, objects, AP, AP50, AR, and F1, precision, recall at the best `threshold`.

        Valid after `compute`.
        """
        curves = self.curves[iou_type]
        limit = 0 if iou_type == "keypoints" else self.limits.index(OFFICIAL)
        rows = []
        for label, category in enumerate(self.category_ids):
            k = sorted(self.category_ids).index(category)
            point: OperatingPoint = best_threshold(*curves.matches[k], int(curves.objects[k]))
            rows.append(
                {
                    "class": self.classes[label],
                    "objects": int(curves.objects[k]),
                    "AP": _mean(curves.precision[:, :, k, 0, limit]),
                    "AP50": _mean(curves.precision[0, :, k, 0, limit]),
                    "AR": _mean(curves.recall[:, k, 0, limit]),
                    **point._asdict(),
                }
            )
        return rows

    def operating_points(self) -> dict[str, list[Values]]:
        """Per task and class the threshold with the best F1, and F1, precision and recall there.

        Empty before `compute`, and on ranks that do not compute.
        """
        kept = ("class", *OperatingPoint._fields)
        return {task: [{name: row[name] for name in kept} for row in self.table(task)] for task in self.curves}

    def metric_names(self) -> list[str]:
        """Class names that every metrics store accepts: without `/ @ % ( )`, and unique."""
        names: list[str] = []
        for label, name in enumerate(self.classes):
            plain = re.sub(r"[^\w.\- ]", "_", name).strip(". ")[:100] or f"class_{label}"
            names.append(plain if plain not in names else f"{plain}_{label}")
        return names

    @property
    def limits(self) -> list[int]:
        return sorted({1, 10, OFFICIAL, self.eval_max_dets})

    def _curves(self, iou_type: str) -> protocol.Curves:
        ids = sorted(self.category_ids)
        detections = self.detections(iou_type)
        if iou_type in ("bbox", "segm"):
            return protocol.evaluate(self.backend, self.truth, detections, iou_type, ids, self.limits)
        assert self.sigmas is not None
        # an evaluation compares objects with one set of sigmas, so each set has its own
        by_sigmas: dict[tuple[float, ...], list[int]] = {}
        for category, sigmas in sorted(zip(self.category_ids, self.sigmas)):
            by_sigmas.setdefault(tuple(sigmas), []).append(category)
        parts: dict[int, tuple[protocol.Curves, int]] = {}
        for sigmas, group in by_sigmas.items():
            if sigmas:
                limits = [OFFICIAL_KEYPOINTS]
                part = protocol.evaluate(self.backend, self.truth, detections, iou_type, group, limits, sigmas)
                parts |= {category: (part, k) for k, category in enumerate(group)}
        return _joined(parts, ids)

    def detections(self, iou_type: str) -> protocol.Indexed:
        """The detections since `reset`, in the format of the protocol."""
        if iou_type == "bbox":
            return protocol.index_boxes(self.backend, self.truth, self._rows())
        return self._index(self._results(iou_type))

    def _index(self, annotations: list[Values]) -> protocol.Indexed:
        images = list(self.image_info.values())
        dataset = {"info": {}, "images": images, "categories": self.categories, "annotations": annotations}
        return protocol.index(self.backend, dataset)

    def _rows(self) -> np.ndarray:
        """Box detections as `[N, 7]`: image id, x, y, width, height, score, category id."""
        found = list(self.images.values())
        if not found:
            return np.zeros((0, 7))
        ids = np.repeat(list(self.images), [len(f.scores) for f in found])
        boxes, scores, labels = (np.concatenate([getattr(f, n) for f in found]) for n in ("boxes", "scores", "labels"))
        return np.column_stack([ids, boxes, scores, np.array(self.category_ids)[labels]])

    def _results(self, iou_type: str) -> list[Values]:
        """Masks or poses as annotations; `area` is that of the mask, or of the box of the points."""
        results: list[Values] = []
        for image_id, found in self.images.items():
            if (found.masks if iou_type == "segm" else found.keypoints) is None:
                raise ValueError(
                    f"{iou_type} is to be evaluated, but the network has none; use a model or a metric for the task"
                )
            for i, (score, label, box) in enumerate(zip(found.scores.tolist(), found.labels, found.boxes.tolist())):
                result = {"id": len(results) + 1, "image_id": image_id, "score": score, "bbox": box, "iscrowd": 0}
                result["category_id"] = self.category_ids[label]
                if found.masks is not None and iou_type == "segm":
                    result |= {"segmentation": found.masks[i], "area": _rle_area(found.masks[i])}
                elif found.keypoints is not None:
                    result |= self._pose(found.keypoints[i], label)
                results.append(result)
        return results

    def _pose(self, points: np.ndarray, label: int) -> Values:
        assert self.sigmas is not None
        points = points[: len(self.sigmas[label])]
        extent = np.ptp(points[:, :2], axis=0) if len(points) else np.zeros(2)
        return {"keypoints": points.reshape(-1).tolist(), "area": float(extent.prod())}

    def _summary(self, curves: protocol.Curves) -> dict[str, float]:
        """The twelve official numbers and those without the official limit."""
        precision, recall = curves.precision, curves.recall
        at = {limit: m for m, limit in enumerate(self.limits)}
        official, widest = at[OFFICIAL], at[self.eval_max_dets]
        values = {
            "mAP": _mean(precision[:, :, :, 0, official]),
            "mAP50": _mean(precision[0, :, :, 0, official]),
            "mAP75": _mean(precision[5, :, :, 0, official]),
            "mAR": _mean(recall[:, :, 0, official]),
            "mAR_1": _mean(recall[:, :, 0, at[1]]),
            "mAR_10": _mean(recall[:, :, 0, at[10]]),
            "mAP_max_dets": _mean(precision[:, :, :, 0, widest]),
            "mAP50_max_dets": _mean(precision[0, :, :, 0, widest]),
            "mAR_max_dets": _mean(recall[:, :, 0, widest]),
        }
        for a, size in enumerate(("small", "medium", "large"), start=1):
            values[f"mAP_{size}"] = _mean(precision[:, :, :, a, official])
            values[f"mAR_{size}"] = _mean(recall[:, :, a, official])
        return values


def encode(masks: Tensor) -> list[Values]:
    """Run-length codes of masks `[n, H, W]` bool."""
    from pycocotools import mask as codec

    # run lengths go down the columns: transpose on the masks' device, then read the same memory as [H, W, n]
    columns = np.ascontiguousarray(_host(masks.transpose(1, 2).contiguous())).view(np.uint8)
    return codec.encode(columns.transpose(2, 1, 0))


def _keypoint_summary(curves: protocol.Curves) -> dict[str, float]:
    precision, recall = curves.precision[..., 0], curves.recall[..., 0]
    return {
        "mAP": _mean(precision[:, :, :, 0]),
        "mAP50": _mean(precision[0, :, :, 0]),
        "mAP75": _mean(precision[5, :, :, 0]),
        "mAP_medium": _mean(precision[:, :, :, 1]),
        "mAP_large": _mean(precision[:, :, :, 2]),
        "mAR": _mean(recall[:, :, 0]),
    }


def _joined(parts: dict[int, tuple[protocol.Curves, int]], category_ids: list[int]) -> protocol.Curves:
    """The curves of several evaluations combined, in the order of `category_ids`; -1 for classes without points."""
    precision = np.full((10, 101, len(category_ids), 3, 1), -1.0)
    recall = np.full((10, len(category_ids), 3, 1), -1.0)
    matches = [(np.zeros(0), np.zeros(0, dtype=bool)) for _ in category_ids]
    objects = np.zeros(len(category_ids), dtype=int)
    for place, category in enumerate(category_ids):
        if category in parts:
            part, k = parts[category]
            precision[:, :, place], recall[:, place] = part.precision[:, :, k], part.recall[:, k]
            matches[place], objects[place] = part.matches[k], part.objects[k]
    return protocol.Curves(precision, recall, matches, objects)


def _completed(annotations: Sequence[Values], category_ids: set[int], iou_types: tuple[str, ...]) -> list[Values]:
    """Copies of the annotations with every field that the protocol reads.

    Ids are renumbered from 1: the protocol treats an object with id 0 as not matched. `number` is the one given.
    """
    completed: list[Values] = []
    for annotation in annotations:
        if annotation["category_id"] not in category_ids:
            continue
        width, height = annotation["bbox"][2:]
        number = annotation.get("id")
        copy = {"iscrowd": 0, "area": width * height, **annotation, "id": len(completed) + 1, "number": number}
        if "segm" in iou_types and not copy.get("segmentation"):
            raise ValueError(
                f"annotation {annotation.get('id')} of image {annotation['image_id']} has no mask, but masks are to be "
                "evaluated; add its segmentation, or use a model without masks"
            )
        if "keypoints" in iou_types:
            points = copy.setdefault("keypoints", [])
            copy.setdefault("num_keypoints", sum(visible > 0 for visible in points[2::3]))
        completed.append(copy)
    return completed


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not -1; -1 if there are none."""
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0


def _xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _rle_area(code: Values) -> float:
    from pycocotools import mask as codec

    return float(codec.area(code))
