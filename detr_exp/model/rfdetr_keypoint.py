"""RF-DETR with keypoints: as `rfdetr.py`, with a second stream through the decoder.

Legend: as there, and N keypoints of all classes, K the largest number of one class. `head/keypoint.py` describes
the predictions of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from detr_exp.model.adapter.slim import merge
from detr_exp.model.decoder.rfdetr_keypoint import Decoder
from detr_exp.model.head.detection import DetectionHead
from detr_exp.model.head.keypoint import (
    CHANNELS,
    KeypointQueries,
    attention_among,
    class_evidence,
    placed_keypoints,
    with_keypoints,
)
from detr_exp.model.layer.conv import fold_convolutions
from detr_exp.model.layer.depth import Layered, layer_by_layer
from detr_exp.model.layer.group_queries import GroupMLP, GroupQueries, Selection
from detr_exp.model.layer.keypoint_decoder_layer import KeypointStart
from detr_exp.model.layer.memory import Memory, seen_by
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.position import fit_positions
from detr_exp.model.layer.vit_block import fold_scales
from detr_exp.model.member import Extent, Member
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.model.rfdetr import class_tensors, compute_as
from detr_exp.ops.transfer import to_device
from detr_exp.protocols import Backbone, Neck, Strided, complete
from detr_exp.structures import Detections, Outputs, Prediction, Targets


class RFDETRKeypoint(nn.Module):
    """The network.

    Args:
        keypoint_counts: keypoints of each class of the data set, 0 where it has none.
        score_alpha: how much uncertain keypoints lower the score of a detection; 0: not at all.
        decoder: as in `RFDETR`, called as `KeypointDecoder`.
        num_classes, activation, backbone, neck, image_size, pixel_mean, pixel_std, hidden_dim, num_layers, num_queries,
            num_groups: as in `RFDETR`.
    """

    backbone: Backbone
    neck: Neck
    keypoint_neck: Neck
    layers: Decoder
    pixel_mean: Tensor
    pixel_std: Tensor
    allowed: Tensor | None

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        keypoint_counts: list[int],
        score_alpha: float,
        backbone: Backbone,
        neck: Callable[..., Neck],
        decoder: Callable[..., Decoder],
        image_size: list[int],
        pixel_mean: list[float] | None,
        pixel_std: list[float] | None,
        hidden_dim: int,
        num_layers: int,
        num_queries: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        _check_counts(keypoint_counts, num_classes)
        if score_alpha < 0:
            raise ValueError(f"model.score_alpha is {score_alpha}; it must be at least 0: model.score_alpha=0.2")
        self.num_classes = num_classes
        self.activation = activation
        self.cuts_boxes = True  # as the published code does
        self.keypoint_counts = tuple(keypoint_counts)
        self.score_alpha = score_alpha
        self.image_size = (image_size[0], image_size[1])
        self.num_queries = num_queries
        self.num_groups = num_groups
        self.own, self.member = Extent(num_layers, num_queries, self.image_size), Member()
        self.tasks: tuple[str, ...] = ("boxes", "keypoints")
        mean, std = pixel_mean or backbone.pixel_mean, pixel_std or backbone.pixel_std
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.backbone = backbone
        made_for = dict(channels=backbone.out_channels, strides=backbone.out_strides, hidden_dim=hidden_dim)
        self.neck, self.keypoint_neck = neck(**made_for), neck(**made_for)
        self.map_channels, self.map_strides = self.neck.out_channels, self.neck.out_strides
        self.shows_maps = False
        self.stride = backbone.stride if isinstance(backbone, Strided) else max(self.neck.out_strides)
        num_logits = num_classes + (activation == "softmax")
        self.queries = GroupQueries(
            hidden_dim=hidden_dim, num_logits=num_logits, num_queries=num_queries, num_groups=num_groups
        )
        num_keypoints = sum(keypoint_counts)
        self.keypoint_queries = KeypointQueries(hidden_dim=hidden_dim, num_keypoints=num_keypoints)
        self.encoder_keypoint_queries = KeypointQueries(hidden_dim=hidden_dim, num_keypoints=num_keypoints)
        self.keypoint_position = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_keypoints, hidden_dim)))
        self.register_buffer("allowed", attention_among(self.keypoint_counts), persistent=False)
        made = decoder(hidden_dim=hidden_dim, num_layers=num_layers, num_levels=len(self.neck.out_strides))
        self.layers = complete(made, Decoder, "model.decoder", type(made).__name__)
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = DetectionHead(hidden_dim=hidden_dim, num_logits=num_logits, activation=activation)
        self.keypoint_head = MLP(hidden_dim, hidden_dim, CHANNELS, 3)
        self.encoder_keypoint_head = GroupMLP(num_groups, hidden_dim, CHANNELS)
        for parameter in self.keypoint_head.layers[-1].parameters():  # the centre of the box, unit variance
            nn.init.zeros_(parameter)
        self.queries.class_head.copy_(self.head.classes)
        self.queries.box_head.copy_(self.head.box)
        self.encoder_keypoint_head.copy_(self.keypoint_head)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.set_gradient_checkpointing(enabled)

    def agree_on_denoising(self, most_objects: int) -> None:
        """There are no denoising queries, so nothing depends on the number of objects."""

    def forward(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        """Predict objects and their keypoints `[..., C * K, 8]`, class by class.

        Args:
            images: `[B, 3, H, W]` RGB in 0..1.
            targets: not used; there are no denoising queries.
            padding_mask: `[B, H, W]` bool, True where there is no image.
        """
        return self.decode(self.encode(images, padding_mask), padding_mask, images.shape[-2:])

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
        """See `model.member.Elastic`: the maps for boxes, then as many for keypoints."""
        maps = seen_by(self.backbone, (images - self.pixel_mean) / self.pixel_std, padding_mask)
        return [*self.neck(maps), *self.keypoint_neck(maps)]

    def decode(self, maps: list[Tensor], padding_mask: Tensor | None, size: torch.Size) -> Outputs:
        """See `model.member.Elastic`; also in training."""
        groups, half = self.num_groups if self.training else 1, len(maps) // 2
        memory, keypoint_memory = (Memory.of(part, padding_mask) for part in (maps[:half], maps[half:]))
        selected, start = self.queries(memory, groups)
        content = self.keypoint_queries(start.content)
        keypoint_start = KeypointStart(content, self.keypoint_position, self.allowed, keypoint_memory)
        hidden, keypoints = self.layers(start, keypoint_start, memory)
        logits, boxes = layer_by_layer(
            lambda states: self.head(self.norm(states), start.reference), hidden, self.training
        )
        (output,) = layer_by_layer(lambda states: (self.keypoint_head(states),), keypoints, self.training)
        layers = self._predicted(logits, boxes, output, start.reference)
        encoder = self._of_encoder(selected, groups) if self.training else None
        return Outputs(layers, encoder, groups=groups, maps=maps[:half] if self.shows_maps else None)

    def _of_encoder(self, selected: Selection, groups: int) -> Prediction:
        """Predictions of the selected cells, with keypoints by each group's own head."""
        tokens = self.encoder_keypoint_queries(selected.tokens)  # [B, G * Q, N, D]
        by_group = tokens.unflatten(1, (groups, -1)).transpose(0, 1).flatten(2, 3)
        output = self.encoder_keypoint_head(by_group).transpose(0, 1).reshape(*tokens.shape[:3], CHANNELS)
        return self._predicted(selected.logits, selected.boxes, output, selected.boxes)

    def _predicted(self, logits: Tensor, boxes: Tensor, output: Tensor, reference: Tensor) -> Prediction:
        keypoints = placed_keypoints(output, reference, self.keypoint_counts)
        evidence = class_evidence(keypoints, self.keypoint_counts, logits.shape[-1])
        return Prediction(logits + evidence, boxes, keypoints=keypoints)

    @property
    def most_layers(self) -> int:
        """See `model.member.Elastic`."""
        return self.layers.num_layers if isinstance(self.layers, Layered) else self.own.layers

    def set_member(self, member: Member, *, every_layer: bool = False) -> None:
        """See `model.member.Elastic`."""
        compute_as(self, member, [self.layers], every_layer)

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        """Detections of each image in pixels, with keypoints and their covariances.

        Args:
            image_sizes: `[B, 2]` (height, width) of the original images.
            max_detections: of each image; None: the number of queries.
        """
        pred = outputs.pred
        assert pred.keypoints is not None
        image_sizes = to_device(image_sizes, pred.boxes.device)
        best = best_in_pixels(self, pred, image_sizes, max_detections)
        parts = with_keypoints(best, pred.keypoints, pred.boxes, self.keypoint_counts, image_sizes, self.score_alpha)
        return [
            Detections(scores, labels, boxes, keypoints=points, keypoint_covariance=covariance)
            for scores, labels, boxes, points, covariance in zip(*parts)
        ]

    def class_tensors(self) -> dict[str, int]:
        """Tensors of the state dict that depend on the classes, and their axis of classes."""
        return class_tensors()

    def deploy(self) -> RFDETRKeypoint:
        """Fold scales and norms, and drop what only training uses, in place; no training afterwards."""
        merge(self.eval())
        fold_scales(self)
        fold_convolutions(self)
        self.queries.keep_groups(1)
        self.num_groups = 1
        del self.encoder_keypoint_queries, self.encoder_keypoint_head
        if isinstance(self.layers, Layered):
            self.layers.shorten()
        fit_positions(self, self.image_size)
        self.own = self.member.of(self.own)
        return self


def _check_counts(keypoint_counts: list[int], num_classes: int) -> None:
    if len(keypoint_counts) != num_classes or not any(keypoint_counts):
        raise ValueError(
            f"model.keypoint_counts is {list(keypoint_counts)} for {num_classes} classes; it needs the number of "
            "keypoints of each class, at least one of them positive; model.keypoint_counts=null uses those of the data"
        )
