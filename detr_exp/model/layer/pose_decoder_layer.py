"""A decoder layer of poses: attention within each instance, across instances, and to the maps (DETRPose).

Legend: B images, Q queries, T = 1 + K tokens of a query: one of the instance, then one of each keypoint; D channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from detr_exp.model.layer.activation import feed_forward_activation
from detr_exp.model.layer.attention import SelfAttention
from detr_exp.model.layer.decoder_layer import Gate
from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.layer.memory import Memory
from detr_exp.ops.products import activated


class PoseDecoderLayer(nn.Module):
    """See above. Positions are added to the tokens themselves, not only to queries and keys.

    Args:
        method: of the deformable attention.
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
        act: str,
    ) -> None:
        super().__init__()
        self.within_attn = SelfAttention(hidden_dim, num_heads)
        self.within_norm = nn.LayerNorm(hidden_dim)
        self.across_attn = SelfAttention(hidden_dim, num_heads)
        self.across_norm = nn.LayerNorm(hidden_dim)
        self.cross_attn = DeformableAttention(hidden_dim, num_heads, points_per_level, method, project=False)
        self.gateway = Gate(hidden_dim, "layer")
        self.act, width = feed_forward_activation(act, dim_feedforward)
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(width, hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, placed: Tensor, position: Tensor, reference: Tensor, memory: Memory, allowed: Tensor | None = None
    ) -> Tensor:
        """Tokens `[B, Q, T, D]` with their positions -> tokens without.

        Args:
            position: `[B, Q, T, D]`; zero of the instance.
            reference: `[B, Q, T, 2]` points in 0..1.
            memory: maps that they read.
            allowed: as in `SelfAttention`, across instances.
        """
        batch, queries, count, _ = placed.shape
        tokens = placed.flatten(0, 1)
        tokens = self.within_norm(tokens + self.within_attn(tokens))
        tokens = tokens.unflatten(0, (batch, queries)).transpose(1, 2).flatten(0, 1)  # [B * T, Q, D]
        tokens = self.across_norm(tokens + self.across_attn(tokens, None, allowed))
        tokens = tokens.unflatten(0, (batch, count)).transpose(1, 2)
        tokens = (tokens + position).flatten(1, 2)
        tokens = self.gateway(tokens, self.cross_attn(tokens, reference.flatten(1, 2), memory))
        change = self.linear2(activated(self.linear1, self.act, tokens))
        limited = (tokens + change).clamp(-65504.0, 65504.0)  # of half precision, in any precision, as in D-FINE
        return self.norm3(limited).unflatten(1, (queries, count))
