"""A checkpoint on data: its own or others, whose classes are matched by name. The one opener of every command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from detr_exp import build
from detr_exp.config.stored import literal
from detr_exp.data.collate import Sample
from detr_exp.data.dataset import DataSet
from detr_exp.inference.detector import Detector, load, of_this_version
from detr_exp.protocols import Labels, Metric
from detr_exp.structures import Batch, Detections
from detr_exp.terminal import say
from detr_exp.trainer.evaluation import evaluate


def open_detector(cfg: DictConfig, checkpoint: str | Path | None = None, *, compiled: bool = False) -> Detector:
    """The checkpoint that a command names, on the hardware it names.

    Args:
        cfg: of the command: `checkpoint`, `trainer.hardware` (null: the checkpoint's), `allow_targets`, and `weights`
            where the command has such a choice.
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
    )


@dataclass
class OnData:
    """A detector beside data.

    Attributes:
        detector: the checkpoint.
        cfg: its config with what the command line says about data and metric.
        data: the data set.
    """

    detector: Detector
    cfg: DictConfig
    data: DataSet

    def metric(self, split: str) -> Metric:
        """A metric with the truth of a split, for the labels of the network.

        Raises:
            ValueError: network and data have no class in common.
        """
        ids = category_ids_by_name(self.detector, self.data)
        return build.metric(self.cfg, self.data, self.detector.network, ids)(split)

    def loader(self, split: str, batch_size: int | None = None) -> DataLoader[Sample]:
        """Batches of a split; of the size that the training evaluated with unless told otherwise."""
        size = batch_size or self.detector.batch_size
        return self.data.loader(split, network=self.detector.network, batch_size=size, seed=self.detector.cfg.seed)

    def evaluate(
        self, loader: Iterable[Batch], metric: Metric, on_batch: Callable[[Batch, list[Detections]], None] | None = None
    ) -> dict[str, float]:
        """All metrics of the network on the batches of a loader; see `trainer.evaluation.evaluate`."""
        return evaluate(self.detector.network, loader, metric, self.detector.precision, on_batch=on_batch)


def on_data(detector: Detector, cfg: DictConfig) -> OnData:
    """A detector beside the data that a command names, or its own.

    Args:
        detector: see `open_detector`.
        cfg: of the command: `data`, and `metric` where it has such a choice.

    Raises:
        ValueError: the data cannot be read.
    """
    told = combined(detector.cfg, cfg)
    with of_this_version(detector.path):
        return OnData(detector, told, build.data(told))


def combined(trained: DictConfig, cfg: DictConfig) -> DictConfig:
    """The config of the checkpoint with what the command line says about data and metric."""
    told = trained.copy()
    said = literal(OmegaConf.to_container(cfg.data, resolve=True))
    del said["split"]
    if "_target_" in said:
        told.data = said
    else:
        # the number of classes is that of the data, which may be others than those trained on
        given = {name: value for name, value in said.items() if value is not None}
        told.data = OmegaConf.merge(told.data, given, {"num_classes": None})
    if OmegaConf.select(cfg, "metric") is not None:
        told.metric = cfg.metric
    return told


def category_ids_by_name(detector: Detector, data: Labels) -> list[int]:
    """The data set's category id for every label of the network, by the names of the classes.

    Labels that the data do not have get ids that do not occur; classes that the network does not know are left out
    of the evaluation, which is said.

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
