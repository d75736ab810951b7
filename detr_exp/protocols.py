"""The contracts between the parts of an experiment: the members that a user-defined part needs.

No class inherits from these protocols. An object that has the members fits; one that lacks some is refused before
training, with their names (`missing`). Optional abilities are separate protocols, checked by `isinstance`.
The contracts of data (`Source`, `Split`) are in `data/content.py`, that of matchers in `matcher/hungarian.py`, those of
decoders and mask heads beside ours in `model/`.

Legend: B images, Q queries, C classes, N keypoints of all classes, n detections of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from torch import Tensor, nn

from detr_exp.structures import Detections, Outputs, Target, Targets
from detr_exp.values import Values

T = TypeVar("T")
TASKS = ("boxes", "masks", "keypoints")


def missing(thing: object, protocol: type) -> list[str]:
    """Members of a protocol that an object or a class lacks, in the order of the protocol."""
    wanted = [*protocol.__annotations__, *vars(protocol)]
    names = dict.fromkeys(name for name in wanted if name == "__call__" or not name.startswith("_"))
    return list(dict.fromkeys(_shown(thing, name) for name in names if not _has(thing, name)))


def complete(part: T, contract: type, key: str, target: str) -> T:
    """Return a part of an experiment, or refuse it if it lacks members of its contract.

    Args:
        part: an object, or a class whose objects are made later.
        contract: a protocol.
        key: of the part in the config.
        target: the class or function that made it.

    Raises:
        ValueError: names the members.
    """
    if lacking := missing(part, contract):
        another = "" if key.endswith("]") else f", or choose another, {key.replace('.', '/')}=..."
        raise ValueError(
            f"{key}: {target} has no {', '.join(lacking)}; it needs all that {contract.__module__}.{contract.__name__} "
            f"lists: add what is missing{another}"
        )
    return part


def _has(thing: object, name: str) -> bool:
    if isinstance(thing, nn.Module) and name in ("__call__", "forward"):
        return type(thing).forward is not nn.Module.forward  # every module inherits a default
    if name == "__call__":
        return callable(thing)
    return hasattr(type(thing), name) or hasattr(
        thing, name
    )  # the class is enough for properties, which are not evaluated


def _shown(thing: object, name: str) -> str:
    return "forward" if name == "__call__" and isinstance(thing, nn.Module) else name


class Network(Protocol):
    """A detector: an `nn.Module`, which provides the last members."""

    image_size: tuple[int, int]  # (height, width) for which it is made
    stride: int  # both sides of its images have to be multiples of it
    num_queries: int  # Q, the largest number of detections of an image
    activation: str  # "sigmoid", or "softmax" with one more logit, the last, for the background
    tasks: tuple[str, ...]  # what it predicts, of TASKS
    keypoint_counts: tuple[int, ...]  # keypoints of each class; () where it predicts none
    cuts_boxes: bool  # whether detections are clipped to the image
    pixel_mean: Tensor  # [3, 1, 1] of RGB in 0..1, a buffer; of other channels, a value for each
    pixel_std: Tensor  # [3, 1, 1], likewise

    def __call__(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        """`forward`: images `[B, C, H, W]` in 0..1, and padding_mask `[B, H, W]` bool, True where there is none."""

    def forward(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        """The computation of a call, without compilation."""

    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        """Detections of each image in pixels.

        `image_sizes` is `[B, 2]` (height, width) of the original images, on the host: on a device, masks would wait.
        With padding it is what the padded canvas measures in original pixels, which need not be a whole number.
        """

    def class_tensors(self) -> dict[str, int]:
        """Tensors of the state dict that depend on the classes, and their axis of classes."""

    def agree_on_denoising(self, most_objects: int) -> None:
        """Set the largest number of objects in an image of the batch, over all ranks, for the denoising queries."""

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""

    def deploy(self) -> Network:
        """Fold and remove the parts that only training needs. In place; the network cannot be trained afterwards."""

    training: bool

    def compile(self, *args: Any, **kwargs: Any) -> None: ...
    def eval(self) -> Network: ...
    def train(self, mode: bool = True) -> Network: ...
    def to(self, *args: Any, **kwargs: Any) -> Network: ...
    def cpu(self) -> Network: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Values, strict: bool = True) -> tuple[list[str], list[str]]: ...


@runtime_checkable
class KeypointScored(Protocol):
    """A network that predicts how uncertain keypoints are, and lowers the scores of detections with uncertain ones.

    Its exported files do so as well. Other networks only predict where keypoints are.
    """

    score_alpha: float  # how much; see `model.head.keypoint`


@runtime_checkable
class ShowingMaps(Protocol):
    """A network whose outputs contain the maps of its encoder where that is requested."""

    shows_maps: bool  # requested; false at first
    map_channels: list[int]  # of each map
    map_strides: list[int]  # pixels of a cell of each map, ascending


class Backbone(Protocol):
    """Images to feature maps; an `nn.Module`."""

    out_channels: list[int]  # of each map
    out_strides: list[int]  # pixels of a cell of each map, ascending
    pixel_mean: Sequence[float]  # three numbers: of RGB in 0..1, as its weights were trained
    pixel_std: Sequence[float]  # likewise

    def __call__(self, images: Tensor) -> list[Tensor]:
        """`forward`: `[B, 3, H, W]` -> a map `[B, channels, H / stride, W / stride]` for each of `out_strides`."""

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""


@runtime_checkable
class Attending(Protocol):
    """A backbone in which distant cells attend to each other, and not to padded ones."""

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`, with the padding `[B, H, W]` bool of the images, True where there is none."""


class Neck(Protocol):
    """Feature maps of a backbone to feature maps for a decoder; an `nn.Module`."""

    out_channels: list[int]  # of each map
    out_strides: list[int]  # pixels of a cell of each map, ascending

    def __call__(self, maps: list[Tensor]) -> list[Tensor]:
        """`forward`: maps `[B, channels, H / stride, W / stride]` -> the same for each of `out_strides`."""


class Adapter(Protocol):
    """Parameter-efficient fine-tuning: few trained parameters beside a frozen network."""

    def adapt(self, network: nn.Module, anew: Collection[str]) -> None:
        """Freeze parameters and add trained ones, in place.

        Checkpoints contain all but the frozen parameters of the network. Weights that are computed from others are
        registered by `torch.nn.utils.parametrize`, which `deploy` merges.

        Args:
            network: with its starting weights.
            anew: names of the parameters without starting weights, such as those of new classes: to be trained.
        """


@runtime_checkable
class Strided(Protocol):
    """A backbone whose image sides have to be multiples of more than the strides of its feature maps."""

    stride: int


@runtime_checkable
class Counting(Protocol):
    """A matcher that counts the costs that were not finite since the start of the run."""

    num_non_finite: int


@runtime_checkable
class Compiling(Protocol):
    """A matcher with a part that can be compiled, in place."""

    def compile(self) -> Any: ...


@runtime_checkable
class Epochal(Protocol):
    """A matcher that is another one in other epochs."""

    def begin_epoch(self, epoch: int) -> None:
        """Before training and evaluation of an epoch, counted from 0."""


class Operation(Protocol):
    """A random change of a training image and of the fields of its objects."""

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target, /) -> tuple[np.ndarray, Target]:
        """The changed image and target, new ones or the same.

        Args:
            rng: of this image in this epoch; the only source of randomness to use.
            image: `[H, W, 3]` uint8, RGB, at the input size of the network, without padding; the size must not change.
            target: its objects, boxes cxcywh in 0..1. An operation that moves pixels has to move boxes, masks and
                keypoints as well; `Target.kept` drops objects.
        """


@runtime_checkable
class Combining(Protocol):
    """An operation that puts parts of another training image into this one."""

    takes_another: bool

    def is_due(self, rng: np.random.Generator) -> bool:
        """Whether this image is changed; only then another one is read."""

    def __call__(
        self, rng: np.random.Generator, image: np.ndarray, target: Target, other: np.ndarray, objects: Target, /
    ) -> tuple[np.ndarray, Target]:
        """As of `Operation`, with another image of this size and its objects, with masks where there are outlines."""


class Metric(Protocol):
    """An evaluator that holds the ground truth of a split."""

    def reset(self) -> None:
        """Drop all detections."""

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detections of some images."""

    def merge(self, gather: Callable[[T], list[T]]) -> None:
        """Add the detections of other ranks; `gather(part)` returns all parts on rank 0, on others only their own."""

    def compute(self) -> dict[str, float]:
        """All metrics of the detections so far, by name; called on rank 0."""


class ImageFindings(Protocol):
    """The detections of one image, in host memory."""

    scores: np.ndarray  # [n]
    labels: np.ndarray  # [n]
    boxes: np.ndarray  # [n, 4] x, y, width, height in pixels


@runtime_checkable
class PerImage(Protocol):
    """A metric that keeps the detections of each image, for diagnoses and the worst images."""

    @property
    def images(self) -> Mapping[int, ImageFindings]:
        """By image id, since `reset`."""


@runtime_checkable
class PerClass(Protocol):
    """A metric with a row for each class, which is shown and saved."""

    iou_types: tuple[str, ...]  # what it compares: "bbox", "segm", "keypoints"

    def table(self, iou_type: str = "bbox") -> list[Values]:
        """After `compute`, a row per label with at least `class`, its name, `objects`, how many there are, and `AP`."""

    def operating_points(self) -> dict[str, list[Values]]:
        """Of each of `iou_types` and each class the `threshold` to use; empty before `compute`."""


class Keypoints(Protocol):
    """Keypoints of all classes; K is the largest number any class has."""

    names: list[list[str]]  # of each label's keypoints
    skeletons: list[list[tuple[int, int]]]  # of each label the 0-based pairs that are connected
    sigmas: list[float]  # [K] OKS scales

    @property
    def counts(self) -> list[int]:
        """Keypoints of each label."""


class Labels(Protocol):
    """The classes of a network: those of a data set, or of a checkpoint."""

    classes: list[str]  # a name per label; empty where they are not known
    category_ids: list[int]  # of the annotations, per label
    num_classes: int

    @property
    def keypoints(self) -> Keypoints | None: ...


class Tracker(Protocol):
    """Records a run."""

    def start(
        self,
        *,
        run_dir: Path,
        config: Values,
        choices: Mapping[str, str | None] | None = None,
        overrides: Iterable[str] = (),
        tags: Mapping[str, str] | None = None,
        resumed: bool = False,
    ) -> None:
        """Start, or resume, the run of a folder."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def artifact(self, path: Path, step: int = 0) -> None: ...
    def image(self, path: Path, name: str, step: int) -> None: ...
    def checkpoint(self, path: Path, step: int = 0) -> None: ...

    @property
    def lines(self) -> int:
        """Number of metric lines so far: a resumed run drops those after its checkpoint."""

    def rewind(self, step: int, lines: int | None = None) -> None:
        """Drop the logs after `step`, and the metrics after the first `lines`."""

    def finish(self, status: str = "ok", message: str | None = None) -> None:
        """End the run."""
