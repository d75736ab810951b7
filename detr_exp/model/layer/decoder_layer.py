"""Decoder layer with deformable cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_exp.model.layer.activation import feed_forward_activation
from detr_exp.model.layer.attention import SelfAttention
from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.layer.memory import Memory
from detr_exp.model.layer.norm import norm
from detr_exp.ops.products import activated


class Gate(nn.Module):
    """Mixes queries and what they read, channel by channel, in place of a sum (D-FINE, arXiv 2410.13842, "gateway")."""

    def __init__(self, dim: int, norm_type: str) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = norm(norm_type, dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, queries: Tensor, read: Tensor) -> Tensor:
        """Two of `[B, Q, D]` -> `[B, Q, D]`."""
        own, other = self.gate(torch.cat([queries, read], dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(own * queries + other * read)


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward network; norms after the sums.

    Args:
        project: whether the deformable attention has projections, as in RT-DETR. Without, values are limited to the
            range of half precision in any precision, as in D-FINE.
        gated: a `Gate` replaces the sum and norm after the deformable attention.
        norm_type: of all norms, see `layer.norm`.
        act: of the feed-forward network; "swiglu" leaves half of its `dim_feedforward` channels.
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
        project: bool = True,
        gated: bool = False,
        norm_type: str = "layer",
    ) -> None:
        super().__init__()
        self.gated, self.is_limited = gated, not project
        self.self_attn = SelfAttention(hidden_dim, num_heads, attention_dropout)
        self.cross_attn = DeformableAttention(
            hidden_dim, num_heads, points_per_level, method, offset_scale, project=project
        )
        self.act, width = feed_forward_activation(act, dim_feedforward)
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(width, hidden_dim)
        self.norm1 = norm(norm_type, hidden_dim)
        if gated:
            self.gateway = Gate(hidden_dim, norm_type)
        else:
            self.norm2 = norm(norm_type, hidden_dim)
        self.norm3 = norm(norm_type, hidden_dim)
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
        if self.is_limited:
            return self.norm3((queries + change).clamp(-65504.0, 65504.0))
        if change.dtype == torch.float16:
            change = change.clamp(-65504.0, 65504.0)
        return self.norm3(queries + change)
