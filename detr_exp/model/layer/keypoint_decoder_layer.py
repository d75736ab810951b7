"""Decoder layer in which every query has tokens for the keypoints of its object.

Yang et al. 2023, "Explicit Box Detection Unifies End-to-End Multi-Person Pose Estimation", and Liu et al. 2023,
"Group Pose", for the idea; RF-DETR for the form.

Legend: B images, Q queries of all groups, K keypoints of all classes, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.attention import SelfAttention
from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.layer.group_decoder_layer import GroupDecoderLayer
from detr_exp.model.layer.group_queries import Start
from detr_exp.model.layer.memory import Memory


class KeypointStart(NamedTuple):
    """Initial content of the keypoints of the queries, and the maps they read.

    Attributes:
        content: `[B, Q, K, D]`.
        position: `[K, D]`.
        allowed: `[1 + K, 1 + K]` bool, which of query and keypoints attend to each other; None: all.
        memory: laid out as that of the queries.
    """

    content: Tensor
    position: Tensor
    allowed: Tensor | None
    memory: Memory


class KeypointDecoderLayer(nn.Module):
    """A `GroupDecoderLayer` for the queries, then four steps for their keypoints.

    Keypoints attend to each other and to their query, read the image around the query's box, and pass a feed-forward
    network. Their update of the query is scaled by `scale`, almost zero before training.

    Args:
        hidden_dim: D.
        num_heads: heads of the self-attentions.
        num_cross_heads: heads of the deformable attentions.
        points_per_level: points each of these heads reads on each level.
        dim_feedforward: width of the queries' feed-forward network; the keypoints' is 4 D.
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
        self.query_layer = GroupDecoderLayer(
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            num_cross_heads=num_cross_heads,
            points_per_level=points_per_level,
            dim_feedforward=dim_feedforward,
        )
        self.self_attn = SelfAttention(hidden_dim, num_heads)
        self.scale = nn.Parameter(torch.full((1,), 1e-6))
        self.query_norm = nn.LayerNorm(hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.cross_attn = DeformableAttention(hidden_dim, num_cross_heads, points_per_level)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.linear1 = nn.Linear(hidden_dim, 4 * hidden_dim)
        self.linear2 = nn.Linear(4 * hidden_dim, hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        for linear in (self.self_attn.out_proj, self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, queries: Tensor, keypoints: Tensor, start: Start, keypoint_start: KeypointStart, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Queries `[B, Q, D]` and keypoints `[B, Q, K, D]` -> the same.

        Args:
            start, memory: of the queries, as in `GroupDecoderLayer`.
            keypoint_start: of their keypoints.
        """
        queries = self.query_layer(queries, start, memory)
        num_keypoints = keypoints.shape[2]

        bundle = torch.cat([queries[:, :, None], keypoints], dim=2)
        positions = F.pad(keypoint_start.position, (0, 0, 1, 0))  # the query has none
        mixed = self.self_attn(bundle.flatten(0, 1), positions, keypoint_start.allowed).view(bundle.shape)
        queries = self.query_norm(queries + mixed[:, :, 0] * self.scale)
        keypoints = self.norm1(keypoints + mixed[:, :, 1:])

        located = (keypoints + start.position[:, :, None]).flatten(1, 2)
        boxes = start.reference.repeat_interleave(num_keypoints, dim=1)
        read = self.cross_attn(located, boxes, keypoint_start.memory)
        keypoints = self.norm2(keypoints + read.view(keypoints.shape))

        return queries, self.norm3(keypoints + self.linear2(F.relu(self.linear1(keypoints))))
