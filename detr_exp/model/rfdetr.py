"""RF-DETR: a windowed DINOv2, one map, and a light decoder trained with groups of queries.

Robinson et al. 2025, "RF-DETR: Neural Architecture Search for Real-Time Detection Transformers", on top of LW-DETR
(Chen et al. 2024).

Legend: B images, G groups of queries in training (1 in evaluation), Q queries a group, L decoder layers, S cells of
all levels, D width, C logits a query.

What differs from other DETRs: queries learn their content and take only their reference box from the image; that
reference stays the same through all decoder layers; boxes are not squashed into the image. A query has one logit for
every label and no more: published files for COCO have 91, one for each of the category ids 0..90, and fit a data set
whose labels are those ids (`data.category_ids=raw`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.group_decoder_layer import GroupDecoderLayer
from detr_exp.model.layer.group_selection import GroupSelection, grid_proposals, picture_extent
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.reference import embed_boxes, refine_boxes
from detr_exp.model.postprocess import detections
from detr_exp.ops.deformable import Shapes
from detr_exp.structures import Detections, Outputs, Prediction, Targets

PRIOR = 0.01  # score of every class before training


class RFDETR(nn.Module):
    """The network.

    Args:
        num_classes: labels of the data set.
        activation: of the class logits, as the loss wants them: "sigmoid", or "softmax" with one more column, the last,
            for background.
        backbone: images to maps of one resolution.
        neck: makes the neck, given the backbone's channels and strides.
        image_size: (height, width) the network is made for.
        pixel_mean, pixel_std: of RGB in 0..1; null takes the backbone's.
        hidden_dim: D.
        num_layers: L.
        num_heads: heads of the self-attention.
        num_cross_heads: heads of the deformable attention.
        num_points: points each of them reads on each level.
        dim_feedforward: width of the feed-forward networks.
        num_queries: Q; fewer where the image has fewer cells.
        num_groups: G; more groups learn faster and cost time and memory, in training only.
    """

    backbone: Any
    neck: Any
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        backbone: nn.Module,
        neck: Callable[..., nn.Module],
        image_size: list[int],
        pixel_mean: list[float] | None,
        pixel_std: list[float] | None,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        num_cross_heads: int,
        num_points: int,
        dim_feedforward: int,
        num_queries: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.activation = activation
        self.image_size = (image_size[0], image_size[1])
        self.num_queries = num_queries
        self.num_groups = num_groups
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            values = values or getattr(backbone, name)
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.backbone = backbone
        self.neck = neck(channels=backbone.out_channels, strides=backbone.out_strides, hidden_dim=hidden_dim)
        self.stride = getattr(backbone, "stride", max(self.neck.out_strides))
        num_logits = num_classes + (activation == "softmax")
        self.selection = GroupSelection(
            hidden_dim=hidden_dim, num_logits=num_logits, num_queries=num_queries, num_groups=num_groups
        )
        self.query_content = nn.Parameter(torch.randn(num_groups, num_queries, hidden_dim))
        self.query_delta = nn.Parameter(torch.zeros(num_groups, num_queries, 4))
        self.position_mlp = MLP(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.layers = nn.ModuleList(
            GroupDecoderLayer(
                hidden_dim=hidden_dim,
                num_heads=num_heads,
                num_cross_heads=num_cross_heads,
                points_per_level=[num_points] * len(self.neck.out_strides),
                dim_feedforward=dim_feedforward,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_logits)
        self.box_head = MLP(hidden_dim, hidden_dim, 4, 3)
        self._initialise()

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass; the decoder's are small."""
        self.backbone.set_gradient_checkpointing(enabled)

    def forward(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        """Predict objects.

        Args:
            images: `[B, 3, H, W]` RGB in 0..1.
            targets: not used; there are no denoising queries.
            padding_mask: `[B, H, W]` bool, True where there is no picture.
        """
        groups = self.num_groups if self.training else 1
        maps = self.neck(self.backbone((images - self.pixel_mean) / self.pixel_std))
        shapes: Shapes = [(one.shape[-2], one.shape[-1]) for one in maps]
        memory = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)
        padding = None if padding_mask is None else _padding_of_levels(padding_mask, shapes)
        proposals, valid = grid_proposals(shapes, padding, memory.device)
        selected = self.selection(memory, proposals, valid, groups)
        reference, hidden = self._decode(memory, shapes, padding, selected.boxes.detach(), groups)
        layers = Prediction(self.class_head(hidden), refine_boxes(self.box_head(hidden), reference))
        if not self.training:
            return Outputs(layers)
        return Outputs(layers, encoder=Prediction(selected.logits, selected.boxes), groups=groups)

    def _decode(
        self, memory: Tensor, shapes: Shapes, padding: list[Tensor] | None, boxes: Tensor, groups: int
    ) -> tuple[Tensor, Tensor]:
        """Refine what the queries know.

        Returns:
            the reference boxes `[B, G * Q, 4]`, and the queries after each layer `[L, B, G * Q, D]`; only after the
            last one in evaluation.
        """
        per_group = boxes.shape[1] // groups
        reference = refine_boxes(self.query_delta[:groups, :per_group].flatten(0, 1), boxes)
        queries = self.query_content[:groups, :per_group].flatten(0, 1).expand(len(memory), -1, -1)
        # References are relative to the picture, cells to the canvas it lies on.
        seen = reference if padding is None else reference * _picture_share(padding[0])
        hidden_padding = None if padding is None else torch.cat([mask.flatten(1) for mask in padding], dim=1)
        position = self.position_mlp(embed_boxes(seen, queries.shape[-1] // 2))
        hidden = []
        for layer in self.layers:
            queries = layer(queries, position, seen, memory, shapes, groups, hidden_padding)
            hidden.append(queries)
        return reference, self.norm(torch.stack(hidden if self.training else hidden[-1:]))

    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        """Detections of each image in pixels; `image_sizes` is `[B, 2]` (height, width) of the original pictures."""
        found = detections(outputs.pred, image_sizes, max_detections or self.num_queries, self.activation)
        return [inside_picture(one, size) for one, size in zip(found, image_sizes)]

    def class_tensors(self) -> dict[str, int]:
        """Tensors of the state dict that depend on the classes, and their axis of classes."""
        axes = {"class_head": 0, "selection.classify": 1}
        return {f"{head}.{kind}": axis for head, axis in axes.items() for kind in ("weight", "bias")}

    @torch.no_grad()
    def deploy(self) -> RFDETR:
        """Drop the query groups that only train. In place, and not to be trained again."""
        self.eval()
        self.selection.keep_groups(1)
        self.query_content = nn.Parameter(self.query_content[:1].clone())
        self.query_delta = nn.Parameter(self.query_delta[:1].clone())
        self.num_groups = 1
        return self

    def _initialise(self) -> None:
        for parameter in self.position_mlp.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if self.activation == "sigmoid":
            nn.init.constant_(self.class_head.bias, -math.log((1 - PRIOR) / PRIOR))
        for parameter in self.box_head.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self._copy_heads_to_groups()

    @torch.no_grad()
    def _copy_heads_to_groups(self) -> None:
        """Every group of the selection starts with the decoder's heads."""
        heads = [self.class_head, *self.box_head.layers]
        for grouped, head in zip([self.selection.classify, *self.selection.box], heads):
            grouped.weight.copy_(head.weight)
            grouped.bias.copy_(head.bias)


def inside_picture(found: Detections, image_size: Tensor) -> Detections:
    """Detections with their boxes cut to the picture of (height, width) `image_size`, which they may leave."""
    limit = image_size.to(found.boxes).flip(0).tile(2)
    return replace(found, boxes=torch.minimum(found.boxes.clamp(min=0), limit))


def _padding_of_levels(padding_mask: Tensor, shapes: Shapes) -> list[Tensor]:
    """`[B, H, W]` bool -> the same for the cells of each level."""
    pixels = padding_mask[:, None].float()
    return [F.interpolate(pixels, size=shape)[:, 0].bool() for shape in shapes]


def _picture_share(padding: Tensor) -> Tensor:
    """The picture's share of its canvas, `[B, 1, 4]` (width, height, width, height)."""
    share = picture_extent(padding) / torch.tensor([padding.shape[2], padding.shape[1]], device=padding.device)
    return share.repeat(1, 2)[:, None]
