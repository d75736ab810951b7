"""A checkpoint, ready for use: network, classes, threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from detr_exp import build
from detr_exp.data.keypoints import KeypointSchema
from detr_exp.data.picture import read_picture
from detr_exp.data.render import resized_plainly
from detr_exp.structures import Batch, Detections, Targets
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.evaluation import as_float32
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.precision import Precision

Picture = Image.Image | np.ndarray | str | Path
USUAL_THRESHOLD = 0.5  # where the checkpoint has never been evaluated


@dataclass
class Detector:
    """A trained network and what it needs to be used.

    Attributes:
        network: on its device, in evaluation mode.
        classes: a name per label.
        category_ids: the id of each label in the annotations it was trained on.
        threshold: lowest score that counts, where precision and recall balanced best.
        precision: where and in what type it computes.
        cfg: the config it was trained with.
        path: the checkpoint.
        keypoints: the keypoint schema of the data it was trained on, or None.
    """

    network: Any
    classes: list[str]
    category_ids: list[int]
    threshold: float
    precision: Precision
    cfg: DictConfig
    path: Path
    keypoints: KeypointSchema | None

    @torch.inference_mode()
    def predict(self, pictures: Picture | Sequence[Picture], threshold: float | None = None) -> list[Detections]:
        """Find objects.

        Args:
            pictures: one or several, of any sizes: paths, PIL images, or arrays `[H, W, 3]` uint8 RGB.
            threshold: lowest score; None: `self.threshold`.

        Returns:
            one `Detections` per picture, best first, boxes in its pixels.

        Raises:
            ValueError: a picture cannot be read, or is no picture.
        """
        given = [pictures] if isinstance(pictures, Image.Image | np.ndarray | str | Path) else pictures
        opened = [as_picture(picture) for picture in given]
        if not opened:
            return []
        size = self.network.image_size
        pixels = np.stack([resized_plainly(picture, size) for picture in opened])
        image_sizes = torch.tensor([[picture.height, picture.width] for picture in opened])
        nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,) * len(opened))
        batch = Batch(torch.from_numpy(pixels), nothing, image_sizes).to(self.precision.device)
        with self.precision.autocast():
            outputs = self.network(batch.pixels())
        found = self.network.postprocess(as_float32(outputs), batch.image_sizes)
        lowest = self.threshold if threshold is None else threshold
        return [detections.cpu().above(lowest) for detections in found]


def load(checkpoint: str | Path, *, hardware: Hardware | None = None, allow_targets: Sequence[str] = ()) -> Detector:
    """Open a checkpoint.

    Args:
        checkpoint: a file, or the folder of a run: its best.
        hardware: None: as it was trained, where this machine has such a device.
        allow_targets: packages of your own that its config may name.

    Raises:
        ValueError: the file is absent, damaged, not ours, or names what is not allowed.
    """
    path = files.resolve(checkpoint)
    state = files.load(path)
    cfg = OmegaConf.create(state["config"])
    cfg.allow_targets = list(allow_targets)
    cfg.model = _without_downloads(OmegaConf.to_container(cfg.model))
    keypoints = KeypointSchema(**state["keypoints"]) if state.get("keypoints") else None
    # what was trained on is told, not read: the data need not be on this machine
    trained_on = SimpleNamespace(num_classes=len(state["classes"]), classes=state["classes"], keypoints=keypoints)
    network = build.network(cfg, trained_on)
    average = (state.get("ema") or {}).get("average", {})
    network.load_state_dict(state["model"] | average, strict=not average)
    hardware = hardware or build.hardware(OmegaConf.create({"trainer": {"hardware": _hardware_of(cfg)}}))
    return Detector(
        network=hardware.place(network).eval(),
        classes=state["classes"],
        category_ids=state["category_ids"],
        threshold=state.get("metrics", {}).get("F1_threshold", USUAL_THRESHOLD),
        precision=Precision(hardware.torch_device, hardware.eval_amp_dtype),
        cfg=cfg,
        path=path,
        keypoints=keypoints,
    )


def as_picture(picture: Picture) -> Image.Image:
    """An upright 8-bit RGB picture.

    Raises:
        ValueError: it cannot be read, or is an array of another kind.
    """
    if isinstance(picture, str | Path):
        return read_picture(Path(picture).expanduser())
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"an array {list(picture.shape)} of {picture.dtype} is no picture; give [H, W, 3] uint8 RGB")
    return Image.fromarray(picture)


def _hardware_of(cfg: DictConfig) -> DictConfig:
    """Where it was trained, in today's words: what an older version did not know yet is as in a training today."""
    known = build.compose().trainer.hardware
    return OmegaConf.merge(known, {name: value for name, value in cfg.trainer.hardware.items() if name in known})


def _without_downloads(node: Any) -> Any:
    """A model's config without weights to start from: the checkpoint has its own."""
    if not isinstance(node, dict):
        return node
    starts = {"weights": None, "pretrained": False}
    return {name: starts[name] if name in starts else _without_downloads(value) for name, value in node.items()}
