"""RF-DETR: a windowed DINOv2, one map, and a light decoder trained with groups of queries.

Robinson et al. 2025, "RF-DETR: Neural Architecture Search for Real-Time Detection Transformers", on top of LW-DETR
(Chen et al. 2024).

Legend: B images, G groups of queries in training (1 in evaluation), Q queries a group, L decoder layers, D width,
C logits a query.

Differences from other DETRs: the content of queries is learned and only their reference box comes from the image; that
reference is the same in all decoder layers; boxes are not clipped to the image. A query has one logit for
every label and no more: published files for COCO have 91, one for each of the category ids 0..90, and fit a data set
whose labels are those ids (`data.category_ids=raw`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from detr_exp.model.adapter.slim import merge
from detr_exp.model.decoder.rfdetr import Decoder
from detr_exp.model.head.detection import DetectionHead
from detr_exp.model.head.mask import Head, add_masks
from detr_exp.model.layer.conv import fold_convolutions
from detr_exp.model.layer.depth import Layered, layer_by_layer
from detr_exp.model.layer.group_queries import GroupQueries
from detr_exp.model.layer.memory import Memory, seen_by
from detr_exp.model.layer.position import fit_positions
from detr_exp.model.layer.vit_block import fold_scales
from detr_exp.model.member import Extent, Member, refuse_impossible, refuse_rigid
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.protocols import Backbone, Neck, Strided, complete
from detr_exp.structures import Detections, Outputs, Prediction, Targets


class RFDETR(nn.Module):
    """The network.

    Args:
        num_classes: labels of the data set.
        activation: of the class logits, as the loss requires: "sigmoid", or "softmax" with one more column, the last,
            for background.
        backbone: images to maps of one resolution.
        neck: makes the neck, given the backbone's channels and strides and D.
        decoder: makes the layers between the first queries and the head, given D, L and the number of the neck's maps;
            called as `GroupDecoder`.
        image_size: (height, width) the network is made for.
        pixel_mean, pixel_std: of RGB in 0..1; null takes the backbone's.
        hidden_dim: D.
        num_layers: L.
        num_queries: Q; fewer where the image has fewer cells.
        num_groups: G; more groups train faster and use more time and memory, in training only.
        mask_head: makes the head that predicts masks, given D and L; None predicts boxes only.
    """

    backbone: Backbone
    neck: Neck
    layers: Decoder
    mask_head: Head | None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
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
        mask_head: Callable[..., Head] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.activation = activation
        self.cuts_boxes = True  # as the published code does
        self.image_size = (image_size[0], image_size[1])
        self.num_queries = num_queries
        self.num_groups = num_groups
        self.own, self.member = Extent(num_layers, num_queries, self.image_size), Member()
        self.tasks: tuple[str, ...] = ("boxes",) if mask_head is None else ("boxes", "masks")
        self.keypoint_counts: tuple[int, ...] = ()
        mean, std = pixel_mean or backbone.pixel_mean, pixel_std or backbone.pixel_std
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.backbone = backbone
        self.neck = neck(channels=backbone.out_channels, strides=backbone.out_strides, hidden_dim=hidden_dim)
        self.map_channels, self.map_strides = self.neck.out_channels, self.neck.out_strides
        self.shows_maps = False
        self.stride = backbone.stride if isinstance(backbone, Strided) else max(self.neck.out_strides)
        num_logits = num_classes + (activation == "softmax")
        self.queries = GroupQueries(
            hidden_dim=hidden_dim, num_logits=num_logits, num_queries=num_queries, num_groups=num_groups
        )
        made = decoder(hidden_dim=hidden_dim, num_layers=num_layers, num_levels=len(self.neck.out_strides))
        self.layers = complete(made, Decoder, "model.decoder", type(made).__name__)
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = DetectionHead(hidden_dim=hidden_dim, num_logits=num_logits, activation=activation)
        self.queries.class_head.copy_(self.head.classes)
        self.queries.box_head.copy_(self.head.box)
        self.mask_head = None
        if mask_head is not None:
            head = mask_head(hidden_dim=hidden_dim, num_layers=num_layers)
            self.mask_head = complete(head, Head, "model.mask_head", type(head).__name__)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass; the decoder's are small."""
        self.backbone.set_gradient_checkpointing(enabled)

    def agree_on_denoising(self, most_objects: int) -> None:
        """There are no denoising queries, so nothing depends on the number of objects."""

    def forward(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        """Predict objects.

        Args:
            images: `[B, 3, H, W]` RGB in 0..1.
            targets: not used; there are no denoising queries.
            padding_mask: `[B, H, W]` bool, True where there is no image.
        """
        return self.decode(self.encode(images, padding_mask), padding_mask, images.shape[-2:])

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
        """See `model.member.Elastic`."""
        return self.neck(seen_by(self.backbone, (images - self.pixel_mean) / self.pixel_std, padding_mask))

    def decode(self, maps: list[Tensor], padding_mask: Tensor | None, size: torch.Size) -> Outputs:
        """See `model.member.Elastic`; also in training."""
        groups = self.num_groups if self.training else 1
        memory = Memory.of(maps, padding_mask)
        selected, start = self.queries(memory, groups)
        hidden = self.norm(self.layers(start, memory))
        logits, boxes = layer_by_layer(lambda states: self.head(states, start.reference), hidden, self.training)
        layers = Prediction(logits, boxes)
        encoder = Prediction(selected.logits, selected.boxes) if self.training else None
        if self.mask_head is not None:
            pixels = self.mask_head.start(maps[0], size)
            layers = layers._replace(masks=self.mask_head(pixels, hidden))
            if encoder is not None:
                encoder = encoder._replace(masks=self.mask_head.of_encoder(pixels, selected.tokens))
        return Outputs(layers, encoder, groups=groups, maps=maps if self.shows_maps else None)

    @property
    def most_layers(self) -> int:
        """See `model.member.Elastic`."""
        return self.layers.num_layers if isinstance(self.layers, Layered) else self.own.layers

    def set_member(self, member: Member, *, every_layer: bool = False) -> None:
        """See `model.member.Elastic`."""
        compute_as(self, member, [self.layers, *([] if self.mask_head is None else [self.mask_head])], every_layer)

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        """Detections of each image in pixels, cut to the image, because boxes may leave it.

        Args:
            image_sizes: `[B, 2]` (height, width) of the original images, on the host: masks get these sizes, which
                would have to be waited for elsewhere.
            max_detections: of each image; None: the number of queries.
        """
        pred = outputs.pred
        best = best_in_pixels(self, pred, image_sizes, max_detections)
        detections = best.detections()
        if pred.masks is not None:
            add_masks(detections, pred.masks, best.queries, image_sizes)
        return detections

    def class_tensors(self) -> dict[str, int]:
        """Tensors of the state dict that depend on the classes, and their axis of classes."""
        return class_tensors()

    def deploy(self) -> RFDETR:
        """Fold scales and norms, and drop the query groups used only in training, in place; no training afterwards."""
        merge(self.eval())
        fold_scales(self)
        fold_convolutions(self)
        self.queries.keep_groups(1)
        self.num_groups = 1
        for part in (self.layers, self.mask_head):
            if isinstance(part, Layered):
                part.shorten()
        fit_positions(self, self.image_size)
        self.own = self.member.of(self.own)
        return self


class Grouped(Protocol):
    """What both RF-DETR networks have."""

    own: Extent
    member: Member
    num_queries: int
    image_size: tuple[int, int]
    stride: int
    neck: Neck
    queries: GroupQueries

    @property
    def most_layers(self) -> int: ...


def compute_as(network: Grouped, member: Member, parts: Sequence[object], every_layer: bool) -> None:
    """`set_member` of both RF-DETR networks, whose `parts` compute layer by layer."""
    for part in parts:
        refuse_rigid(member, part, Layered, "layers")
    refuse_impossible(
        member,
        network.own,
        most_layers=network.most_layers,
        stride=network.stride,
        strides=network.neck.out_strides,
        may_lack_cells=True,
    )
    network.member = member
    _, network.num_queries, network.image_size = member.of(network.own)
    network.queries.num_queries = network.num_queries
    for part in parts:
        if isinstance(part, Layered):
            part.depth, part.every_layer = member.layers, every_layer


def class_tensors() -> dict[str, int]:
    """Tensors of both RF-DETR networks that depend on the classes, and their axis of classes."""
    axes = {"head.classes": 0, "queries.class_head": 1}
    return {f"{head}.{kind}": axis for head, axis in axes.items() for kind in ("weight", "bias")}
