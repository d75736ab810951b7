"""Self-attention whose queries and keys, but not values, include the position."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.ops import products
from detr_exp.ops.products import linear_like


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`: one packed input projection."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be split into {num_heads} heads; change model.num_heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens: Tensor, position: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, D]` -> `[B, N, D]`.

        Args:
            position: added to the inputs of queries and keys, broadcastable to `tokens`.
            allowed: bool, broadcastable to `[B, heads, N, N]`; True where a query (row) may attend to a key (column).
        """
        dim, linear = tokens.shape[-1], linear_like(self.out_proj)
        # other layouts torch multiplies image by image where a weight needs no gradient (one that is frozen, or that an
        # adapter computes), and as one matrix where it does, which may round differently
        tokens = tokens.contiguous()
        if position is None:
            query, key, value = linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            placed = linear(tokens + position, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim])
            query, key = placed.chunk(2, dim=-1)
            value = linear(tokens, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, allowed, dropout, like=self.out_proj)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float, *, like: nn.Module
) -> Tensor:
    """Scaled dot-product attention of `[B, heads, N, d]`; `allowed` as in `SelfAttention`.

    On CPU torch has no fast kernel for bfloat16: written out, both passes need less than half the time. Queries
    are scaled, because there are fewer of them than of scores. For float32 torch asks the library of its own products,
    which may be the slower one; without gradients that of `like`, a linear layer, multiplies.
    """
    if allowed is None and not dropout and products.are_worth_it(query, key, like):
        return _by_heads(query, key, value)
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        scores = scores + torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, -torch.inf)
    shares = scores.softmax(-1)
    return (F.dropout(shares, dropout) if dropout else shares) @ value


def _by_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one head after another; a layer of all heads would need a copy of all scores."""
    parts = [part.contiguous().flatten(0, 1) for part in (query, key * query.shape[-1] ** -0.5, value)]
    mixed = [products.linear(products.linear(q, k, None).softmax(-1), v.t(), None) for q, k, v in zip(*parts)]
    return torch.stack(mixed).view(query.shape)
