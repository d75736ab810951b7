"""Activations by name."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """The second half of the channels, each weighed by the SiLU of one of the first half (arXiv 2002.05202)."""

    def forward(self, tokens: Tensor) -> Tensor:
        weight, value = tokens.chunk(2, dim=-1)
        return F.silu(weight) * value


ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


def activation(name: str | None) -> nn.Module:
    """The activation called `name`; None is the identity."""
    if name is None:
        return nn.Identity()
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; use one of {', '.join(ACTIVATIONS)} or null")
    return ACTIVATIONS[name]()


def feed_forward_activation(name: str | None, width: int) -> tuple[nn.Module, int]:
    """An activation of `width` channels, or "swiglu", and how many channels it leaves.

    Raises:
        ValueError: an unknown name, or an odd width that cannot be halved.
    """
    if name != "swiglu":
        return activation(name), width
    if width % 2:
        raise ValueError(
            f"model.dim_feedforward is {width}, but swiglu needs an even number; use model.dim_feedforward={width + 1}"
        )
    return SwiGLU(), width // 2
