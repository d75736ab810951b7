"""Decoder layer for groups of queries that do not attend to each other."""

from __future__ import annotations

from torch import Tensor, nn

from detr_exp.model.layer.attention import SelfAttention
from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.layer.group_queries import Start
from detr_exp.model.layer.memory import Memory
from detr_exp.ops.products import activated


class GroupDecoderLayer(nn.Module):
    """Self-attention within each group, deformable attention to the memory, feed-forward network; norms after the sums.

    Args:
        hidden_dim: D.
        num_heads: heads of the self-attention.
        num_cross_heads: heads of the deformable attention.
        points_per_level: points each head reads on each level.
        dim_feedforward: width of the feed-forward network.
    """

    def __init__(
        self,
        *,
        hidden_dim: int,
        num_heads: int,
        num_cross_heads: int,
        points_per_level: list[int],
        dim_feedforward: int,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(hidden_dim, num_heads)
        self.cross_attn = DeformableAttention(hidden_dim, num_cross_heads, points_per_level)
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.act = nn.ReLU()
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        for linear in (self.self_attn.out_proj, self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, queries: Tensor, start: Start, memory: Memory) -> Tensor:
        """Queries `[B, G * Q, D]`, group by group -> the same shape.

        Args:
            start: positions, which are added to queries and keys but not to values, and the boxes that are read.
            memory: what they read.
        """
        shape = queries.shape
        apart = (shape[0] * start.groups, -1, shape[-1])
        mixed = self.self_attn(queries.reshape(apart), start.position.reshape(apart))
        queries = self.norm1(queries + mixed.view(shape))
        queries = self.norm2(queries + self.cross_attn(queries + start.position, start.reference, memory))
        return self.norm3(queries + self.linear2(activated(self.linear1, self.act, queries)))
