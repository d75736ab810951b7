"""RT-DETRv2 (arXiv 2407.17140), and with equal points on every level RT-DETR (arXiv 2304.08069).

Legend: B images, S cells of all levels, Q matching queries, N denoising queries in front of them, C logits, D channels,
L decoder layers.

Parameters carry the names of the published checkpoints, but for `decoder.decoder.layers` (here `decoder.layers`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_exp.model.adapter.slim import merge
from detr_exp.model.layer.conv import ConvNorm
from detr_exp.model.layer.decoder_layer import DecoderLayer
from detr_exp.model.layer.denoising import NoisyQueries, group_count, noisy_queries
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.query_selection import SELECTIONS, anchor_logits, inverse_sigmoid, top_cells
from detr_exp.model.neck.hybrid_encoder import HybridEncoder, RepVggBlock
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.structures import Denoising, Detections, Outputs, Prediction, Targets


class RawOutputs(NamedTuple):
    """What the compilable part returns: all queries of all supervised layers, stacked."""

    logits: Tensor  # [L, B, N + Q, C]
    boxes: Tensor  # [L, B, N + Q, 4]
    encoder_logits: Tensor  # [B, Q, C], or one class
    encoder_boxes: Tensor  # [B, Q, 4]


class RTDETRv2(nn.Module):
    """Backbone, hybrid encoder and deformable decoder.

    Args:
        num_classes: of the data.
        activation: "sigmoid", or "softmax" with one more logit, the last, for the background.
        backbone: image to maps.
        neck: makes the encoder from the backbone's `channels` and `strides`.
        image_size: (height, width) the network is made for.
        pixel_mean, pixel_std: of RGB in 0..1; null takes the backbone's.
        hidden_dim: D, of the decoder.
        num_layers: L.
        eval_idx: the layer whose predictions count in evaluation; layers beyond it only train.
        num_queries: Q; cells chosen from the encoder.
        num_points: points of each level the decoder reads; levels beyond the encoder's maps are made by striding on.
        cross_attn_method: "bilinear" or "discrete".
        query_select_method: "default", "one2many" or "agnostic".
        learn_query_content: learn what queries start with instead of taking it from the chosen cells.
        look_forward_twice: train each box also through the layer before (DINO, section 3.5).
        num_denoising: denoising positives per image; 0 trains without.
        label_noise_ratio, box_noise_scale: see `noisy_queries`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        backbone: Any,
        neck: Callable[..., HybridEncoder],
        image_size: list[int],
        pixel_mean: list[float] | None,
        pixel_std: list[float] | None,
        hidden_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        eval_idx: int,
        num_queries: int,
        num_points: list[int],
        cross_attn_method: str,
        offset_scale: float,
        query_select_method: str,
        learn_query_content: bool,
        look_forward_twice: bool,
        num_denoising: int,
        label_noise_ratio: float,
        box_noise_scale: float,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        ffn_activation: str,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.activation = activation
        self.cuts_boxes = False  # as the published code does not
        self.tasks: tuple[str, ...] = ("boxes",)
        self.keypoint_counts: tuple[int, ...] = ()
        self.num_queries = num_queries
        self.image_size = (image_size[0], image_size[1])
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.denoising_groups: int | None = None  # set where ranks must agree
        self.fixed_denoising_size = False
        self.backbone = backbone
        self.encoder = neck(channels=backbone.out_channels, strides=backbone.out_strides)
        layers = [
            DecoderLayer(
                hidden_dim=hidden_dim,
                num_heads=num_heads,
                dim_feedforward=dim_feedforward,
                points_per_level=num_points,
                method=cross_attn_method,
                offset_scale=offset_scale,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                act=ffn_activation,
            )
            for _ in range(num_layers)
        ]
        self.decoder = Decoder(
            num_classes=num_classes,
            activation=activation,
            in_channels=self.encoder.out_channels,
            hidden_dim=hidden_dim,
            layers=layers,
            eval_idx=eval_idx,
            num_queries=num_queries,
            num_levels=len(num_points),
            query_select_method=query_select_method,
            learn_query_content=learn_query_content,
            look_forward_twice=look_forward_twice,
            denoising=num_denoising > 0,
        )
        self.stride = max(self.encoder.out_strides)
        cells = sum(height * width for height, width in self.spatial_shapes())
        if num_queries > cells:
            raise ValueError(
                f"model.num_queries is {num_queries} but pictures of {image_size[0]} x {image_size[1]} pixels have "
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
            padding_mask: `[B, H, W]` bool, True where there is no picture.

        Returns:
            `Outputs`; see there what is None in evaluation.
        """
        noisy = self.noisy_queries(targets) if self.training and targets is not None else None
        raw = self.body(images, noisy, padding_mask)
        first = 0 if noisy is None else noisy.labels.shape[1]
        layers = Prediction(raw.logits[:, :, first:], raw.boxes[:, :, first:])
        if not self.training:
            return Outputs(layers)
        encoder = Prediction(raw.encoder_logits, raw.encoder_boxes)
        if noisy is None:
            return Outputs(layers, encoder)
        copies = Prediction(raw.logits[:, :, : noisy.supervised], raw.boxes[:, :, : noisy.supervised])
        return Outputs(layers, encoder, Denoising(copies, noisy.image, noisy.query, noisy.target, noisy.groups))

    def noisy_queries(self, targets: Targets) -> NoisyQueries | None:
        """Denoising queries of a batch; made outside of `body`, because their number depends on it."""
        if not self.num_denoising:
            return None
        return noisy_queries(
            targets,
            num_classes=self.num_classes,
            num_queries=self.num_queries,
            num_denoising=self.num_denoising,
            label_noise_ratio=self.label_noise_ratio,
            box_noise_scale=self.box_noise_scale,
            groups=self.denoising_groups,
            fixed_size=self.fixed_denoising_size,
        )

    def agree_on_denoising(self, most_objects: int) -> None:
        """Make as many denoising groups as fit an image with so many objects, whatever the batch has."""
        if self.num_denoising:
            self.denoising_groups = group_count(self.num_denoising, most_objects)

    def body(self, images: Tensor, noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """The network proper: no host-side decisions on values, so that it compiles as one graph."""
        images = images.to(self.pixel_mean.dtype)
        if self.normalizes:
            images = (images - self.pixel_mean) / self.pixel_std
        maps = self.backbone(images)
        masks = None
        if padding_mask is not None:
            masks = [_padding_at(padding_mask, level.shape[-2:]) for level in maps]
        return self.decoder(self.encoder(maps, masks), noisy, padding_mask)

    def spatial_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each level the decoder reads, for pictures of `image_size`."""
        strides = list(self.encoder.out_strides)
        strides += [self.stride * 2**step for step in range(1, len(self.decoder.input_proj) - len(strides) + 1)]
        return [(math.ceil(self.image_size[0] / s), math.ceil(self.image_size[1] / s)) for s in strides]

    def class_tensors(self) -> dict[str, int]:
        """Names of the tensors that depend on the classes, with the axis along which the classes are."""
        scores = [name for name, _ in self.named_parameters() if ".dec_score_head." in name]
        if self.decoder.query_select_method != "agnostic":
            scores += [name for name, _ in self.named_parameters() if ".enc_score_head." in name]
        embedding = ["decoder.denoising_class_embed.weight"] if self.num_denoising else []
        return dict.fromkeys(scores + embedding, 0)

    def compile(self, *args, **kwargs) -> None:
        """Compile `body` in place; the number of denoising queries is then rounded up, so that shapes repeat."""
        self.fixed_denoising_size = True
        self.body = torch.compile(self.body, *args, **kwargs)  # type: ignore[method-assign]

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of backbone stages and encoder blocks instead of keeping them."""
        self.backbone.set_gradient_checkpointing(enabled)
        self.encoder.gradient_checkpointing = enabled

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        """Detections of each image in pixels; `image_sizes` is `[B, 2]` (height, width) of the original pictures."""
        return best_in_pixels(self, outputs.pred, image_sizes, max_detections).detections()

    @torch.no_grad()
    def deploy(self) -> RTDETRv2:
        """Fold every norm into its convolution and drop what only trains. In place, and not to be trained again."""
        merge(self.eval())
        for module in list(self.modules()):
            if isinstance(module, (ConvNorm, RepVggBlock)):
                module.fold()
        self.decoder.drop_training_parts()
        return self


class Decoder(nn.Module):
    """Query selection and iterative box refinement; arguments as in `RTDETRv2`.

    Args:
        in_channels: of the encoder's maps.
        denoising: whether an embedding of noisy labels is needed.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        in_channels: list[int],
        hidden_dim: int,
        layers: list[DecoderLayer],
        eval_idx: int,
        num_queries: int,
        num_levels: int,
        query_select_method: str,
        learn_query_content: bool,
        look_forward_twice: bool,
        denoising: bool,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.num_queries = num_queries
        self.query_select_method = query_select_method
        self.look_forward_twice = look_forward_twice
        self.eval_idx = _checked_layer(eval_idx, len(layers))
        if query_select_method not in SELECTIONS:
            raise ValueError(
                f"model.query_select_method is {query_select_method!r}; use one of {', '.join(SELECTIONS)}"
            )
        if num_levels < len(in_channels):
            raise ValueError(
                f"model.num_points has {num_levels} counts but the encoder makes {len(in_channels)} maps; give each "
                "map its count, or leave strides out of model.backbone.out_strides"
            )

        self.input_proj = nn.ModuleList(ConvNorm(channels, hidden_dim, 1) for channels in in_channels)
        for channels in [in_channels[-1], *[hidden_dim] * num_levels][: num_levels - len(in_channels)]:
            self.input_proj.append(ConvNorm(channels, hidden_dim, 3, 2))
        self.layers = nn.ModuleList(layers)
        if denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        if learn_query_content:
            self.tgt_embed = nn.Embedding(num_queries, hidden_dim)
        self.query_pos_head = MLP(4, 2 * hidden_dim, hidden_dim, 2)
        self.enc_output = nn.Sequential(
            OrderedDict(proj=nn.Linear(hidden_dim, hidden_dim), norm=nn.LayerNorm(hidden_dim))
        )
        background = int(activation == "softmax")
        encoder_classes = 1 if query_select_method == "agnostic" else num_classes
        self.enc_score_head = nn.Linear(hidden_dim, encoder_classes + background)
        self.enc_bbox_head = MLP(hidden_dim, hidden_dim, 4, 3)
        self.dec_score_head = nn.ModuleList(nn.Linear(hidden_dim, num_classes + background) for _ in layers)
        self.dec_bbox_head = nn.ModuleList(MLP(hidden_dim, hidden_dim, 4, 3) for _ in layers)
        self._initialise()

    def _initialise(self) -> None:
        # Every class starts at a probability of 1 %, so that the many negatives do not swamp the first steps.
        prior = -math.log(99) if self.activation == "sigmoid" else 0.0
        for head in [self.enc_score_head, *self.dec_score_head]:
            nn.init.constant_(head.bias, prior)
        for head in [self.enc_bbox_head, *self.dec_bbox_head]:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        linears = [self.enc_output.proj, *self.query_pos_head.layers, *(proj.conv for proj in self.input_proj)]
        if hasattr(self, "tgt_embed"):
            linears.append(self.tgt_embed)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, maps: list[Tensor], noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """Encoder maps `[B, E, h, w]` -> predictions; arguments as in `RTDETRv2.body`."""
        memory, shapes = self._memory(maps)
        padding = None
        if padding_mask is not None:
            padding = torch.cat([_padding_at(padding_mask, shape).flatten(1) for shape in shapes], dim=1)
        content, reference, encoder_logits = self._select(memory, shapes, padding)
        encoder_boxes = reference.sigmoid()
        reference, allowed = reference.detach(), None
        if noisy is not None:
            content = torch.cat([self.denoising_class_embed(noisy.labels), content], dim=1)
            reference = torch.cat([noisy.boxes, reference], dim=1)
            allowed = noisy.allowed
        logits, boxes = self._decode(content, reference.sigmoid(), memory, shapes, allowed, padding)
        return RawOutputs(torch.stack(logits), torch.stack(boxes), encoder_logits, encoder_boxes)

    def _memory(self, maps: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """All levels as rows `[B, S, D]`, fine to coarse, and their (height, width)."""
        levels = [project(level) for project, level in zip(self.input_proj, maps)]
        source = maps[-1]
        for project in self.input_proj[len(maps) :]:
            levels.append(project(source))
            source = levels[-1]
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1), shapes

    def _select(
        self, memory: Tensor, shapes: list[tuple[int, int]], padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The Q best cells: what queries start with `[B, Q, D]`, box logits `[B, Q, 4]` and class logits.

        Boxes are computed for the chosen cells only; the others would be thrown away.
        """
        exact = torch.promote_types(memory.dtype, torch.float32)
        anchors, valid = anchor_logits(shapes, exact, memory.device, padding)
        features = self.enc_output(memory * valid)
        logits = self.enc_score_head(features)
        chosen = top_cells(logits.detach(), self.num_queries, self.query_select_method, self.activation)[..., None]
        logits = logits.gather(1, chosen.expand(-1, -1, logits.shape[-1])).to(exact)
        features = features.gather(1, chosen.expand(-1, -1, features.shape[-1]))
        anchors = anchors.expand(memory.shape[0], -1, -1).gather(1, chosen.expand(-1, -1, 4))
        boxes = anchors + self.enc_bbox_head(features)
        content = features.detach()
        if hasattr(self, "tgt_embed"):
            content = self.tgt_embed.weight.expand(memory.shape[0], -1, -1)
        return content, boxes, logits

    def _decode(
        self,
        content: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: list[tuple[int, int]],
        allowed: Tensor | None,
        padding: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refine queries and boxes layer by layer; the predictions of the layers that count.

        Args:
            content: `[B, N + Q, D]`.
            reference: `[B, N + Q, 4]` boxes cxcywh in 0..1, without gradient.
        """
        last = len(self.layers) - 1 if self.training else self.eval_idx
        logits, boxes = [], []
        previous = reference
        for index, layer in enumerate(self.layers[: last + 1]):
            position = self.query_pos_head(reference.to(content.dtype))
            content = layer(content, position, reference, memory, shapes, allowed, padding)
            change = self.dec_bbox_head[index](content)
            refined = (change + inverse_sigmoid(reference)).sigmoid()
            if self.training or index == last:
                # The same numbers, but this box also trains the layer before, whose box is not detached.
                twice = index > 0 and self.look_forward_twice and self.training
                boxes.append((change + inverse_sigmoid(previous)).sigmoid() if twice else refined)
                logits.append(self.dec_score_head[index](content).to(refined.dtype))
            previous, reference = refined, refined.detach()
        return logits, boxes

    def drop_training_parts(self) -> None:
        """Remove layers beyond `eval_idx`, heads that evaluation skips, and the denoising embedding."""
        self.layers = self.layers[: self.eval_idx + 1]
        self.dec_bbox_head = self.dec_bbox_head[: self.eval_idx + 1]
        self.dec_score_head = nn.ModuleList([nn.Identity()] * self.eval_idx + [self.dec_score_head[self.eval_idx]])
        if hasattr(self, "denoising_class_embed"):
            del self.denoising_class_embed


def _padding_at(padding_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[B, H, W]` at the centre pixel of every cell: `[B, h, w]`."""
    height, width = padding_mask.shape[1] // shape[0], padding_mask.shape[2] // shape[1]
    return padding_mask[:, height // 2 :: height, width // 2 :: width]


def _checked_layer(eval_idx: int, num_layers: int) -> int:
    """`eval_idx` counted from the front."""
    if not -num_layers <= eval_idx < num_layers:
        raise ValueError(f"model.eval_idx is {eval_idx} but there are {num_layers} layers; use -1 for the last one")
    return eval_idx % num_layers
