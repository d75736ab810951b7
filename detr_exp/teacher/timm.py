"""A backbone of timm as the teacher: its maps only."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.loss.teacher import EdgeGrid
from detr_exp.model.backbone.timm_backbone import TimmBackbone
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.teaching import Seen
from detr_exp.values import Values


class TimmTeacher:
    """A pretrained backbone.

    Args:
        name: as in `timm.list_models()`.
        pretrained: true, a file, a name or an address; see `TimmBackbone`.
        out_strides: of the maps.
        image_size: (height, width) of the images it sees; None: those of the training.
        options: further arguments of `timm.create_model`.

    Raises:
        ValueError: there is no such network, or it would have random weights.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool | str,
        out_strides: list[int],
        image_size: list[int] | None,
        options: Values,
    ) -> None:
        if not pretrained:
            raise ValueError(
                "teacher.pretrained is false, but a network with random weights teaches nothing; use those that timm "
                "knows, or a file: teacher.pretrained=true"
            )
        backbone = TimmBackbone(
            name=name, out_strides=out_strides, freeze_norm=False, pretrained=pretrained, options=options
        )
        assert backbone.initial is not None
        self.classes: list[str] = []  # it detects nothing
        self.activation, self.threshold = "sigmoid", 1.0
        self.edge_grid: EdgeGrid | None = None
        self.record = {"teacher": f"{name}, {backbone.initial.word}", "sha256": backbone.initial.sha256}
        self.image_size = None if image_size is None else (image_size[0], image_size[1])
        self.map_channels, self.map_strides = list(backbone.out_channels), list(backbone.out_strides)
        self.backbone = backbone.eval().requires_grad_(False)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.pixel_mean, backbone.pixel_std))
        self.pixels = mean, std

    def place(self, hardware: Hardware) -> None:
        """Move it to the device of the training."""
        device = hardware.torch_device
        self.backbone.to(device).to(memory_format=hardware.memory_format)
        self.pixels = self.pixels[0].to(device), self.pixels[1].to(device)

    def __call__(self, images: Tensor, padding_mask: Tensor | None, *, detects: bool) -> Seen:
        """See `trainer.teaching.Teacher`."""
        mean, std = self.pixels
        return Seen(None, self.backbone((images - mean) / std))
