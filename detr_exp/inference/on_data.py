"""A checkpoint with the data set of its training or another, whose classes are matched by name; for all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from detr_exp import build
from detr_exp.config.keys import SELECTION
from detr_exp.config.stored import literal
from detr_exp.data.collate import Sample
from detr_exp.data.dataset import DataSet
from detr_exp.inference.detector import Detector, load, of_this_version
from detr_exp.protocols import Labels, Metric
from detr_exp.structures import Batch, Detections
from detr_exp.terminal import say
from detr_exp.trainer.evaluation import Part, evaluate, parts_of


def open_detector(cfg: DictConfig, checkpoint: str | Path | None = None, *, compiled: bool = False) -> Detector:
    """The checkpoint of a command, on the hardware of the command.

    Args:
        cfg: of the command: `checkpoint`, `trainer.hardware` (null: the checkpoint's), `allow_targets`, and `weights`
            and `at` where the command has these keys.
        checkpoint: instead of `cfg.checkpoint`.
        compiled: see `inference.detector.load`.

    Raises:
        ValueError: see `inference.detector.load`.
    """
    return load(
        cfg.checkpoint if checkpoint is None else checkpoint,
        hardware=build.hardware(cfg) if OmegaConf.select(cfg, "trainer.hardware") is not None else None,
        allow_targets=cfg.allow_targets,
        weights=cfg.get("weights"),
        compiled=compiled,
        at=cfg.get("at"),
    )


@dataclass
class OnData:
    """A detector and a data set.

    Attributes:
        detector: the checkpoint.
        cfg: its config with the data and metric of the command line.
        data: the data set; with the validation images in two halves where one of them has chosen the checkpoint.
    """

    detector: Detector
    cfg: DictConfig
    data: DataSet

    def metric(self, split: str) -> Metric:
        """A metric with the annotations of a split, for the labels of the network; see `metrics`."""
        return self.metrics(split, 1)[0]

    def metrics(self, split: str, count: int) -> list[Metric]:
        """As many metrics, each of which has detections of its own.

        Raises:
            ValueError: network and data have no class in common.
        """
        return [self._make_metric()(split) for _ in range(count)]

    def parts(self, split: str) -> dict[str, Part]:
        """The images of each of several data sets; see `trainer.evaluation.parts_of`."""
        return parts_of(self.data.split(split), partial(self._make_metric(), split))

    @cached_property
    def _category_ids(self) -> list[int]:
        return category_ids_by_name(self.detector, self.data)

    def _make_metric(self) -> Callable[..., Metric]:
        return build.metric(self.cfg, self.data, self.detector.network, self._category_ids)

    def loader(self, split: str, batch_size: int | None = None) -> DataLoader[Sample]:
        """Batches of a split; by default of the size that the training's evaluations used."""
        size = batch_size or self.detector.batch_size
        return self.data.loader(split, network=self.detector.network, batch_size=size, seed=self.detector.cfg.seed)

    def evaluate(
        self,
        loader: Iterable[Batch],
        metric: Metric,
        on_batch: Callable[[Batch, list[Detections]], None] | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> dict[str, float]:
        """All metrics of the network on the batches of a loader; see `trainer.evaluation.evaluate`."""
        return evaluate(self.detector.network, loader, metric, self.detector.precision, parts=parts, on_batch=on_batch)


def on_data(detector: Detector, cfg: DictConfig) -> OnData:
    """A detector with the data of a command, or those of its training.

    Args:
        detector: see `open_detector`.
        cfg: of the command: `data`, and `metric` where it has such a choice.

    Raises:
        ValueError: the data cannot be read.
    """
    merged = combined(detector.cfg, cfg)
    with of_this_version(detector.path):
        data = build.data(merged)
        if detector.cfg.metric.get(SELECTION) and data.fingerprint == detector.data_fingerprint:
            data = data.halved()
        return OnData(detector, merged, data.sampled())


def combined(trained: DictConfig, cfg: DictConfig) -> DictConfig:
    """The config of the checkpoint with the data and metric of the command line."""
    merged = trained.copy()
    data = literal(OmegaConf.to_container(cfg.data, resolve=True))
    del data["split"]
    if "_target_" in data:
        # the network has learned from images that were fitted and cut so
        as_trained = {name: data.get(name) or trained.data.get(name) for name in ("fit", "tiles")}
        merged.data = {**data, **as_trained, "channels": trained.data.get("channels", 3)}
    else:
        # the number of classes is that of the data, which may differ from those of the training
        changes = {name: value for name, value in data.items() if value is not None}
        merged.data = OmegaConf.merge(merged.data, changes, {"num_classes": None})
    if "val_sample" in merged.data:
        merged.data.val_sample = data.get("val_sample")  # that of a training is for its own evaluations
    if OmegaConf.select(cfg, "metric") is not None:
        merged.metric = cfg.metric
    return merged


def category_ids_by_name(detector: Detector, data: Labels) -> list[int]:
    """The data set's category id for every label of the network, by the names of the classes.

    Labels that the data do not have get unused ids; classes that the network does not know are not evaluated, and a
    message lists them.

    Raises:
        ValueError: no class has the same name.
    """
    if detector.classes == data.classes:
        return list(data.category_ids)
    id_of = {name.casefold(): number for name, number in zip(data.classes, data.category_ids)}
    shared = [name for name in detector.classes if name.casefold() in id_of]
    if not shared:
        raise ValueError(
            f"{detector.path} knows {_some(detector.classes)}, but the data set has {_some(data.classes)}: no name in "
            "common; evaluate data with the same classes: data=... data.root=..."
        )
    known = {name.casefold() for name in shared}
    unknown = [name for name in data.classes if name.casefold() not in known]
    say(f"classes are matched by name: {_some(shared)}" + (f"; left out: {_some(unknown)}" if unknown else ""))
    unused = max(data.category_ids) + 1
    return [id_of.get(name.casefold(), unused + label) for label, name in enumerate(detector.classes)]


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
