"""A teacher in a training: what it says about a batch, and the projection between the maps of both encoders.

The teacher is frozen, in evaluation mode, and no part of the trained network: neither checkpoints nor averages nor
exports contain it. It sees the images of each step at its own size and with its own normalisation.

The projection is trained with the network, and no part of it either: only checkpoints to resume from have it.

Legend: B images, C logits of the student, D channels of a map.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from detr_exp.data.fit import sizes_of, written
from detr_exp.loss.criterion import SetCriterion
from detr_exp.loss.stacks import without_tasks
from detr_exp.loss.teacher import EdgeGrid, Maps, Taught, as_targets, in_our_classes
from detr_exp.loss.term import MAPS
from detr_exp.model.member import Member
from detr_exp.ops.resize import resized
from detr_exp.protocols import Network, ShowingMaps
from detr_exp.structures import Batch, Outputs, Prediction, Targets
from detr_exp.trainer.evaluation import as_float32
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.parallel import parallel
from detr_exp.trainer.precision import Precision
from detr_exp.trainer.teacher_cache import Caching, TeacherCache

UNUSED = "unused_"  # names of labels without a category begin with this


class Seen(NamedTuple):
    """What a teacher makes of images.

    Attributes:
        prediction: logits `[B, Q, C']` and boxes `[B, Q, 4]` of its last layer; None: it detects nothing.
        maps: `[B, D, h, w]` of each level, ascending strides; None: it shows none.
    """

    prediction: Prediction | None
    maps: list[Tensor] | None


class Teacher(Protocol):
    """A frozen network that others are trained by."""

    record: dict[str, str]  # which one it is: `teacher`, the word for it, and `sha256` of its file if it has one
    image_size: tuple[int, int] | None  # of the images it sees; None: those of the training
    classes: list[str]  # a name for each label; empty: it detects nothing
    activation: str
    threshold: float  # score above which a detection is a target
    edge_grid: EdgeGrid | None  # of its distributions of edges
    map_channels: list[int]  # of each map; empty: it shows none
    map_strides: list[int]  # ascending

    def place(self, hardware: Hardware) -> None:
        """Move it to the device of the training."""

    def __call__(self, images: Tensor, padding_mask: Tensor | None, *, detects: bool) -> Seen:
        """What it makes of images, without gradient.

        Args:
            images: `[B, 3, H, W]` RGB in 0..1.
            padding_mask: `[B, H, W]` bool, True where there is no image.
            detects: whether its prediction is asked for, and not its maps alone.
        """


@runtime_checkable
class Keeping(Protocol):
    """A teacher that is the largest member of the trained network."""

    def keep(self, outputs: Outputs) -> None:
        """Keep what the largest member predicts, for the smaller ones."""


class Projection(nn.Module):
    """A 1x1 convolution for each map of a network, to the channels of the teacher's map; none where they are equal."""

    def __init__(self, channels: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1, bias=False) for ours, theirs in channels
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps `[B, D, h, w]` -> the same with the teacher's channels."""
        return [level(part) for level, part in zip(self.levels, maps, strict=True)]


@dataclass
class Teaching:
    """A teacher and what connects it with a network.

    Attributes:
        teacher: frozen.
        criterion: its terms against the teacher decide what is computed.
        columns: the teacher's label for each of the network's classes, -1 where it has none.
        levels: for each of the network's maps, the index of the teacher's.
        projection: None if no maps are compared.
        caching: whether what the teacher makes of an image is kept.
        kept: that, once it is on its device.
        seconds: of CPU time of the teacher since the last line of the log.
        step_seconds: the same of whole steps.
    """

    teacher: Teacher
    criterion: SetCriterion
    columns: list[int]
    levels: list[int]
    projection: Projection | None
    caching: Caching
    kept: TeacherCache | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0
    forward: nn.Module | None = field(default=None, repr=False)

    def __call__(
        self, batch: Batch, images: Tensor, outputs: Outputs, precision: Precision, member: Member | None = None
    ) -> Taught | None:
        """What the teacher says about a batch; None to the largest member, if that is the teacher.

        Args:
            batch: on the device.
            images: its pixels, `[B, 3, H, W]` in 0..1, at their own size also where a member sees smaller ones.
            outputs: of the network that is trained.
            precision: of the training, which the teacher shares.
            member: of the network, as which it has computed the outputs; None: whole.
        """
        if isinstance(self.teacher, Keeping) and member in (None, Member()):
            self.teacher.keep(outputs)
            return None
        began = time.process_time()
        with torch.no_grad(), precision.autocast():
            size = self.teacher.image_size or (member or Member()).image_size
            seen = self._seen(batch, *resized(images, batch.padding_mask, size))
        prediction, theirs = as_float32(seen.prediction), as_float32(seen.maps)
        with torch.no_grad():
            nothing = Targets(batch.targets.labels[:0], batch.targets.boxes[:0], (0,) * len(batch))
            targets = nothing if prediction is None else self._targets(prediction, batch)
        maps = None
        if self.projection is not None and theirs is not None:
            assert outputs.maps is not None
            with precision.autocast():
                ours = (self.forward or self.projection)(outputs.maps)
            maps = Maps(as_float32(ours), [theirs[level] for level in self.levels])
        self.seconds += time.process_time() - began
        return Taught(targets, maps)

    def _seen(self, batch: Batch, images: Tensor, padding_mask: Tensor | None) -> Seen:
        def see(images: Tensor, padding_mask: Tensor | None) -> Seen:
            seen = self.teacher(images, padding_mask, detects=bool(self.columns))
            prediction = None if seen.prediction is None or not self.columns else without_tasks(seen.prediction)
            return Seen(prediction, None if self.projection is None else seen.maps)

        if self.kept is None:
            return see(images, padding_mask)
        return self.kept.joined(see, batch, images, padding_mask)

    def _targets(self, prediction: Prediction, batch: Batch) -> Targets:
        ours = self.criterion.activation
        logits = in_our_classes(prediction.logits, self.columns, self.teacher.activation or ours, ours)
        prediction = prediction._replace(logits=logits)
        stacked = Prediction(logits[None], prediction.boxes[None])
        pairs = self.criterion.matcher([stacked], batch.targets, 1, {}, ())
        matched = pairs.image[0], pairs.query[0], pairs.target[0]
        return as_targets(prediction, matched, batch.targets, self.teacher.threshold, ours, self.teacher.edge_grid)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained beside the network's."""
        return [] if self.projection is None else list(self.projection.parameters())

    def place(self, hardware: Hardware) -> None:
        """Move all to the device."""
        self.teacher.place(hardware)
        parts = {"predictions": bool(self.columns), "maps": self.projection is not None}
        self.kept = replace(self.caching, settings=self.caching.settings | parts).opened(self.teacher.record, hardware)
        if self.projection is not None:
            self.projection.to(hardware.torch_device)

    def wrap(self, strategy: str) -> None:
        """Average gradients of the projection over the ranks, as those of the network."""
        if self.parameters and self.projection is not None:
            self.projection.zero_grad(set_to_none=True)  # of trial steps
            self.forward = parallel(self.projection, strategy)
        self.share_of_time()

    def share_of_time(self) -> float:
        """The teacher's share of the CPU time of the steps since the last call, in 0..1."""
        share = self.seconds / self.step_seconds if self.step_seconds else 0.0
        self.seconds = self.step_seconds = 0.0
        return share


def connected(
    teacher: Teacher,
    network: Network,
    classes: Sequence[str],
    criterion: SetCriterion,
    caching: Caching,
    fit: str | None = None,
) -> Teaching:
    """Connect a teacher with the network that it teaches.

    Args:
        teacher: see `Teacher`.
        network: to be trained; is made to show its maps where the losses compare them.
        classes: names of the network's classes.
        criterion: of the training.
        caching: of what the teacher makes of images.
        fit: of images to the network's input.

    Raises:
        ValueError: the losses compare what one of both has not, or the teacher lacks a class.
    """
    names = criterion.of("teacher")
    of_maps = [name for name in names if MAPS in criterion.terms[name].at]
    of_queries = [name for name in names if name not in of_maps]
    word = teacher.record["teacher"]
    if not names:
        raise ValueError(
            f"teacher is {word}, but the loss has no terms against a teacher; choose some: loss/teacher=detr, or "
            "loss/teacher=maps for the maps of the encoder alone"
        )
    if isinstance(teacher, Keeping) and caching.where != "none":
        raise ValueError(
            f"teacher.cache is {caching.where}, but the teacher is {word}, which changes in each step: "
            "teacher.cache=none"
        )
    if isinstance(teacher, Keeping) and not of_maps:
        return Teaching(teacher, criterion, list(range(len(classes))), [], None, caching)
    shapes = "data.fit=short_side" if fit == "short_side" else sizes_of(network) and "model.image_size"
    if shapes and teacher.image_size is not None:
        one = "data.fit=letterbox" if fit == "short_side" else f"model.image_size={written([network.image_size])}"
        raise ValueError(
            f"the teacher {word} sees images of {list(teacher.image_size)}, but {shapes} makes batches of several "
            f"shapes; use {one}, or teacher=none"
        )
    channels = getattr(teacher, "channels", 3)
    if not isinstance(teacher, Keeping) and channels != len(network.pixel_mean):
        raise ValueError(
            f"the teacher {word} sees {channels} channels of an image, but data.channels is {len(network.pixel_mean)}; "
            "choose one that was trained on the same: teacher.checkpoint=..., or none: teacher=none"
        )
    if of_queries and not teacher.classes:
        raise ValueError(
            f"the teacher {word} detects nothing, but loss.terms.{of_queries[0]} needs detections; compare maps alone: "
            "loss/teacher=maps"
        )
    columns = _columns(teacher, classes) if of_queries else []
    if not of_maps:
        return Teaching(teacher, criterion, columns, [], None, caching)
    without = f"leave them out: ~loss.terms.{of_maps[0]}" if of_queries else "use another one"
    if not isinstance(network, ShowingMaps):
        raise ValueError(
            f"loss.terms.{of_maps[0]} compares the maps of the encoder, but {type(network).__name__} shows none (it "
            f"has no shows_maps, map_channels and map_strides); {without}"
        )
    if not teacher.map_channels:
        raise ValueError(f"loss.terms.{of_maps[0]} needs maps, but the teacher {word} shows none; {without}")
    network.shows_maps = True
    levels = [_nearest(stride, teacher.map_strides) for stride in network.map_strides]
    channels = [(ours, teacher.map_channels[level]) for ours, level in zip(network.map_channels, levels)]
    return Teaching(teacher, criterion, columns, levels, Projection(channels), caching)


def refuse_absent(criterion: SetCriterion) -> None:
    """Raises: ValueError when losses compare with a teacher although there is none."""
    if names := criterion.of("teacher"):
        raise ValueError(
            f"loss.terms.{names[0]} compares with a teacher, but there is none; give one, teacher=run "
            "teacher.checkpoint=..., or leave such terms out: loss/teacher=none"
        )


def _nearest(stride: int, strides: Sequence[int]) -> int:
    return min(range(len(strides)), key=lambda level: max(stride, strides[level]) / min(stride, strides[level]))


def _columns(teacher: Teacher, classes: Sequence[str]) -> list[int]:
    """The teacher's label for each class, by name; -1 for labels without a category.

    Raises:
        ValueError: the teacher lacks a class.
    """
    if list(classes) == teacher.classes:
        return list(range(len(classes)))
    exact = {name: label for label, name in enumerate(teacher.classes)}
    folded = {name.casefold(): label for label, name in enumerate(teacher.classes)}
    found = [exact.get(name, folded.get(name.casefold(), -1)) for name in classes]
    if lacking := [name for name, label in zip(classes, found) if label < 0 and not name.startswith(UNUSED)]:
        raise ValueError(
            f"the teacher {teacher.record['teacher']} knows {_some(teacher.classes)}, but the data have "
            f"{_some(lacking)} as well; it must know all classes of the data by name: give a teacher that was trained "
            "on them, teacher.checkpoint=..., or compare maps alone, loss/teacher=maps"
        )
    return found


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
