"""Blocks of convolutions that fuse two maps, and halve one, in hybrid encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.activation import activation
from detr_exp.model.layer.conv import ConvNorm, folded
from detr_exp.ops.products import activated


class RepVggBlock(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, which fold into one 3x3 convolution (RepVGG, arXiv 2101.03697)."""

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        self.fused: nn.Conv2d | None = None
        self.act = activation(act)

    def forward(self, maps: Tensor) -> Tensor:
        if self.fused is not None:
            return activated(self.fused, self.act, maps)
        return self.act(self.conv1(maps) + self.conv2(maps))

    @torch.no_grad()
    def fold(self) -> None:
        """Become one convolution; for inference only."""
        wide, narrow = folded(self.conv1.conv, self.conv1.norm), folded(self.conv2.conv, self.conv2.norm)
        wide.weight += F.pad(narrow.weight, [1, 1, 1, 1])
        wide.bias += narrow.bias  # type: ignore[operator]
        self.fused = wide
        del self.conv1, self.conv2


class CSPRepLayer(nn.Module):
    """Two 1x1 branches, one of them through RepVGG blocks, added up."""

    def __init__(self, in_channels: int, out_channels: int, *, num_blocks: int, expansion: float, act: str) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1 = ConvNorm(in_channels, hidden, 1, act=act)
        self.conv2 = ConvNorm(in_channels, hidden, 1, act=act)
        self.bottlenecks = nn.Sequential(*(RepVggBlock(hidden, act) for _ in range(num_blocks)))
        self.conv3 = ConvNorm(hidden, out_channels, 1, act=act) if hidden != out_channels else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(maps)) + self.conv2(maps))


class SplitRepLayer(nn.Module):
    """A `CSPRepLayer` that makes both branches by one convolution."""

    def __init__(self, in_channels: int, channels: int, *, num_blocks: int, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, 2 * channels, 1, act=act)
        self.bottlenecks = nn.Sequential(*(RepVggBlock(channels, act) for _ in range(num_blocks)))

    def forward(self, maps: Tensor) -> Tensor:
        kept, changed = self.conv1(maps).chunk(2, dim=1)
        return kept + self.bottlenecks(changed)


class ElanLayer(nn.Module):
    """Half of the channels pass two CSP layers in a row; input and all results are reduced together (GELAN, YOLOv9).

    Args:
        in_channels, channels: of input and output.
        hidden: of the CSP layers.
        num_blocks: in each of them.
        act: of all convolutions.
        split: whether the CSP layers are `SplitRepLayer`s.
        closing: whether a 3x3 convolution follows each of them.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        hidden: int,
        num_blocks: int,
        act: str,
        split: bool = False,
        closing: bool = True,
    ) -> None:
        super().__init__()

        def csp(in_channels: int) -> nn.Sequential:
            layer: nn.Module
            if split:
                layer = SplitRepLayer(in_channels, hidden, num_blocks=num_blocks, act=act)
            else:
                layer = CSPRepLayer(in_channels, hidden, num_blocks=num_blocks, expansion=1.0, act=act)
            return nn.Sequential(layer, *([ConvNorm(hidden, hidden, 3, act=act)] if closing else []))

        self.cv1 = ConvNorm(in_channels, 2 * channels, 1, act=act)
        self.cv2 = csp(channels)
        self.cv3 = csp(hidden)
        self.cv4 = ConvNorm(2 * channels + 2 * hidden, channels, 1, act=act)

    def forward(self, maps: Tensor) -> Tensor:
        parts = self.cv1(maps).chunk(2, dim=1)
        once = self.cv2(parts[1])
        return self.cv4(torch.cat([*parts, once, self.cv3(once)], dim=1))


class SeparableDown(nn.Module):
    """Halves a map: a 1x1 convolution between channels, then a depthwise one with stride 2; no activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, 1)
        self.cv2 = ConvNorm(channels, channels, 3, 2, groups=channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.cv2(self.cv1(maps))
