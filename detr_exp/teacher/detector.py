"""A trained detector as the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from detr_exp import build
from detr_exp.config.mistakes import ConfigError
from detr_exp.inference import detector
from detr_exp.inference.published import load_published
from detr_exp.loss.teacher import EdgeGrid
from detr_exp.model.member import Elastic
from detr_exp.protocols import Network, ShowingMaps
from detr_exp.published.places import digests
from detr_exp.published.table import Entry, named, nearest
from detr_exp.tensor_files import refuse_non_finite
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.teaching import Seen


@runtime_checkable
class OnGrid(Protocol):
    """A decoder whose boxes are distributions of edges."""

    positions: Tensor
    edge_scale: float


class DetectorTeacher:
    """A detector of a run.

    Args:
        checkpoint: a file, the folder of a run (its best), the id of a run, or a name of the table of weights.
        weights: "ema" or "raw"; None: those of the file; the averaged ones of a training checkpoint.
        threshold: score above which a detection is a target where no object is.
        allow_targets: user-defined packages that its config may name.

    Raises:
        ValueError: the checkpoint cannot be opened.
    """

    def __init__(
        self, *, checkpoint: str, weights: str | None, threshold: float, allow_targets: Sequence[str] = ()
    ) -> None:
        if not str(checkpoint).strip():
            raise ConfigError("teacher.checkpoint is empty; give a run or a checkpoint: teacher.checkpoint=outputs/...")
        plain = build.hardware(build.compose(["trainer/hardware=cpu", "trainer.hardware.products=torch"]))
        plain = replace(plain, threads=torch.get_num_threads())
        entry = _published(str(checkpoint), weights)
        try:
            if entry is not None:
                opened = load_published(entry, plain)
            else:
                opened = detector.load(checkpoint, hardware=plain, allow_targets=allow_targets, weights=weights)
        except ValueError as error:
            raise ConfigError(f"the teacher, teacher.checkpoint={checkpoint}, cannot be opened: {error}") from error
        self.network = frozen(opened.network)
        held = {name: parameter.detach() for name, parameter in cast("nn.Module", opened.network).named_parameters()}
        refuse_non_finite(held, opened.path, "; give another teacher: teacher.checkpoint=...")
        self.channels = len(opened.network.pixel_mean)
        self.record = {"teacher": str(checkpoint), "sha256": digests(opened.path)["sha256"]}
        self.image_size: tuple[int, int] | None = opened.network.image_size
        self.classes, self.activation, self.threshold = opened.classes, opened.network.activation, threshold
        self.map_channels: list[int] = []
        self.map_strides: list[int] = []
        if isinstance(opened.network, ShowingMaps):
            opened.network.shows_maps = True
            self.map_channels, self.map_strides = opened.network.map_channels, opened.network.map_strides

    @property
    def edge_grid(self) -> EdgeGrid | None:
        """Of its decoder, on its device."""
        decoder = next((module for module in self.network.modules() if isinstance(module, OnGrid)), None)
        return None if decoder is None else EdgeGrid(decoder.positions, decoder.edge_scale)

    def place(self, hardware: Hardware) -> None:
        """Move it to the device of the training."""
        self.network = frozen(replace(hardware, gradient_checkpointing=False).place(self.network))

    def __call__(self, images: Tensor, padding_mask: Tensor | None, *, detects: bool) -> Seen:
        """See `trainer.teaching.Teacher`; maps alone need no decoder."""
        if not detects and isinstance(self.network, Elastic):
            return Seen(None, self.network.encode(images, padding_mask)[: len(self.map_channels)])
        outputs = self.network(images, padding_mask=padding_mask)
        return Seen(outputs.pred, outputs.maps)


def _published(word: str, weights: str | None) -> Entry | None:
    """The row of the table of weights that is meant; None: a run or a file.

    Raises:
        ConfigError: it is a backbone, or one kind of its weights is asked for; or the word is almost a name.
    """
    if Path(word).expanduser().exists():
        return None
    entry = named(word)
    if entry is None:
        if near := nearest(word, "detector"):
            raise ConfigError(
                f"teacher.checkpoint={word} is not a file, a run, or the name of published weights; did you mean "
                + " or ".join(f"teacher.checkpoint={name}" for name in near)
            )
        return None
    if entry.kind != "detector":
        raise ConfigError(
            f"teacher.checkpoint={word} are weights of a {entry.kind}, which detects nothing; choose those of a "
            "detector, python -m detr_exp.weights list, or let maps teach: teacher=timm teacher.name=..."
        )
    if weights is not None:
        raise ConfigError(f"teacher.weights is {weights}, but {word} is one kind of weights: teacher.weights=null")
    return entry


def frozen(network: Network) -> Network:
    """A network in evaluation mode, without gradients."""
    assert isinstance(network, nn.Module)
    return network.eval().requires_grad_(False)
