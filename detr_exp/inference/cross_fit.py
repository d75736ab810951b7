"""Detections of a split, each image by a checkpoint that was not trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from detr_exp import build
from detr_exp.data.content import Split
from detr_exp.inference.detector import Detector
from detr_exp.inference.on_data import OnData, on_data, open_detector
from detr_exp.metric.backend import CocoEvaluation
from detr_exp.protocols import Metric
from detr_exp.trainer.console import Console


@dataclass
class CrossFitted:
    """The detections of a split.

    Attributes:
        opened: the first checkpoint, with the data.
        metric: with the detections of all images, computed.
        values: of the metric.
        judges: for each image id the place of the checkpoint that judged it.
        seen: ids of images on which every checkpoint was trained, as far as is known.
    """

    opened: OnData
    metric: CocoEvaluation
    values: dict[str, float]
    judges: dict[int, int]
    seen: set[int]


def cross_fitted(cfg: DictConfig, checkpoints: Sequence[str]) -> CrossFitted:
    """Evaluate a split; with several checkpoints, each image by the first that was not trained on it.

    Args:
        cfg: of the command; see `on_data`.
        checkpoints: at least one. With several, the data of their trainings have to be readable.

    Raises:
        ValueError: there is none, one or its data cannot be read, or they have different classes.
    """
    split = cfg.data.split
    if not checkpoints:
        raise ValueError("checkpoint is an empty list; name a file, a run, or several of them: checkpoint=RUN_FOLDER")
    detectors = [open_detector(cfg, name) for name in checkpoints]
    for one in detectors[1:]:
        if one.classes != detectors[0].classes:
            raise ValueError(
                f"{one.path} has the classes {one.classes}, but {detectors[0].path} has {detectors[0].classes}; give "
                "folds of one data set: checkpoint=[...]"
            )
    opened = on_data(detectors[0], cfg)
    part = opened.data.split(split)
    judges, seen = _judges(detectors, opened, split)
    done: list[Metric] = []
    kept: list[CocoEvaluation] = []  # the same, as what they are besides
    values: dict[str, float] = {}
    for place, detector in enumerate(detectors):
        indices = [index for index, number in enumerate(part.image_ids) if judges[number] == place]
        if indices or not len(part):
            data = opened.data if len(indices) == len(part) else opened.data.only(split, indices)
            done.append(opened.metric(split))
            metric, values = _evaluated(OnData(detector, opened.cfg, data), done[-1], cfg)
            kept.append(metric)
    if len(done) > 1:
        done[0].merge(lambda images: [images, *(metric.images for metric in kept[1:])])
        values = done[0].compute()
    return CrossFitted(opened, kept[0], values, judges, seen)


def _evaluated(own: OnData, metric: Metric, cfg: DictConfig) -> tuple[CocoEvaluation, dict[str, float]]:
    """Those of one checkpoint on its part of the images.

    Raises:
        ValueError: the metric does not keep detections.
    """
    if not isinstance(metric, CocoEvaluation):
        raise ValueError(
            f"the metric of {own.detector.path} is a {type(metric).__name__}, which keeps no detections; use one that "
            "does: metric=pycocotools"
        )
    loader = own.loader(cfg.data.split, cfg.batch_size)
    with Console("rich").progress(f"evaluating {cfg.data.split}", len(loader)) as meter:
        return metric, own.evaluate(loader, metric, on_batch=lambda batch, detections: meter())


def _judges(detectors: Sequence[Detector], opened: OnData, split: str) -> tuple[dict[int, int], set[int]]:
    """The judge of each image, and the images that no checkpoint is new to."""
    part = opened.data.split(split)
    if len(detectors) == 1:
        same = opened.data.fingerprint == detectors[0].data_fingerprint
        return dict.fromkeys(part.image_ids, 0), set(part.image_ids) if split == "train" and same else set()
    trained = [_Images(build.data(one.cfg).split("train")) for one in detectors]
    judges, seen = {}, set()
    for index, number in enumerate(part.image_ids):
        judge = next((place for place, images in enumerate(trained) if part.name(index) not in images), None)
        judges[number] = judge or 0
        if judge is None:
            seen.add(number)
    return judges, seen


class _Images:
    """The images of a training, by path, or by content where they lie elsewhere."""

    def __init__(self, split: Split) -> None:
        self.paths = {str(Path(split.name(index)).resolve()) for index in range(len(split))}
        self.by_size: dict[int, list[Path]] = {}
        for path in map(Path, self.paths):
            if path.is_file():
                self.by_size.setdefault(path.stat().st_size, []).append(path)

    def __contains__(self, name: str) -> bool:
        path = Path(name).resolve()
        if str(path) in self.paths or not path.is_file():
            return str(path) in self.paths
        alike = self.by_size.get(path.stat().st_size, [])
        return any(one.read_bytes() == path.read_bytes() for one in alike)
