"""HGNetV2 (PP-HGNetV2, PaddleClas): many small convolutions, seldom a shortcut."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.backbone.weights import load_pretrained
from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.conv import ConvNorm, ScaledReLU, freeze_batch_norms, freeze_stages

_SMALL = [(16, 64, 1, False, 3), (32, 256, 1, False, 3)]  # the first two stages of B0
# Stem channels (middle, out); of each stage: channels inside and out, blocks, whether light, kernel size; convolutions
# in a block.
SIZES = {
    "B0": ((16, 16), [*_SMALL, (64, 512, 2, True, 5), (128, 1024, 1, True, 5)], 3),
    "B1": (
        (24, 32),
        [(32, 64, 1, False, 3), (48, 256, 1, False, 3), (96, 512, 2, True, 5), (192, 1024, 1, True, 5)],
        3,
    ),
    "B2": (
        (24, 32),
        [(32, 96, 1, False, 3), (64, 384, 1, False, 3), (128, 768, 3, True, 5), (256, 1536, 1, True, 5)],
        4,
    ),
    "B3": (
        (24, 32),
        [(32, 128, 1, False, 3), (64, 512, 1, False, 3), (128, 1024, 3, True, 5), (256, 2048, 1, True, 5)],
        5,
    ),
    "B4": (
        (32, 48),
        [(48, 128, 1, False, 3), (96, 512, 1, False, 3), (192, 1024, 3, True, 5), (384, 2048, 1, True, 5)],
        6,
    ),
    "B5": (
        (32, 64),
        [(64, 128, 1, False, 3), (128, 512, 2, False, 3), (256, 1024, 5, True, 5), (512, 2048, 2, True, 5)],
        6,
    ),
    "B6": (
        (48, 96),
        [(96, 192, 2, False, 3), (192, 512, 3, False, 3), (384, 1024, 6, True, 5), (768, 2048, 3, True, 5)],
        6,
    ),
}
PARTS = {  # of B0, in DEIMv2
    "Atto": ((16, 16), [*_SMALL, (64, 256, 1, True, 3)], 3),
    "Femto": ((16, 16), [*_SMALL, (64, 512, 1, True, 5)], 3),
    "Pico": ((16, 16), [*_SMALL, (64, 512, 2, True, 5)], 3),
}
SIZES |= PARTS
OF_RTDETR = {"L": "B4", "X": "B5", "H": "B6"}  # what RT-DETR calls three of them, with weights of another training
Act = Callable[[], nn.Module]
STRIDES = (4, 8, 16, 32)


def to_our_names(name: str) -> str:
    """A parameter's official name -> ours."""
    return re.sub(r"(stem2[ab]\.conv)\.1\.", r"\1.", re.sub(r"\.bn\.", ".norm.", _of_dfine(name)))


def _of_dfine(name: str) -> str:
    """Names in D-FINE's files -> in those of RT-DETR."""
    return re.sub(
        r"\.lab\.",
        ".act.",
        name.replace(".aggregation.0.", ".aggregation_squeeze_conv.").replace(
            ".aggregation.1.", ".aggregation_excitation_conv."
        ),
    )


def to_official_names(name: str) -> str:
    """Our name of a parameter -> the official one."""
    return re.sub(r"(stem2[ab]\.conv)\.", r"\1.1.", re.sub(r"\.norm\.", ".bn.", name))


class Stem(nn.Module):
    """Two ways to half the size, side by side, then half again; `act` makes the activation of each convolution."""

    def __init__(self, middle: int, out_channels: int, act: Act) -> None:
        super().__init__()
        self.stem1 = ConvNorm(3, middle, 3, 2, act=act())
        self.stem2a = ConvNorm(middle, middle // 2, 2, act=act())
        self.stem2b = ConvNorm(middle // 2, middle, 2, act=act())
        self.stem3 = ConvNorm(2 * middle, middle, 3, 2, act=act())
        self.stem4 = ConvNorm(middle, out_channels, 1, act=act())

    def forward(self, images: Tensor) -> Tensor:
        # Kernels of two cells keep the size when the map gets one more row and column.
        maps = F.pad(self.stem1(images), (0, 1, 0, 1))
        pooled = F.max_pool2d(maps, kernel_size=2, stride=1)
        convolved = self.stem2b(F.pad(self.stem2a(maps), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat([pooled, convolved], dim=1)))


class LightConv(nn.Module):
    """1x1 convolution, then a depthwise one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, act: Act) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, 1)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel_size, groups=out_channels, act=act())

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv2(self.conv1(maps))


class Block(nn.Module):
    """A chain of convolutions whose outputs are all concatenated and then reduced."""

    def __init__(
        self,
        in_channels: int,
        middle: int,
        out_channels: int,
        light: bool,
        kernel_size: int,
        *,
        num_layers: int,
        residual: bool,
        act: Act,
    ) -> None:
        super().__init__()
        self.residual = residual
        inputs = [in_channels, *[middle] * (num_layers - 1)]
        self.layers = nn.ModuleList(
            LightConv(channels, middle, kernel_size, act)
            if light
            else ConvNorm(channels, middle, kernel_size, act=act())
            for channels in inputs
        )
        total = in_channels + num_layers * middle
        self.aggregation_squeeze_conv = ConvNorm(total, out_channels // 2, 1, act=act())
        self.aggregation_excitation_conv = ConvNorm(out_channels // 2, out_channels, 1, act=act())

    def forward(self, maps: Tensor) -> Tensor:
        outputs = [maps]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        mixed = self.aggregation_excitation_conv(self.aggregation_squeeze_conv(torch.cat(outputs, dim=1)))
        return mixed + maps if self.residual else mixed


class Stage(nn.Module):
    """Blocks of one resolution; all but the first stage half the size."""

    def __init__(
        self,
        in_channels: int,
        middle: int,
        out_channels: int,
        blocks: int,
        light: bool,
        kernel_size: int,
        *,
        num_layers: int,
        shrink: bool,
        act: Act,
    ) -> None:
        super().__init__()
        self.downsample = ConvNorm(in_channels, in_channels, 3, 2, groups=in_channels) if shrink else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                out_channels if index else in_channels,
                middle,
                out_channels,
                light,
                kernel_size,
                num_layers=num_layers,
                residual=index > 0,
                act=act,
            )
            for index in range(blocks)
        )

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.downsample(maps)
        for block in self.blocks:
            maps = block(maps)
        return maps


class HGNetv2(nn.Module):
    """HGNetV2.

    Args:
        size: "B0" to "B6", or "Atto", "Femto" and "Pico", which have three stages; "L", "X" and "H" are B4, B5 and B6
            with the weights that RT-DETR starts from.
        out_strides, freeze_at, freeze_norm, pretrained: as in `PResNet`.
        affine: a scale and a shift after each activation, as D-FINE has it in B0 to B2.
    """

    def __init__(
        self,
        *,
        size: str,
        out_strides: list[int],
        freeze_at: int,
        freeze_norm: bool,
        pretrained: bool | str,
        affine: bool = False,
    ) -> None:
        super().__init__()
        if size not in (*SIZES, *OF_RTDETR):
            raise ValueError(f"model.backbone.size is {size!r}; use one of {', '.join((*SIZES, *OF_RTDETR))}")
        (middle, channels), stages, num_layers = SIZES[OF_RTDETR.get(size, size)]
        known = STRIDES[: len(stages)]
        if not out_strides or not set(out_strides) <= set(known):
            raise ValueError(f"model.backbone.out_strides is {out_strides}; choose some of {list(known)}")
        act: Act = ScaledReLU if affine else nn.ReLU
        self.out_strides = sorted(out_strides)
        self.stem = Stem(middle, channels, act)
        self.stages = nn.ModuleList()
        for index, stage in enumerate(stages[: STRIDES.index(self.out_strides[-1]) + 1]):
            self.stages.append(Stage(channels, *stage, num_layers=num_layers, shrink=index > 0, act=act))
            channels = stage[1]
        self.out_channels = [stages[STRIDES.index(stride)][1] for stride in self.out_strides]
        self.pixel_mean, self.pixel_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        self.gradient_checkpointing = False
        self._initialise()
        freeze_stages(self.stem, self.stages, freeze_at)
        if freeze_norm:
            freeze_batch_norms(self)
        is_part = size in PARTS  # what fits of B0's weights is a start
        published = f"hgnetv2_{'b0' if is_part else size.lower()}_{'ssld' if size in OF_RTDETR else 'stage1'}"
        self.initial = None
        if pretrained:
            self.initial = load_pretrained(self, pretrained, published, to_our_names, parts=is_part)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 3, H, W]` -> a map `[B, C, H / stride, W / stride]` for each of `out_strides`."""
        maps = self.stem(images)
        outputs = []
        for stride, stage in zip(STRIDES, self.stages):
            maps = checkpointed(stage, maps) if self.gradient_checkpointing and self.training else stage(maps)
            if stride in self.out_strides:
                outputs.append(maps)
        return outputs

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each stage instead of storing them."""
        self.gradient_checkpointing = enabled
