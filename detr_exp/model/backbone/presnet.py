"""ResNet-vd as RT-DETR uses it ("Bag of Tricks for Image Classification", arXiv 1812.01187, ResNet-D).

Three small convolutions instead of one large make the stem, and shortcuts that halve the map average-pool first.
Weights made for it expect plain RGB in 0..1, without ImageNet's mean and deviation.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.backbone.weights import load_pretrained
from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.conv import ConvNorm, freeze_batch_norms, freeze_stages

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STRIDES = (4, 8, 16, 32)

PRETRAINED = {
    18: "resnet18_vd",
    34: "resnet34_vd",
    50: "resnet50_vd_ssld_v2",
    101: "resnet101_vd_ssld",
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.branch2a = ConvNorm(in_channels, width, 3, stride, act="relu")
        self.branch2b = ConvNorm(width, width, 3)
        self.short = _shortcut(in_channels, width, stride) if project else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.branch2b(self.branch2a(maps)) + self.short(maps))


class BottleNeck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.branch2a = ConvNorm(in_channels, width, 1, act="relu")
        self.branch2b = ConvNorm(width, width, 3, stride, act="relu")
        self.branch2c = ConvNorm(width, width * 4, 1)
        self.short = _shortcut(in_channels, width * 4, stride) if project else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.branch2c(self.branch2b(self.branch2a(maps))) + self.short(maps))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1:
        return ConvNorm(in_channels, out_channels, 1)
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    return nn.Sequential(OrderedDict(pool=pool, conv=ConvNorm(in_channels, out_channels, 1)))


class Stage(nn.Module):
    """Blocks of one resolution; the first projects its shortcut."""

    def __init__(self, block: type[BasicBlock] | type[BottleNeck], in_channels: int, width: int, num: int, stride: int):
        super().__init__()
        out_channels = width * block.expansion
        self.blocks = nn.ModuleList(
            block(out_channels if index else in_channels, width, 1 if index else stride, index == 0)
            for index in range(num)
        )

    def forward(self, maps: Tensor) -> Tensor:
        for block in self.blocks:
            maps = block(maps)
        return maps


class PResNet(nn.Module):
    """ResNet-vd.

    Args:
        depth: 18, 34, 50 or 101.
        out_strides: of the maps returned, from 4, 8, 16, 32; stages beyond the last are not built.
        freeze_at: -1 trains all; 0 freezes the stem; k the stem and the first k stages: weights and batch statistics.
        freeze_norm: replace batch norms by constants.
        pretrained: true downloads ImageNet weights, a path reads them from a file, false starts from random ones.
        widths: channels of the four stages before expansion, for networks smaller than the published ones.
        blocks: blocks of each stage; null takes them from the depth.
    """

    def __init__(
        self,
        *,
        depth: int,
        out_strides: list[int],
        freeze_at: int,
        freeze_norm: bool,
        pretrained: bool | str,
        widths: list[int],
        blocks: list[int] | None,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"model.backbone.depth is {depth}; published depths are {', '.join(map(str, BLOCKS))}")
        if not out_strides or not set(out_strides) <= set(STRIDES):
            raise ValueError(f"model.backbone.out_strides is {out_strides}; choose some of {list(STRIDES)}")
        block = BasicBlock if depth < 50 else BottleNeck
        stem = widths[0]
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv1_1=ConvNorm(3, stem // 2, 3, 2, act="relu"),
                conv1_2=ConvNorm(stem // 2, stem // 2, 3, act="relu"),
                conv1_3=ConvNorm(stem // 2, stem, 3, act="relu"),
            )
        )
        self.out_strides = sorted(out_strides)
        num_stages = STRIDES.index(self.out_strides[-1]) + 1
        channels = [stem, *[width * block.expansion for width in widths]]
        self.res_layers = nn.ModuleList(
            Stage(block, channels[index], widths[index], (blocks or BLOCKS[depth])[index], 1 if index == 0 else 2)
            for index in range(num_stages)
        )
        self.out_channels = [channels[STRIDES.index(stride) + 1] for stride in self.out_strides]
        self.pixel_mean, self.pixel_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        self.gradient_checkpointing = False
        freeze_stages(self.conv1, self.res_layers, freeze_at)
        if freeze_norm:
            freeze_batch_norms(self)
        self.initial = load_pretrained(self, pretrained, PRETRAINED[depth]) if pretrained else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 3, H, W]` -> a map `[B, C, H / stride, W / stride]` (rounded up) for each of `out_strides`."""
        maps = F.max_pool2d(self.conv1(images), kernel_size=3, stride=2, padding=1)
        outputs = []
        for stride, stage in zip(STRIDES, self.res_layers):
            maps = checkpointed(stage, maps) if self.gradient_checkpointing and self.training else stage(maps)
            if stride in self.out_strides:
                outputs.append(maps)
        return outputs

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each stage instead of storing them."""
        self.gradient_checkpointing = enabled
