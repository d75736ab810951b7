"""The neck of LW-DETR and RF-DETR: the maps of a plain vision transformer to one or more levels of a pyramid.

Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", for making levels of one
resolution; Chen et al. 2024, "LW-DETR", for the C2f projector.

Legend: B images, C channels of a backbone map, D channels out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_exp.model.layer.activation import activation
from detr_exp.model.layer.channel_norm import ChannelNorm
from detr_exp.model.layer.conv import ConvNorm

# level -> how much finer its map is than the backbone's
SCALES = {"P3": 2.0, "P4": 1.0, "P5": 0.5}
NORMS = ("layer", "batch")


class Projector(nn.Module):
    """Concatenates the backbone's maps at every level's resolution and mixes them.

    Args:
        channels: of the backbone's maps.
        strides: their strides, all the same.
        hidden_dim: channels of every level.
        levels: any of P3 (twice as fine), P4 (as the backbone) and P5 (half as fine), finest first.
        num_bottlenecks: pairs of 3x3 convolutions a level.
        norm: after convolutions, "layer" (over the channels of a pixel, as RF-DETR) or "batch" (as LW-DETR); the last
            norm of a level is over its channels.
        squeeze: halve the channels before a map gets finer, for wide backbones.

    Raises:
        ValueError: for unknown or unordered levels, an unknown norm, or a backbone whose maps differ in resolution.
    """

    def __init__(
        self,
        *,
        channels: list[int],
        strides: list[int],
        hidden_dim: int,
        levels: list[str],
        num_bottlenecks: int = 3,
        norm: str = "layer",
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        if not levels or list(levels) != [name for name in SCALES if name in levels]:
            raise ValueError(
                f"model.neck.levels is {list(levels)}; it needs one or more of {list(SCALES)} in this order, "
                "such as model.neck.levels=[P4]"
            )
        if len(set(strides)) != 1:
            raise ValueError(
                f"the backbone's maps have strides {list(strides)}, but this neck needs maps of one resolution; use "
                "model/backbone=dinov2_windowed_small or dinov2_windowed_base, or model.backbone.out_strides=[16]"
            )
        if norm not in NORMS:
            raise ValueError(f"model.neck.norm is {norm!r}; use {' or '.join(NORMS)}: model.neck.norm=layer")
        self.levels = nn.ModuleList(
            Level(
                in_channels=channels,
                out_channels=hidden_dim,
                scale=SCALES[name],
                num_bottlenecks=num_bottlenecks,
                norm=norm,
                squeeze=squeeze,
            )
            for name in levels
        )
        self.out_channels = [hidden_dim] * len(levels)
        self.out_strides = [int(strides[0] / SCALES[name]) for name in levels]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps `[B, C, h, w]` -> one `[B, D, h * scale, w * scale]` a level."""
        return [level(maps) for level in self.levels]


class Level(nn.Module):
    """One level of the pyramid.

    Args:
        in_channels: channels of its input maps.
        out_channels: D.
        scale: 2, 1 or 0.5 times their resolution.
        num_bottlenecks: pairs of 3x3 convolutions.
        norm, squeeze: see `Projector`.
    """

    def __init__(
        self,
        *,
        in_channels: list[int],
        out_channels: int,
        scale: float,
        num_bottlenecks: int,
        norm: str,
        squeeze: bool,
    ) -> None:
        super().__init__()
        self.resample = nn.ModuleList(_resampling(channels, scale, norm, squeeze) for channels in in_channels)
        part = (4 if squeeze else 2) if scale > 1 else 1
        joined = sum(channels // part for channels in in_channels)
        self.mix = C2f(in_channels=joined, out_channels=out_channels, num_bottlenecks=num_bottlenecks, norm=norm)
        self.norm = ChannelNorm(out_channels, eps=1e-6)

    def forward(self, maps: list[Tensor]) -> Tensor:
        joined = torch.cat([resample(one) for resample, one in zip(self.resample, maps)], dim=1)
        return self.norm(self.mix(joined))


class C2f(nn.Module):
    """Cross-stage partial block that concatenates the outputs of all bottlenecks (as in YOLOv8), without shortcuts.

    Args:
        in_channels: channels in.
        out_channels: channels out; half as many inside.
        num_bottlenecks: pairs of 3x3 convolutions.
        norm: see `Projector`.
    """

    def __init__(self, *, in_channels: int, out_channels: int, num_bottlenecks: int, norm: str) -> None:
        super().__init__()
        inner = out_channels // 2
        self.enter = _conv(in_channels, 2 * inner, 1, norm)
        self.bottlenecks = nn.ModuleList(
            nn.Sequential(_conv(inner, inner, 3, norm), _conv(inner, inner, 3, norm)) for _ in range(num_bottlenecks)
        )
        self.leave = _conv((2 + num_bottlenecks) * inner, out_channels, 1, norm)

    def forward(self, features: Tensor) -> Tensor:
        parts = list(self.enter(features).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return self.leave(torch.cat(parts, dim=1))


def _conv(in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1, act: str = "silu") -> nn.Module:
    if norm == "batch":
        return ConvNorm(in_channels, out_channels, kernel, stride, act=act)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        ChannelNorm(out_channels, eps=1e-6),
        activation(act),
    )


def _resampling(channels: int, scale: float, norm: str, squeeze: bool) -> nn.Module:
    if scale == 1:
        return nn.Identity()
    if scale < 1:
        coarser = _conv(channels, channels, 3, norm, stride=2, act="relu")
        return coarser if isinstance(coarser, nn.Sequential) else nn.Sequential(coarser)
    if not squeeze:
        return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
    half = channels // 2
    return nn.Sequential(_conv(channels, half, 1, norm, act="relu"), nn.ConvTranspose2d(half, half // 2, 2, stride=2))
