"""A block of the windowed vision transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_exp.model.layer.attention import attend
from detr_exp.ops.products import activated


class Block(nn.Module):
    """A pre-norm transformer block with layer scale and stochastic depth.

    Args:
        width: channels.
        num_heads: attention heads.
        drop_path: probability of leaving out a residual branch.
        key_bias: whether keys have a bias, as queries and values do; it changes no attention.
        scale: first value of the layer scale.
    """

    def __init__(
        self, *, width: int, num_heads: int, drop_path: float, key_bias: bool = True, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        self.scale1: nn.Parameter | None = nn.Parameter(torch.full((width,), scale))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.scale2: nn.Parameter | None = nn.Parameter(torch.full((width,), scale))

    def forward(self, tokens: Tensor, joined: int, allowed: Tensor | None = None) -> Tensor:
        """`[B * n, t, C]` -> the same; attention spans `joined` consecutive windows.

        Args:
            allowed: `[B * n / joined, joined * t]` bool, the tokens to attend to; None: all.
        """
        tokens = tokens + self._dropped(_scaled(self._attention(self.norm1(tokens), joined, allowed), self.scale1))
        hidden = activated(self.fc1, self.act, self.norm2(tokens))
        return tokens + self._dropped(_scaled(self.fc2(hidden), self.scale2))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the scales of both branches into their last layers, biases into the first; for inference only."""
        for layer, scale in ((self.out, self.scale1), (self.fc2, self.scale2)):
            if scale is not None:
                layer.weight.mul_(scale[:, None])
                layer.bias.mul_(scale)
        self.scale1 = self.scale2 = None
        if (bias := self._bias()) is not None:
            self.qkv.bias = nn.Parameter(bias)
            self.q_bias = self.v_bias = None

    def _bias(self) -> Tensor | None:
        """Of queries, keys and values, where keys have none; None: `qkv` has its own."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def _attention(self, tokens: Tensor, joined: int, allowed: Tensor | None) -> Tensor:
        windows, length, width = tokens.shape
        qkv, bias = self.qkv(tokens), self._bias()
        if bias is not None:
            qkv = qkv + bias.to(qkv.dtype)
        qkv = qkv.view(windows // joined, joined * length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        keys = None if allowed is None else allowed[:, None, None]
        mixed = attend(query, key, value, keys, 0.0, like=self.qkv)
        return self.out(mixed.transpose(1, 2).reshape(windows, length, width))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016), sampled for every window."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        mask = torch.rand(len(branch), 1, 1, dtype=branch.dtype, device=branch.device) < keep
        return branch * mask / keep


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else scale * branch


def fold_scales(network: nn.Module) -> None:
    """`Block.fold` of all blocks in a network."""
    for module in network.modules():
        if isinstance(module, Block):
            module.fold()
