"""Norms of tokens by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Tokens in units of their root mean square, computed in float32 at least (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        normal = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normal.to(tokens.dtype) * self.scale


NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": RMSNorm}


def norm(name: str, dim: int) -> nn.Module:
    """The norm called `name` of `dim` channels."""
    if name not in NORMS:
        raise ValueError(f"model.norm_type is {name!r}; use {' or '.join(NORMS)}: model.norm_type=layer")
    return NORMS[name](dim)
