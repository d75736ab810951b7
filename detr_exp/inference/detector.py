"""A checkpoint, ready for use: network, classes, threshold."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from detr_exp import build
from detr_exp.config.mistakes import is_raised_by_us
from detr_exp.config.stored import hardware_of, stored
from detr_exp.config.targets import WrongArgumentsError
from detr_exp.data.classes import KnownLabels
from detr_exp.data.fit import Fit, fit_of, sizes_of, use_one_size, written
from detr_exp.data.keypoints import KeypointSchema
from detr_exp.data.render import fitted
from detr_exp.data.tiles import Tiles, tiles_of
from detr_exp.inference.image_like import ImageLike
from detr_exp.inference.image_like import as_image as as_image
from detr_exp.inference.members import At, chosen
from detr_exp.inference.tiled import in_tiles
from detr_exp.model.adapter.slim import find_base, load_own_state, merge
from detr_exp.model.member import become
from detr_exp.model.postprocess import detect
from detr_exp.ops import products
from detr_exp.protocols import Network
from detr_exp.structures import Batch, Detections, Targets, on_host
from detr_exp.tensor_files import Stored
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.checkpoint_content import DEFAULT_THRESHOLD
from detr_exp.trainer.evaluation import as_float32
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.precision import Precision
from detr_exp.values import values_of

log = logging.getLogger(__name__)
ROOM, SMALL = 4, 1 << 22  # a network may have so many numbers for each one in its file, and so many in any case


@dataclass
class Detector:
    """A trained network, ready for use.

    Attributes:
        network: on its device, in evaluation mode.
        classes: a name per label.
        category_ids: the id of each label in the annotations it was trained on.
        threshold: lowest score of a detection by default, where F1 was highest; measured with the whole network, unless
            `measured_at` says otherwise.
        precision: device and type of its computations.
        cfg: the config it was trained with.
        path: the checkpoint.
        keypoints: the keypoint schema of the data it was trained on, or None.
        nonfinite: number of predictions so far that were not finite, which are no detections.
        batch_size: images per batch in the training's evaluations.
        data_fingerprint: of the data it was trained on.
        at: name of the member that the network computes as; empty: as it was trained.
        measured_at: name of the member with which `threshold` was measured.
    """

    network: Network
    classes: list[str]
    category_ids: list[int]
    threshold: float
    precision: Precision
    cfg: DictConfig
    path: Path
    keypoints: KeypointSchema | None
    nonfinite: int = 0
    batch_size: int = 1
    data_fingerprint: str = ""
    at: str = ""
    measured_at: str = ""

    @property
    def title(self) -> str:
        """The checkpoint, and the member where one is chosen."""
        return f"{self.path}{self.at and f' at {self.at}'}"

    @property
    def remark(self) -> str:
        """What has to be said of `threshold`; empty where nothing has."""
        return "" if self.at == self.measured_at else f" (best F1 of the whole network, not measured at {self.at})"

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.network.pixel_mean)

    @cached_property
    def fit(self) -> Fit:
        """How images are brought to the size of the network's input: as in its training."""
        return fit_of(self.cfg.data.get("fit"), self.network)

    @cached_property
    def tiles(self) -> Tiles | None:
        """How images are cut for the network: as in its training; can be set to another, or to None."""
        return tiles_of(values_of(self.cfg.data).get("tiles"))

    def refuse_several_sizes(self, file: str) -> None:
        """Refuse to write a file that has one size of images, where several have not been chosen from.

        Raises:
            ValueError: says how.
        """
        if sizes := sizes_of(self.network):
            raise ValueError(
                f"{self.path} was trained with model.image_size={written(sizes)}, and {file} has one size of images: "
                f"at.image_size={written(sizes[:1])}"
            )

    def folded(self) -> Detector:
        """This detector with norms folded into convolutions: faster, and not equal to the last digit."""
        self.network.deploy()
        products.pack(self.network.modules())
        return self

    @torch.inference_mode()
    def predict(self, images: ImageLike | Sequence[ImageLike], threshold: float | None = None) -> list[Detections]:
        """Find objects.

        Args:
            images: one or several, of any sizes: paths, contents of files, PIL images, arrays `[H, W, 3]` RGB or
                tensors `[3, H, W]`, uint8 or float in 0..1. Grey, alpha and 16 bits are converted as for files.
            threshold: lowest score; None: `self.threshold`.

        Returns:
            one `Detections` per image, highest score first, boxes in its pixels.

        Raises:
            ValueError: an input cannot be read, or is no image.
        """
        sources = [images] if isinstance(images, ImageLike) else images
        opened = [as_image(source, self.channels) for source in sources]
        if not opened:
            return []
        raw = in_tiles(self._found, opened, self.tiles, max(len(opened), self.batch_size), self.network.num_queries)
        finite = [one.finite() for one in raw]
        if count := sum(map(len, raw)) - sum(map(len, finite)):
            if not self.nonfinite:
                log.warning(
                    "%s returns predictions that are not finite; they are counted, and are no detections", self.path
                )
            self.nonfinite += count
        lowest = self.threshold if threshold is None else threshold
        return [detections.above(lowest) for detections in finite]

    def _found(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of images `[H, W, C]`, in one batch for each size of the input; those not finite among them."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            shape = image.shape[0], image.shape[1]
            alike.setdefault(self.fit.canvas(shape, self.network.image_size), []).append(i)
        found = [
            pair for size, those in alike.items() for pair in zip(those, self._batch([images[i] for i in those], size))
        ]
        return [detections for _, detections in sorted(found, key=lambda pair: pair[0])]

    def _batch(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> list[Detections]:
        """Detections of images, brought to one size of the network's input."""
        pixels = torch.from_numpy(np.stack([fitted(image, size, self.fit) for image in images]))
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        image_sizes, mask = torch.tensor(sizes), self.fit.padding(sizes, size)
        no_targets = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,) * len(images))
        batch = Batch(pixels, no_targets, image_sizes, padding_mask=mask).to(self.precision.device)
        with self.precision.autocast():
            outputs = self.network(batch.pixels(self.precision.memory_format), padding_mask=batch.padding_mask)
        return on_host(detect(self.network, as_float32(outputs), image_sizes, mask))


def load(
    checkpoint: str | Path,
    *,
    hardware: Hardware | None = None,
    allow_targets: Sequence[str] = (),
    weights: str | None = None,
    compiled: bool = False,
    at: At | None = None,
) -> Detector:
    """Open a checkpoint.

    Args:
        checkpoint: a file, the folder of a run (its best), or the id of a run, ours or MLflow's.
        hardware: None: that of the training, where this machine has such a device.
        allow_targets: user-defined packages that its config may name.
        weights: "ema" or "raw"; None: those of the file; the averaged ones of a training checkpoint.
        compiled: also compile the network if the training did, for exactly its numbers; takes minutes.
        at: a member of the network; see `members.chosen`.

    Raises:
        ValueError: the file is absent, damaged, of another program or version, or names packages that are not allowed;
            or the network has no such member.
    """
    path = find(checkpoint, weights)
    asked = chosen(at, path)
    state = files.load(path, needs=("config", "classes", "category_ids"))
    config = state["config"]
    base = find_base(state["base"], path) if "base" in state else None
    with of_this_version(path):
        model = _without_downloads(config["model"]) | {"weights": None if base is None else str(base)}
        config = config | {"model": model, "allow_targets": list(allow_targets)}
        cfg = stored(config, path)
        keypoints = KeypointSchema(**state["keypoints"]) if state.get("keypoints") else None
        # labels come from the checkpoint: the data need not be on this machine
        classes, ids = state["classes"], state["category_ids"]
        trained_on = KnownLabels(len(classes), classes, ids, keypoints)
        tensors = _weights(state, path, weights)
        with _no_larger_than(tensors, base):
            network = build.network(cfg, trained_on, tensors.keys())
        network.load_state_dict(tensors) if base is None else load_own_state(network, tensors)
        if hardware is None:
            hardware = build.hardware(stored({"trainer": {"hardware": hardware_of(config)}}, path))
            hardware = replace(hardware, compile=hardware.compile and compiled, gradient_checkpointing=False)
    become(network, asked.member)
    if asked.member.image_size is not None:
        use_one_size(network)
    network = hardware.place(network).eval()
    if base is not None:
        merge(network)  # on its device, where the training computed it, too
    return Detector(
        network=network,
        classes=state["classes"],
        category_ids=state["category_ids"],
        threshold=_threshold_of(state) if asked.threshold is None else asked.threshold,
        precision=hardware.precision(evaluating=True),
        cfg=cfg,
        path=path,
        keypoints=keypoints,
        batch_size=_batch_size_of(cfg, state),
        data_fingerprint=state.get("data_fingerprint", ""),
        at=asked.name,
        measured_at="" if asked.threshold is None else asked.name,
    )


def find(checkpoint: str | Path, weights: str | None = None) -> Path:
    """The checkpoint file of a path, a run's folder or the id of a run.

    Raises:
        ValueError: there is none.
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"weights is {weights!r}; use ema, raw, or null for those of the file")
    if re.fullmatch("[0-9a-f]{32}", str(checkpoint)) and not Path(str(checkpoint)).exists():
        from detr_exp.runs.past import find_one

        checkpoint = find_one(str(checkpoint))
    return files.resolve(checkpoint, weights)


@contextmanager
def _no_larger_than(tensors: dict[str, torch.Tensor], base: Path | None) -> Iterator[None]:
    """Refuse to make a network much larger than its tensors and its base file, before memory is allocated.

    Raises:
        ValueError: the network has many times as many numbers.
    """
    beside = 0 if base is None else base.stat().st_size // 2  # no number has fewer bytes
    left = ROOM * (sum(tensor.numel() for tensor in tensors.values()) + beside) + SMALL

    def count(module: nn.Module, name: str, made: torch.Tensor | None) -> None:
        nonlocal left
        left -= 0 if made is None else made.numel()
        if left < 0:
            raise ValueError("its config describes a network many times as large as its tensors")

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _threshold_of(state: Stored) -> float:
    """Where F1 was highest in the evaluation of the checkpoint."""
    return state.get("threshold", state.get("metrics", {}).get("F1_threshold", DEFAULT_THRESHOLD))


def _batch_size_of(cfg: DictConfig, state: Stored) -> int:
    """Batch size of the training's evaluations; 1 where it was chosen automatically and not recorded."""
    trained = cfg.trainer.batch_size if cfg.trainer.batch_size != "auto" else state.get("batch_size", 1)
    return cfg.trainer.eval_batch_size or trained


def _weights(state: Stored, path: Path, weights: str | None) -> dict[str, torch.Tensor]:
    """The requested tensors: of a file for inference, or of a training checkpoint, raw or averaged."""
    average = (state.get("ema") or {}).get("average")
    if state.get("kind") == "training":
        if weights == "ema" and average is None:
            raise ValueError(f"{path} has no averaged weights: it was trained with trainer.use_ema=false; weights=raw")
        return state["model"] | ({} if weights == "raw" or average is None else average)
    if weights is not None and state.get("weights", weights) != weights:
        raise ValueError(
            f"{path} holds the {state['weights']} weights only; give the folder of the run, which may have both, or "
            f"its {files.NEWEST}"
        )
    return state["model"]


@contextmanager
def of_this_version(path: Path) -> Iterator[None]:
    """Report a checkpoint whose config or tensors do not fit this version.

    Raises:
        ValueError: they do not fit, whichever error a part raised because of it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and is_raised_by_us(error) and not isinstance(error, WrongArgumentsError):
            raise
        cause = f"{type(error).__name__}: {error}".strip().splitlines()
        raise ValueError(
            f"{path} was written by another version of detr_exp and does not fit this one "
            f"({' '.join(line.strip() for line in cause[:2])[:300]}); use the version that wrote it, or train again"
        ) from error


def _without_downloads(node: Any) -> Any:
    """A model's config without initial weights: the checkpoint has its own."""
    if isinstance(node, list):
        return [_without_downloads(value) for value in node]
    if not isinstance(node, dict):
        return node
    starts = {"weights": None, "pretrained": False}
    return {name: starts[name] if name in starts else _without_downloads(value) for name, value in node.items()}
