"""Pyramids from a plain vision transformer: its maps, resized; in DEIMv2 beside those of a few convolutions (STA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.conv import ConvNorm
from detr_exp.published.fetch import Found


class Plain(Protocol):
    """What a pyramid needs of a transformer; an `nn.Module`."""

    width: int  # channels of its maps
    pixel_mean: list[float]
    pixel_std: list[float]
    initial: Found | None

    def __call__(self, images: Tensor) -> list[Tensor]:
        """`forward`: `[B, 3, H, W]` -> maps `[B, width, H / 16, W / 16]`."""

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]: ...

    def set_gradient_checkpointing(self, enabled: bool) -> None: ...


class SpatialAdapter(nn.Module):
    """Maps of strides 8, 16 and 32 from three blocks of a transformer of stride 16.

    Args:
        body: makes the transformer from the argument `pretrained`.
        details: channels of the first convolution; of the maps beside the transformer's twice and four times as many.
        channels: of every map that leaves the backbone.
        pretrained: see the body.

    Attributes:
        out_channels, out_strides, pixel_mean, pixel_std, initial: as in other backbones.
    """

    def __init__(self, *, body: Callable[..., Plain], details: int, channels: int, pretrained: bool | str) -> None:
        super().__init__()
        self.body = body(pretrained=pretrained)
        self.initial, self.pixel_mean, self.pixel_std = self.body.initial, self.body.pixel_mean, self.body.pixel_std
        self.out_channels, self.out_strides = [channels] * 3, [8, 16, 32]
        self.stem = ConvNorm(3, details, 3, 2, act="gelu")
        self.conv2 = ConvNorm(details, 2 * details, 3, 2)
        self.conv3 = ConvNorm(2 * details, 4 * details, 3, 2)
        self.conv4 = ConvNorm(4 * details, 4 * details, 3, 2)
        widths = [self.body.width + count * details for count in (2, 4, 4)]
        self.fusion = nn.ModuleList(ConvNorm(width, channels, 1) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` -> maps `[B, C, H / stride, W / stride]`."""
        return self._fused(images, self.body(images))

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`, with the padding `[B, H, W]`, to which the transformer does not attend."""
        return self._fused(images, self.body.forward_padded(images, padding_mask))

    def _fused(self, images: Tensor, tokens_of: list[Tensor]) -> list[Tensor]:
        finest = self.conv2(F.max_pool2d(self.stem(images), kernel_size=3, stride=2, padding=1))
        middle = self.conv3(F.gelu(finest))
        details = [finest, middle, self.conv4(F.gelu(middle))]
        maps = []
        for fuse, tokens, detail in zip(self.fusion, tokens_of, details, strict=True):
            tokens = F.interpolate(tokens, size=detail.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(fuse(torch.cat([tokens, detail], dim=1)))
        return maps

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the transformer's blocks instead of storing them."""
        self.body.set_gradient_checkpointing(enabled)


class MeanPyramid(nn.Module):
    """Maps of strides 8, 16 and 32 from the mean of blocks of a transformer of stride 16 (EdgeCrafter).

    Args:
        body: makes the transformer from the argument `pretrained`.
        channels: of every map that leaves the backbone. All maps are projected where the transformer has others, else
            only the coarsest.
        pretrained: see the body.

    Attributes:
        out_channels, out_strides, pixel_mean, pixel_std, initial: as in other backbones.
    """

    def __init__(self, *, body: Callable[..., Plain], channels: int, pretrained: bool | str) -> None:
        super().__init__()
        self.body = body(pretrained=pretrained)
        self.initial, self.pixel_mean, self.pixel_std = self.body.initial, self.body.pixel_mean, self.body.pixel_std
        self.out_channels, self.out_strides = [channels] * 3, [8, 16, 32]
        count = 1 if self.body.width == channels else 3
        self.projector = nn.ModuleList(ConvNorm(self.body.width, channels, 1) for _ in range(count))

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` -> maps `[B, C, H / stride, W / stride]`."""
        return self._pyramid(self.body(images))

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`, with the padding `[B, H, W]`, to which the transformer does not attend."""
        return self._pyramid(self.body.forward_padded(images, padding_mask))

    def _pyramid(self, maps_of: list[Tensor]) -> list[Tensor]:
        mean = torch.stack(maps_of).mean(0)
        height, width = mean.shape[-2:]
        sizes = [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]
        maps = [F.interpolate(mean, size=size, mode="bilinear", align_corners=False) for size in sizes]
        kept = 3 - len(self.projector)
        return [*maps[:kept], *(project(level) for project, level in zip(self.projector, maps[kept:], strict=True))]

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the transformer's blocks instead of storing them."""
        self.body.set_gradient_checkpointing(enabled)
