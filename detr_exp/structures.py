"""Data structures that the parts exchange: dataclasses as inputs, named tuples as outputs.

Legend: B images, T objects of the whole batch, Q queries, C logits per query, L decoder layers,
K keypoints, M matched pairs. Boxes are cxcywh in 0..1 of the image unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from detr_exp.tile import Tile

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Tree = TypeVar("Tree")
Record = TypeVar("Record", bound="DataclassInstance")


def mapped(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """A copy of a tree of named tuples, lists and mappings with its tensors changed.

    Other values do not change, nor does the bias of masks, which has no leading axes of layers and images.
    """
    made: Any = tree
    if isinstance(tree, Tensor):
        made = change(tree)
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        shared = ("bias",) if isinstance(tree, MaskLogits) else ()
        made = type(tree)(*(part if name in shared else mapped(part, change) for name, part in zip(tree._fields, tree)))
    elif isinstance(tree, (list, tuple)):
        made = type(tree)(mapped(part, change) for part in tree)
    elif isinstance(tree, dict):
        made = {name: mapped(part, change) for name, part in tree.items()}
    return made


def leaves(tree: object) -> Iterator[Tensor]:
    """The tensors that `mapped` changes, in order."""
    found: list[Tensor] = []
    mapped(tree, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return iter(found)


def predicted(prediction: object, name: str) -> Any:
    """A field of a prediction; None where it is None, or the network's type of predictions has no such field."""
    return getattr(prediction, name, None)


@dataclass
class Target:
    """Ground truth of one image, in the geometry the network sees.

    Attributes:
        labels: `[n]` int64, contiguous class indices.
        boxes: `[n, 4]` float32, cxcywh in 0..1.
        masks: `[n, H, W]` bool at the size of the network's input, or None.
        keypoints: `[n, K, 3]` float32 (x, y in 0..1, visibility 0/1/2; unlabelled points are all zero), or None.
        extra: `[n, ...]`, by name: further data of the objects, for user-defined loss terms.
        image_extra: `[...]`, by name: further data of the whole image.
        annotated: `[K]` bool, the classes that are annotated in this image; None: all.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    image_extra: dict[str, Tensor] = field(default_factory=dict)
    annotated: Tensor | None = None

    def kept(self, keep: Tensor) -> Target:
        """Select objects, with all their fields.

        Args:
            keep: `[n]` bool, or the indices of the objects in their new order.
        """
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("image_extra", "annotated")}
        return replace(self, **{name: mapped(part, lambda tensor: tensor[keep]) for name, part in parts.items()})


@dataclass
class Targets:
    """Ground truth of a batch, packed: the objects of all images one after another.

    Attributes:
        labels: `[T]` int64.
        boxes: `[T, 4]` float32, cxcywh in 0..1.
        counts: objects per image, on the host, so that reading them needs no synchronisation.
        masks: `[T, H, W]` bool, or None.
        keypoints: `[T, K, 3]` float32, or None.
        extra: `[T, ...]`, by name.
        image_extra: `[B, ...]`, by name.
        annotated: `[B, K]` bool, the classes that are annotated in each image; None: all in each.
    """

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    image_extra: dict[str, Tensor] = field(default_factory=dict)
    annotated: Tensor | None = None

    @classmethod
    def pack(cls, targets: list[Target]) -> Targets:
        """Concatenate per-image targets in order; optional fields must be present in all of them or in none.

        Raises:
            ValueError: `extra` or `image_extra` have other names, or fields of other shapes, in some of them.
        """

        def gathered(fields_of: list[dict[str, Tensor]], put: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
            if wrong := {name for one in fields_of for name in one if not all(name in other for other in fields_of)}:
                raise ValueError(
                    f"some images have {', '.join(sorted(wrong))} and others have not; a source gives every image of "
                    "a split the same fields, with no rows where there are no objects"
                )
            made = {}
            for name in fields_of[0]:
                try:
                    made[name] = put([one[name] for one in fields_of])
                except RuntimeError as error:
                    raise ValueError(f"{name!r} has not the same shape in all images ({error}); give one") from error
            return made

        def joined(name: str, put: Callable[[list[Tensor]], Tensor] = torch.cat) -> Tensor | None:
            parts = [getattr(target, name) for target in targets]
            return None if any(part is None for part in parts) else put(parts)

        return cls(
            labels=torch.cat([target.labels for target in targets]),
            boxes=torch.cat([target.boxes for target in targets]),
            counts=tuple(len(target.labels) for target in targets),
            masks=joined("masks"),
            keypoints=joined("keypoints"),
            extra=gathered([target.extra for target in targets], torch.cat),
            image_extra=gathered([target.image_extra for target in targets], torch.stack),
            annotated=joined("annotated", torch.stack),
        )

    def __len__(self) -> int:
        return sum(self.counts)

    def to(self, device: torch.device, non_blocking: bool = False) -> Targets:
        return _moved(self, device, non_blocking)

    def pin_memory(self) -> Targets:
        return _pinned(self)


@dataclass
class Batch:
    """A batch of a loader: pixels are bytes until they are on the device.

    Attributes:
        images: `[B, H, W, 3]` uint8, RGB.
        targets: packed ground truth.
        image_sizes: `[B, 2]` int64 (height, width) of the original images; on the host, where their masks are planned.
        image_ids: the data set's ids, on the host.
        padding_mask: `[B, H, W]` bool, True where there is no image; None when every image fills its canvas.
        tiles: what the images are parts of; None: they are whole images.
        skipped: messages about images that could not be read and were skipped.
    """

    images: Tensor
    targets: Targets
    image_sizes: Tensor
    image_ids: list[int] = field(default_factory=list)
    padding_mask: Tensor | None = None
    tiles: list[Tile] | None = None
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return replace(_moved(self, device, non_blocking), image_sizes=self.image_sizes)

    def pin_memory(self) -> Batch:
        return _pinned(self)

    def pixels(self, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
        """Images as input of the networks: `[B, 3, H, W]` float32 in 0..1, in the memory format of their weights."""
        return self.images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format).div_(255)


class MaskLogits(NamedTuple):
    """Mask logits in factored form: the mask of a query is the inner product of its vector with every pixel's.

    Attributes:
        features: `[..., B, D, h, w]`; a leading layer axis where predictions of several layers are stacked.
        queries: `[..., B, Q, D]`.
        bias: `[1]`.
    """

    features: Tensor
    queries: Tensor
    bias: Tensor

    def dense(self) -> Tensor:
        """`[..., B, Q, h, w]` logits; for post-processing and export only."""
        return torch.einsum("...bqd,...bdhw->...bqhw", self.queries, self.features) + self.bias


class Prediction(NamedTuple):
    """The predictions of a set of queries.

    Attributes:
        logits: `[..., B, Q, C]`.
        boxes: `[..., B, Q, 4]` cxcywh in 0..1 (RF-DETR's are unbounded).
        masks: factored mask logits, or None.
        keypoints: `[..., B, Q, C * K, 8]`, K keypoints of each class (see `model/head/keypoint.py` for the channels);
            or `[..., B, Q, K, 2]`, x, y in 0..1 of the keypoints of any class; or None.
    """

    logits: Tensor
    boxes: Tensor
    masks: MaskLogits | None = None
    keypoints: Tensor | None = None

    def at(self, layer: int) -> Prediction:
        """One layer of a stacked prediction."""
        return mapped(self, lambda tensor: tensor[layer])


class Denoising(NamedTuple):
    """Predictions of the denoising queries and the objects they were made from.

    Attributes:
        layers: stacked like `Outputs.layers`, with the denoising queries on the query axis.
        image: `[M]` int64, image of every positive query.
        query: `[M]` int64, its index on the query axis.
        target: `[M]` int64, the object (packed index) it is a noisy copy of.
        groups: number of copies of the ground truth; divides the loss.
        initial: like `Outputs.initial`.
    """

    layers: Prediction
    image: Tensor
    query: Tensor
    target: Tensor
    groups: int
    initial: Prediction | None = None


class Outputs(NamedTuple):
    """The outputs of a network.

    Attributes:
        layers: predictions of the decoder layers, stacked on a leading axis: logits `[L, B, G * Q, C]`.
            In evaluation only the last (or `eval_idx`) layer is computed and `L` is 1.
        encoder: predictions of the selected encoder tokens: logits `[B, G * Q, C]`; None in evaluation.
        denoising: None in evaluation.
        groups: query groups G that are matched independently (group-DETR); query axis is group-major.
        initial: of networks that predict before their first layer: logits `[B, G * Q, C]`; None in evaluation.
        maps: of the encoder, `[B, D, h, w]` each; None unless requested, see `protocols.ShowingMaps`.
    """

    layers: Prediction
    encoder: Prediction | None = None
    denoising: Denoising | None = None
    groups: int = 1
    initial: Prediction | None = None
    maps: list[Tensor] | None = None

    @property
    def pred(self) -> Prediction:
        """The last layer's prediction: logits `[B, Q, C]`, boxes `[B, Q, 4]`."""
        return mapped(self.layers, lambda tensor: tensor[-1])


@dataclass
class Detections:
    """Detections of one image in its original pixels, best first.

    Attributes:
        scores: `[n]` in 0..1.
        labels: `[n]` int64 contiguous class indices.
        boxes: `[n, 4]` xyxy, pixels of the original image.
        masks: `[n, H, W]` bool at the original size, or None.
        keypoints: `[n, K, 3]` (x, y in pixels, confidence 0..1), or None.
        keypoint_covariance: `[n, K, 2, 2]` in squared pixels, or None.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    keypoint_covariance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Only the detections whose score exceeds `threshold`."""
        return self.kept(self.scores > threshold)

    def finite(self) -> Detections:
        """Only the detections with finite scores, boxes and keypoints; a diverged network has others.

        Synchronises with the device, so call it on detections in host memory.
        """
        numbers = (self.scores[:, None], self.boxes, self.keypoints)
        keep = [part.isfinite().flatten(1).all(1) for part in numbers if part is not None]
        kept = torch.stack(keep).all(0)
        return self if bool(kept.all()) else self.kept(kept)

    def kept(self, keep: Tensor) -> Detections:
        """Only some detections: `[n]` bool."""
        kept = {f.name: value[keep] for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **kept)


def on_host(detections: list[Detections]) -> list[Detections]:
    """Detections of some images in host memory; waits once for the device, whatever their number."""
    cuda = {one.scores.device for one in detections if one.scores.device.type == "cuda"}
    copies = [_moved(one, torch.device("cpu"), non_blocking=bool(cuda)) for one in detections]
    for device in cuda:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _moved(value: Record, device: torch.device, non_blocking: bool) -> Record:
    """A copy of a dataclass with every tensor (and nested dataclass) on `device`."""
    return _changed(value, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def _pinned(value: Record) -> Record:
    """A copy of a dataclass with every tensor in page-locked memory."""
    return _changed(value, lambda tensor: tensor.pin_memory())


def _changed(value: Record, change: Callable[[Tensor], Tensor]) -> Record:
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value,
        **{
            name: _changed(part, change) if isinstance(part, Targets) else mapped(part, change)
            for name, part in parts.items()
        },
    )
