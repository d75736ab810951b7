"""Transformer encoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from detr_exp.model.layer.activation import activation
from detr_exp.model.layer.attention import SelfAttention
from detr_exp.ops.products import activated


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each normalised after its residual sum."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, *, dropout: float, act: str) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.act = activation(act)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, D]` with positions `[N, D]` -> `[B, N, D]`; `allowed` as in `SelfAttention`."""
        tokens = self.norm1(tokens + self.dropout(self.self_attn(tokens, position, allowed)))
        hidden = self.dropout(activated(self.linear1, self.act, tokens))
        return self.norm2(tokens + self.dropout(self.linear2(hidden)))
