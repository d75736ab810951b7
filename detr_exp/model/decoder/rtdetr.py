"""The decoder of RT-DETRv2: query selection, then boxes refined layer by layer (arXiv 2304.08069, section 4.3).

Legend: B images, S cells of all levels, Q matching queries, N denoising queries in front of them, C logits, D channels,
E channels of the encoder, L decoder layers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from detr_exp.model.layer.decoder_layer import DecoderLayer
from detr_exp.model.layer.denoising import NoisyQueries
from detr_exp.model.layer.memory import Memory, level_projections, read_maps
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.query_selection import anchor_logits, checked_selection, inverse_sigmoid, top_cells
from detr_exp.structures import MaskLogits, Prediction


class RawOutputs(NamedTuple):
    """Output of the compilable part of the network: all queries of all supervised layers, stacked.

    Attributes:
        layers: logits `[L, B, N + Q, C]`, boxes `[L, B, N + Q, 4]`; further predictions have the same axes.
        encoder: logits `[B, Q, C]`, or of one class, and boxes `[B, Q, 4]` of the chosen cells.
        initial: of decoders that predict before their layers, logits `[B, N + Q, C]`; None in evaluation.
        states: of the supervised layers, `[B, N + Q, D]` each; None: a network cannot predict masks from them.
        maps, masks: see `Outputs.maps` and `Prediction.masks`; the network adds them.
    """

    layers: Prediction
    encoder: Prediction
    initial: Prediction | None = None
    states: list[Tensor] | None = None
    maps: list[Tensor] | None = None
    masks: MaskLogits | None = None


class Decoder(Protocol):
    """What `RTDETRv2` needs of its decoder; an `nn.Module`."""

    strides: list[int]  # of the levels it reads, ascending

    def __call__(self, maps: list[Tensor], noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """`forward`: maps `[B, E, h, w]` of the encoder -> predictions.

        Args:
            noisy: denoising queries, which come before the others; None without.
            padding_mask: `[B, H, W]` bool, True where there is no image.
        """

    def class_tensors(self) -> dict[str, int]:
        """Tensors of its state dict that depend on the classes, and their axis of classes."""

    def drop_training_parts(self) -> None:
        """Remove what only training uses, in place."""


@runtime_checkable
class Stopping(Protocol):
    """A decoder that can be stopped after any of its layers, and given fewer queries; as `layer.depth.Layered`."""

    eval_idx: int  # the layer whose predictions count in evaluation
    num_queries: int
    depth: int | None
    every_layer: bool
    training: bool

    @property
    def num_layers(self) -> int: ...


@runtime_checkable
class OfKeypoints(Protocol):
    """A part of a network with tensors that are initialised anew where weights are for another number of keypoints."""

    def keypoint_tensors(self) -> list[str]:
        """Their names, also of those that only some configurations have."""


class Selecting(Protocol):
    """The parts of a decoder that make its first queries."""

    activation: str
    num_queries: int
    query_select_method: str
    enc_output: nn.Sequential  # features of cells
    enc_score_head: nn.Linear
    enc_bbox_head: MLP  # what is added to the logits of anchors
    denoising_class_embed: nn.Embedding


class RTDETRDecoder(nn.Module):
    """Query selection and iterative box refinement.

    Args:
        num_classes: of the data.
        activation: "sigmoid", or "softmax" with one more logit, the last, for the background.
        channels, strides: of the encoder's maps, from fine to coarse.
        hidden_dim: D.
        num_layers: L.
        num_queries: Q; cells chosen from the encoder.
        denoising: whether an embedding of noisy labels is needed.
        num_heads: of both attentions.
        dim_feedforward: width of the feed-forward networks.
        eval_idx: the layer whose predictions count in evaluation; layers beyond it are used only in training.
        num_points: points of each level a head reads; levels beyond the encoder's maps come from further strided
            convolutions.
        cross_attn_method: "bilinear" or "discrete".
        offset_scale: see `DeformableAttention`.
        query_select_method: "default", "one2many" or "agnostic".
        learn_query_content: learn the initial content of queries instead of using the features of the selected cells.
        look_forward_twice: each box also trains the previous layer (DINO, section 3.5).
        dropout, attention_dropout, activation_dropout, ffn_activation: of the layers.
        head_activation: of the perceptrons that predict boxes, and of that for positions.
        position_layers: of the perceptron from boxes to positions; 2: with 2 D channels between them, as in RT-DETR, 3:
            with D, as in DEIM.

    Attributes:
        strides: of the levels that are read.
        depth, every_layer: see `layer.depth.Layered`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        channels: list[int],
        strides: list[int],
        hidden_dim: int,
        num_layers: int,
        num_queries: int,
        denoising: bool,
        num_heads: int,
        dim_feedforward: int,
        eval_idx: int,
        num_points: list[int],
        cross_attn_method: str,
        offset_scale: float,
        query_select_method: str,
        learn_query_content: bool,
        look_forward_twice: bool,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        ffn_activation: str,
        head_activation: str = "relu",
        position_layers: int = 2,
    ) -> None:
        super().__init__()
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
        self.activation = activation
        self.num_queries = num_queries
        self.depth: int | None = None
        self.every_layer = False
        self.query_select_method = checked_selection(query_select_method)
        self.look_forward_twice = look_forward_twice
        self.eval_idx = checked_layer(eval_idx, num_layers)
        self.input_proj, self.strides = level_projections(channels, strides, hidden_dim, len(num_points))
        self.layers = nn.ModuleList(layers)
        if denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        if learn_query_content:
            self.tgt_embed = nn.Embedding(num_queries, hidden_dim)
        position_width = hidden_dim * (2 if position_layers == 2 else 1)
        self.query_pos_head = MLP(4, position_width, hidden_dim, position_layers, head_activation)
        self.enc_output = nn.Sequential(
            OrderedDict(proj=nn.Linear(hidden_dim, hidden_dim), norm=nn.LayerNorm(hidden_dim))
        )
        background = int(activation == "softmax")
        encoder_classes = 1 if query_select_method == "agnostic" else num_classes
        self.enc_score_head = nn.Linear(hidden_dim, encoder_classes + background)
        self.enc_bbox_head = MLP(hidden_dim, hidden_dim, 4, 3, head_activation)
        self.dec_score_head = nn.ModuleList(nn.Linear(hidden_dim, num_classes + background) for _ in layers)
        self.dec_bbox_head = nn.ModuleList(MLP(hidden_dim, hidden_dim, 4, 3, head_activation) for _ in layers)
        self._initialise()

    def _initialise(self) -> None:
        start_heads(
            [self.enc_score_head, *self.dec_score_head], [self.enc_bbox_head, *self.dec_bbox_head], self.activation
        )
        linears = [self.enc_output.proj, *self.query_pos_head.layers, *(proj.conv for proj in self.input_proj)]
        if hasattr(self, "tgt_embed"):
            linears.append(self.tgt_embed)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, maps: list[Tensor], noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """Encoder maps `[B, E, h, w]` -> predictions; arguments as in `RTDETRv2.body`."""
        memory = read_maps(maps, self.input_proj, padding_mask)
        learned = self.tgt_embed.weight[: self.num_queries] if hasattr(self, "tgt_embed") else None
        content, reference, allowed, encoder = first_queries(self, memory, noisy, learned)
        layers, states = self._decode(content, reference, memory, allowed)
        return RawOutputs(layers, encoder, states=states)

    def _decode(
        self, content: Tensor, reference: Tensor, memory: Memory, allowed: Tensor | None
    ) -> tuple[Prediction, list[Tensor]]:
        """Refine queries and boxes layer by layer; the predictions of the layers that count, stacked, and their states.

        Args:
            content: `[B, N + Q, D]`.
            reference: `[B, N + Q, 4]` boxes cxcywh in 0..1, without gradient.
            allowed: as in `SelfAttention`.
        """
        last = last_layer(self)
        logits, boxes, states = [], [], []
        previous = reference
        for index, layer in enumerate(self.layers[: last + 1]):
            position = self.query_pos_head(reference.to(content.dtype))
            content = layer(content, position, reference, memory, allowed)
            change = self.dec_bbox_head[index](content)
            refined = (change + inverse_sigmoid(reference)).sigmoid()
            if self.training or self.every_layer or index == last:
                # The same numbers, but this box also trains the previous layer, whose box is not detached.
                twice = index > 0 and self.look_forward_twice and self.training
                boxes.append((change + inverse_sigmoid(previous)).sigmoid() if twice else refined)
                logits.append(self.dec_score_head[index](content).to(refined.dtype))
                states.append(content)
            previous, reference = refined, refined.detach()
        return Prediction(torch.stack(logits), torch.stack(boxes)), states

    def class_tensors(self) -> dict[str, int]:
        """Names of the tensors that depend on the classes, with the axis along which the classes are."""
        return class_tensors_of(self, self.query_select_method)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def shorten(self) -> None:
        """Remove layers that evaluation does not compute, and heads that it skips."""
        self.eval_idx = last_layer(self.eval())
        self.layers = self.layers[: self.eval_idx + 1]
        self.dec_bbox_head = self.dec_bbox_head[: self.eval_idx + 1]
        self.dec_score_head = only(self.dec_score_head, self.eval_idx)

    def drop_training_parts(self) -> None:
        """As `shorten`, and remove the denoising embedding and the content of queries that are not used."""
        self.shorten()
        if hasattr(self, "denoising_class_embed"):
            del self.denoising_class_embed
        if hasattr(self, "tgt_embed"):
            self.tgt_embed = nn.Embedding.from_pretrained(self.tgt_embed.weight[: self.num_queries].clone())


def checked_layer(eval_idx: int, num_layers: int) -> int:
    """`eval_idx` counted from the front."""
    if not -num_layers <= eval_idx < num_layers:
        raise ValueError(f"model.eval_idx is {eval_idx} but there are {num_layers} layers; use -1 for the last one")
    return eval_idx % num_layers


def last_layer(decoder: Stopping) -> int:
    """Index of the last layer that is computed."""
    if decoder.depth is not None:
        return decoder.depth - 1
    return decoder.num_layers - 1 if decoder.training else decoder.eval_idx


def start_heads(scores: Iterable[nn.Module], boxes: Iterable[nn.Module], activation: str) -> None:
    """Initial values: every class at a probability of 1 %, so that the many negatives do not dominate the first steps,
    and boxes without a change."""
    for head in scores:
        nn.init.constant_(head.get_parameter("bias"), -math.log(99) if activation == "sigmoid" else 0.0)
    for mlp in boxes:
        for parameter in list(mlp.parameters())[-2:]:
            nn.init.zeros_(parameter)


def first_queries(
    decoder: Selecting, memory: Memory, noisy: NoisyQueries | None, learned: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Prediction]:
    """The queries that enter the first layer: noisy ones, then those selected from the memory.

    Boxes are computed for the selected cells only; the others would be discarded.

    Args:
        learned: `[Q, D]` content of the selected queries; None: the features of their cells.

    Returns:
        content `[B, N + Q, D]`, boxes `[B, N + Q, 4]` cxcywh in 0..1 without gradient, `allowed` as in `SelfAttention`,
        and what the encoder predicts for the selected cells; in float32 at least, but the content.
    """
    exact = torch.promote_types(memory.cells.dtype, torch.float32)
    padded = memory.padded_cells()
    anchors, valid = anchor_logits(memory.shapes, exact, memory.cells.device, padded)
    features = decoder.enc_output(memory.cells * valid)
    logits = decoder.enc_score_head(features)
    ranked = (logits.detach(), decoder.num_queries, decoder.query_select_method, decoder.activation)
    chosen = top_cells(*ranked, padded)[..., None]
    logits = logits.gather(1, chosen.expand(-1, -1, logits.shape[-1])).to(exact)
    features = features.gather(1, chosen.expand(-1, -1, features.shape[-1]))
    anchors = anchors.expand(memory.cells.shape[0], -1, -1).gather(1, chosen.expand(-1, -1, 4))
    boxes = anchors + decoder.enc_bbox_head(features)
    content = features.detach() if learned is None else learned.expand(features.shape[0], -1, -1)
    reference, allowed = boxes.detach(), None
    if noisy is not None:
        content = torch.cat([decoder.denoising_class_embed(noisy.labels), content], dim=1)
        reference = torch.cat([noisy.places, reference], dim=1)
        allowed = noisy.allowed
    return content, reference.sigmoid(), allowed, Prediction(logits, boxes.sigmoid())


def class_tensors_of(decoder: nn.Module, query_select_method: str) -> dict[str, int]:
    """The parameters of heads and embedding that have an axis of classes, all the first one."""
    heads = ("dec_score_head.", "denoising_class_embed.") + ("enc_score_head.",) * (query_select_method != "agnostic")
    return {name: 0 for name, _ in decoder.named_parameters() if name.startswith(heads)}


def only(heads: nn.ModuleList, index: int) -> nn.ModuleList:
    """Without those before and after one head, which keeps its name."""
    return nn.ModuleList([*[nn.Identity()] * index, heads[index]])
