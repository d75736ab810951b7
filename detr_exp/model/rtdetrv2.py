"""RT-DETRv2 (arXiv 2407.17140), and with equal points on every level RT-DETR (arXiv 2304.08069).

Legend: B images, S cells of all levels, Q matching queries, N denoising queries in front of them, C logits, D channels,
L decoder layers.

Parameters carry the names of the published checkpoints, but for `decoder.decoder.layers` (here `decoder.layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from detr_exp.model.adapter.slim import merge
from detr_exp.model.decoder.rtdetr import Decoder, OfKeypoints, RawOutputs, Stopping
from detr_exp.model.head.keypoint import with_points
from detr_exp.model.head.mask import Head, add_masks
from detr_exp.model.layer.conv import ConvNorm
from detr_exp.model.layer.denoising import NoisyQueries, group_count, noisy_queries
from detr_exp.model.layer.depth import Layered
from detr_exp.model.layer.fusion import RepVggBlock
from detr_exp.model.layer.memory import padding_of, seen_by
from detr_exp.model.member import Extent, Member, refuse_impossible, refuse_rigid
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.ops.transfer import to_device
from detr_exp.protocols import Backbone, complete
from detr_exp.structures import Denoising, Detections, Outputs, Prediction, Targets, mapped, predicted


class Neck(Protocol):
    """What `RTDETRv2` needs of its encoder; an `nn.Module`.

    Attributes:
        out_channels, out_strides: of the maps that it makes, from fine to coarse.
        gradient_checkpointing: whether blocks are computed again instead of stored.
    """

    out_channels: list[int]
    out_strides: list[int]
    gradient_checkpointing: bool

    def __call__(self, maps: list[Tensor], padding: list[Tensor] | None = None) -> list[Tensor]:
        """`forward`: maps of the backbone `[B, C_i, h_i, w_i]` and their padding `[B, h_i, w_i]` bool -> maps."""


class RTDETRv2(nn.Module):
    """Backbone, hybrid encoder and deformable decoder.

    Args:
        num_classes: of the data.
        activation: "sigmoid", or "softmax" with one more logit, the last, for the background.
        backbone: image to maps.
        neck: makes the encoder from the backbone's `channels` and `strides`.
        decoder: makes the decoder, a `Decoder`, from the encoder's `channels` and `strides`, the arguments
            `num_classes`, `activation`, `hidden_dim`, `num_layers` and `num_queries` of the network, and whether it
            trains with `denoising`; with keypoints also `num_keypoints` and `num_noise_labels`.
        image_size: (height, width) the network is made for.
        pixel_mean, pixel_std: of RGB in 0..1; null takes the backbone's.
        hidden_dim, num_layers, num_queries: D, L and Q, of the decoder.
        num_denoising: denoising positives per image; 0 trains without.
        label_noise_ratio, box_noise_scale, box_noise_fold: see `noisy_queries`.
        mask_head: makes the head that predicts masks, given D and L; None predicts boxes only.
        keypoint_counts: keypoints of each class, for decoders that predict keypoints; None: for others.
        keypoint_sigmas: OKS scales of the keypoints of the class with most, which denoising moves in their measure.
        num_noise_labels: labels that noise chooses from where the decoder predicts keypoints, at least the classes.
    """

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
        num_denoising: int,
        label_noise_ratio: float,
        box_noise_scale: float,
        box_noise_fold: bool = False,
        mask_head: Callable[..., Head] | None = None,
        keypoint_counts: Sequence[int] | None = None,
        keypoint_sigmas: Sequence[float] | None = None,
        num_noise_labels: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.activation = activation
        self.cuts_boxes = False  # as the published code does not
        self.keypoint_counts = tuple(keypoint_counts or ())
        beside = {"masks": mask_head, "keypoints": keypoint_counts}
        self.tasks = ("boxes", *(task for task, part in beside.items() if part is not None))
        self.keypoint_sigmas = keypoint_sigmas
        self.num_noise_labels = max(num_classes, num_noise_labels)
        self.num_queries = num_queries
        self.image_size = (image_size[0], image_size[1])
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.box_noise_fold = box_noise_fold
        self.denoising_groups: int | None = None  # set where ranks must agree
        self.fixed_denoising_size = False
        self.backbone = backbone
        self.encoder = neck(channels=backbone.out_channels, strides=backbone.out_strides)
        self.map_channels, self.map_strides = self.encoder.out_channels, self.encoder.out_strides
        self.shows_maps = False
        points = {}
        if keypoint_counts is not None:
            points = {"num_keypoints": max(keypoint_counts), "num_noise_labels": self.num_noise_labels}
        made = decoder(
            num_classes=num_classes,
            activation=activation,
            channels=self.encoder.out_channels,
            strides=self.encoder.out_strides,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_queries=num_queries,
            denoising=num_denoising > 0,
            **points,
        )
        self.decoder = complete(made, Decoder, "model.decoder", type(made).__name__)
        self.stride = max(self.encoder.out_strides)
        self.mask_head = None
        if mask_head is not None:
            head = mask_head(hidden_dim=hidden_dim, num_layers=num_layers)
            self.mask_head = complete(head, Head, "model.mask_head", type(head).__name__)
        layers = self.decoder.eval_idx + 1 if isinstance(self.decoder, Stopping) else num_layers
        if mask_head is not None and layers != num_layers:
            raise ValueError(
                f"model.eval_idx is {layers - 1}, but the pixels of masks pass a block for each of {num_layers} "
                f"layers; evaluate the last one, model.eval_idx=-1, or have fewer layers: model.num_layers={layers}"
            )
        self.own, self.member = Extent(layers, num_queries, self.image_size), Member()
        cells = sum(height * width for height, width in self.spatial_shapes())
        if num_queries > cells:
            raise ValueError(
                f"model.num_queries is {num_queries} but images of {image_size[0]} x {image_size[1]} pixels have "
                f"only {cells} cells; lower it or raise model.image_size"
            )
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        mean, std = pixel_mean or backbone.pixel_mean, pixel_std or backbone.pixel_std
        self.normalizes = any(mean) or any(value != 1 for value in std)
        self.register_buffer("pixel_mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        """Detect.

        Args:
            images: `[B, 3, H, W]` RGB in 0..1; both sides are multiples of `stride`.
            targets: only make denoising queries, and only in training.
            padding_mask: `[B, H, W]` bool, True where there is no image.

        Returns:
            `Outputs`, which describes what is None in evaluation.
        """
        noisy = self.noisy_queries(targets) if self.training and targets is not None else None
        raw = self.body(images, noisy, padding_mask)
        layers, initial = _of_queries(raw, slice(noisy and noisy.labels.shape[1], None))
        if not self.training:
            return Outputs(layers, maps=raw.maps)
        if noisy is None:
            return Outputs(layers, raw.encoder, initial=initial, maps=raw.maps)
        copies, before = _of_queries(raw, slice(noisy.supervised))
        denoising = Denoising(copies, noisy.image, noisy.query, noisy.target, noisy.groups, before)
        return Outputs(layers, raw.encoder, denoising, initial=initial, maps=raw.maps)

    def noisy_queries(self, targets: Targets) -> NoisyQueries | None:
        """Denoising queries of a batch; made outside of `body`, because their number depends on the batch."""
        if not self.num_denoising:
            return None
        return noisy_queries(
            targets,
            num_classes=self.num_noise_labels if self.keypoint_counts else self.num_classes,
            num_queries=self.num_queries,
            num_denoising=self.num_denoising,
            label_noise_ratio=self.label_noise_ratio,
            box_noise_scale=self.box_noise_scale,
            box_noise_fold=self.box_noise_fold,
            sigmas=self.keypoint_sigmas,
            image_size=self.image_size,
            groups=self.denoising_groups,
            fixed_size=self.fixed_denoising_size,
        )

    def agree_on_denoising(self, most_objects: int) -> None:
        """Set the number of denoising groups for an image with so many objects, independent of the batch."""
        if self.num_denoising:
            self.denoising_groups = group_count(self.num_denoising, most_objects)

    def body(self, images: Tensor, noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """The network proper: no host-side decisions on values, so that it compiles as one graph."""
        maps = self.encode(images, padding_mask)
        outputs = self._decoded(maps, noisy, padding_mask, images.shape[-2:])
        return outputs._replace(maps=maps) if self.shows_maps else outputs

    def _decoded(
        self, maps: list[Tensor], noisy: NoisyQueries | None, padding_mask: Tensor | None, size: torch.Size
    ) -> RawOutputs:
        raw = self.decoder(maps, noisy, padding_mask)
        if self.mask_head is None:
            return raw._replace(states=None)
        if raw.states is None:
            raise ValueError(
                f"{type(self.decoder).__name__} gives no states of its layers, and masks are predicted from them; use "
                "another model/decoder, or predict boxes only: model.mask_head=null"
            )
        masks = self.mask_head(self.mask_head.start(maps[0], size), torch.stack(raw.states))
        return raw._replace(states=None, masks=masks)

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
        """See `model.member.Elastic`."""
        images = images.to(self.pixel_mean.dtype)
        if self.normalizes:
            images = (images - self.pixel_mean) / self.pixel_std
        maps = seen_by(self.backbone, images, padding_mask)
        masks = None
        if padding_mask is not None:
            masks = padding_of(padding_mask, [(level.shape[-2], level.shape[-1]) for level in maps])
        return self.encoder(maps, masks)

    def decode(self, maps: list[Tensor], padding_mask: Tensor | None, size: torch.Size) -> Outputs:
        """See `model.member.Elastic`."""
        return Outputs(_of_queries(self._decoded(maps, None, padding_mask, size), slice(None))[0])

    @property
    def most_layers(self) -> int:
        """See `model.member.Elastic`."""
        return self.decoder.num_layers if isinstance(self.decoder, Stopping) else self.own.layers

    def set_member(self, member: Member, *, every_layer: bool = False) -> None:
        """See `model.member.Elastic`."""
        refuse_rigid(member, self.decoder, Stopping, "layers", "queries")
        if self.mask_head is not None:
            refuse_rigid(member, self.mask_head, Layered, "layers")
        refuse_impossible(
            member,
            self.own,
            most_layers=self.most_layers,
            stride=self.stride,
            strides=self.decoder.strides,
            may_lack_cells=False,
        )
        self.member = member
        chosen = member.of(self.own)
        self.num_queries, self.image_size = chosen.queries, chosen.image_size
        if isinstance(self.decoder, Stopping):
            self.decoder.num_queries = chosen.queries
            self.decoder.depth, self.decoder.every_layer = member.layers, every_layer
        if isinstance(self.mask_head, Layered):
            self.mask_head.depth, self.mask_head.every_layer = member.layers, every_layer

    def spatial_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each level the decoder reads, for images of `image_size`."""
        return [(math.ceil(self.image_size[0] / s), math.ceil(self.image_size[1] / s)) for s in self.decoder.strides]

    def class_tensors(self) -> dict[str, int]:
        """Names of the tensors that depend on the classes, with the axis along which the classes are."""
        return {f"decoder.{name}": axis for name, axis in self.decoder.class_tensors().items()}

    def keypoint_tensors(self) -> list[str]:
        """See `model.decoder.rtdetr.OfKeypoints`."""
        names = self.decoder.keypoint_tensors() if isinstance(self.decoder, OfKeypoints) else []
        return [f"decoder.{name}" for name in names]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `body` in place; the number of denoising queries is then rounded up, so that shapes repeat."""
        self.fixed_denoising_size = True
        self.body = torch.compile(self.body, *args, **kwargs)  # type: ignore[method-assign]

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of backbone stages and encoder blocks instead of storing them."""
        self.backbone.set_gradient_checkpointing(enabled)
        self.encoder.gradient_checkpointing = enabled

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        """Detections of each image in pixels.

        Args:
            image_sizes: `[B, 2]` (height, width) of the original images; on the host if there are masks.
            max_detections: of each image; None: the number of queries.
        """
        pred = outputs.pred
        best = best_in_pixels(self, pred, image_sizes, max_detections)
        if (points := predicted(pred, "keypoints")) is not None:
            parts = with_points(best, points, self.keypoint_counts, to_device(image_sizes, points.device))
            return [Detections(*part[:3], keypoints=part[3]) for part in zip(*parts)]
        detections = best.detections()
        if (masks := predicted(pred, "masks")) is not None:
            add_masks(detections, masks, best.queries, image_sizes)
        return detections

    @torch.no_grad()
    def deploy(self) -> RTDETRv2:
        """Fold norms into convolutions and drop what only training uses, in place; no training afterwards."""
        merge(self.eval())
        for module in list(self.modules()):
            if isinstance(module, (ConvNorm, RepVggBlock)):
                module.fold()
        self.decoder.drop_training_parts()
        if isinstance(self.mask_head, Layered):
            self.mask_head.shorten()
        self.own = self.member.of(self.own)
        return self


def _of_queries(raw: RawOutputs, queries: slice) -> tuple[Prediction, Prediction | None]:
    """What layers predict for some queries, and what was predicted before them, with the masks of the last layer."""
    layers, initial = raw.layers, raw.initial
    if queries != slice(None):
        layers = mapped(layers, lambda tensor: tensor[:, :, queries])
        initial = mapped(initial, lambda tensor: tensor[:, queries])
    if raw.masks is not None:
        masks = raw.masks._replace(queries=raw.masks.queries[:, :, queries])
        layers = layers._replace(masks=masks)
        initial = None if initial is None else initial._replace(masks=mapped(masks, lambda tensor: tensor[-1]))
    return layers, initial
