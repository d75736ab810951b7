"""Decoder layer with deformable cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_exp.model.layer.activation import activation
from detr_exp.model.layer.attention import SelfAttention
from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.layer.memory import Memory
from detr_exp.ops.products import activated


class Gate(nn.Module):
    """Mixes queries and what they read, channel by channel, in place of a sum (D-FINE, arXiv 2410.13842, "gateway")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, queries: Tensor, read: Tensor) -> Tensor:
        """Two of `[B, Q, D]` -> `[B, Q, D]`."""
        own, other = self.gate(torch.cat([queries, read], dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(own * queries + other * read)


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward network; norms after the sums.

    Args:
        gated: a `Gate` replaces the sum and norm after the deformable attention, which has no projections then.
    """

    def __init__(
        self,
        *,
        hidden_dim: int,
        num_heads: int,
        dim_feedforward: int,
        points_per_level: list[int],
        method: str,
        offset_scale: float,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        act: str,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.self_attn = SelfAttention(hidden_dim, num_heads, attention_dropout)
        self.cross_attn = DeformableAttention(
            hidden_dim, num_heads, points_per_level, method, offset_scale, project=not gated
        )
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        if gated:
            self.gateway = Gate(hidden_dim)
        else:
            self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        self.act = activation(act)
        self.dropout = nn.Dropout(dropout)
        self.activation_dropout = nn.Dropout(activation_dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Memory,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Queries `[B, Q, D]` at `position` `[B, Q, D]` with boxes `reference` `[B, Q, 4]` -> `[B, Q, D]`.

        Args:
            memory: maps that they read.
            allowed: as in `SelfAttention`.
        """
        queries = self.norm1(queries + self.dropout(self.self_attn(queries, position, allowed)))
        read = self.dropout(self.cross_attn(queries + position, reference, memory))
        queries = self.gateway(queries, read) if self.gated else self.norm2(queries + read)
        hidden = self.activation_dropout(activated(self.linear1, self.act, queries))
        change = self.dropout(self.linear2(hidden))
        # Values outside the range of half precision would become NaN in the norm. D-FINE limits all, in any precision.
        if self.gated:
            return self.norm3((queries + change).clamp(-65504.0, 65504.0))
        if change.dtype == torch.float16:
            change = change.clamp(-65504.0, 65504.0)
        return self.norm3(queries + change)
