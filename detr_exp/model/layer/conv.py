"""Convolution with batch norm, trained or frozen, and their fusion into one convolution."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detr_exp.model.layer.activation import activation
from detr_exp.ops.products import activated


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants.

    All four are buffers, so that no optimiser, weight decay or gradient changes them.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_load_state_dict_pre_hook(_without_counter)

    def forward(self, maps: Tensor) -> Tensor:
        return F.batch_norm(
            maps, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def _without_counter(norm: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Trained norms count their batches; a constant does not."""
    state.pop(f"{prefix}num_batches_tracked", None)


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm below `module` by a frozen one with the same values."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(child.weight)
            frozen.load_state_dict({key: child.state_dict()[key] for key in frozen.state_dict()})
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child)


def freeze_stages(stem: nn.Module, stages: Iterable[nn.Module], freeze_at: int) -> None:
    """Freeze parts of a backbone: no gradients, and fixed batch statistics.

    Args:
        freeze_at: -1: none; 0: the stem; k: the stem and the first k stages.

    Raises:
        ValueError: there are fewer stages.
    """
    stages = list(stages)
    if not -1 <= freeze_at <= len(stages):
        raise ValueError(
            f"model.backbone.freeze_at is {freeze_at}, but this backbone has {len(stages)} stages; use -1 (train all), "
            f"0 (freeze the stem) or up to {len(stages)}: model.backbone.freeze_at={len(stages)}"
        )
    for part in [stem, *stages[:freeze_at]] if freeze_at >= 0 else []:
        part.requires_grad_(False)
        freeze_batch_norms(part)


class ScaledReLU(nn.Module):
    """ReLU, then a scale and a shift, one number each for all channels (learnable affine block, PP-LCNetV3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.relu(maps), self.scale)

    def fold_into(self, conv: nn.Conv2d) -> Clamp:
        """Scale and shift `conv`, whose output this is applied to; returns what is left to do afterwards."""
        scale, shift = self.scale.item(), self.bias.item()
        conv.weight *= scale
        conv.bias.mul_(scale).add_(shift)  # type: ignore[union-attr]
        return Clamp(None, shift) if scale < 0 else Clamp(shift, None)


class Clamp(nn.Module):
    """Limits values on one side: a `ScaledReLU` after its scale and shift."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, maps: Tensor) -> Tensor:
        return maps.clamp(self.low, self.high)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation; padded so that stride 1 keeps the size.

    Args:
        act: name of the activation, or a module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        act: str | nn.Module | None = None,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.act = act if isinstance(act, nn.Module) else activation(act)

    def forward(self, maps: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity):
            return activated(self.conv, self.act, maps)
        return self.act(self.norm(self.conv(maps)))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the norm, and scales after the activation, into the convolution; for inference only."""
        self.conv = folded(self.conv, self.norm)
        self.norm = nn.Identity()
        if isinstance(self.act, ScaledReLU):
            self.act = self.act.fold_into(self.conv)


def fold_convolutions(network: nn.Module) -> None:
    """`ConvNorm.fold` of all in a network."""
    for module in list(network.modules()):
        if isinstance(module, ConvNorm):
            module.fold()


def folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """A convolution with bias, equivalent to `conv` and then `norm` (trained or frozen) in evaluation."""
    plain = nn.BatchNorm2d(conv.out_channels, norm.eps).to(norm.weight)  # type: ignore[arg-type]
    plain.load_state_dict(norm.state_dict(), strict=False)
    return fuse_conv_bn_eval(conv.eval(), plain.eval())
