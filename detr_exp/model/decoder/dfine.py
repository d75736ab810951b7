"""The decoder of D-FINE: edges of boxes as distributions, refined layer by layer (arXiv 2410.13842, section 4.1).

Layer 0 predicts a box in the usual way. All layers then add logits to a distribution over the distances of the four
edges from that one box, and each layer's box has its edges at the means.

Legend: B images, Q matching queries, N denoising queries in front of them, C logits, D channels, E channels of the
encoder, L decoder layers, K positions of an edge.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from detr_exp.model.decoder.rtdetr import (
    RawOutputs,
    checked_layer,
    class_tensors_of,
    first_queries,
    last_layer,
    only,
    start_heads,
)
from detr_exp.model.layer.decoder_layer import DecoderLayer
from detr_exp.model.layer.denoising import NoisyQueries
from detr_exp.model.layer.memory import Memory, level_projections, read_maps
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.query_selection import checked_selection, inverse_sigmoid
from detr_exp.ops.edges import boxes_from_edges, edge_positions
from detr_exp.structures import MaskLogits, Prediction

FARTHEST = 10.0  # of the channels of a position embedding
SEEN = 4  # largest shares of an edge that say how certain its location is


class EdgePrediction(NamedTuple):
    """The predictions of a set of queries, with the distributions that their boxes are the means of.

    Attributes:
        logits: `[..., B, Q, C]`.
        boxes: `[..., B, Q, 4]` cxcywh, which may leave 0..1 and have a negative size.
        edges: `[..., B, Q, 4, K]` logits over the positions of `ops.edges`; left, top, right, bottom.
        reference: `[..., B, Q, 4]` boxes cxcywh from which the distances count, without gradient.
        masks: factored mask logits, or None.
    """

    logits: Tensor
    boxes: Tensor
    edges: Tensor
    reference: Tensor
    masks: MaskLogits | None = None


class Traits(NamedTuple):
    """See `DFineDecoder`; the defaults are those of D-FINE."""

    norm_type: str = "layer"
    position_layers: int = 2
    position_once: bool = False
    encoder_output: bool = True
    gated: bool = True
    share_box_head: bool = False


class LocationQuality(nn.Module):
    """One number for each box, added to all its class logits: how peaked the distributions of its edges are."""

    def __init__(self, hidden_dim: int, act: str) -> None:
        super().__init__()
        self.reg_conf = MLP(4 * (SEEN + 1), hidden_dim, 1, 2, act)
        for parameter in self.reg_conf.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, shares: Tensor) -> Tensor:
        """Probabilities `[B, Q, 4, K]` -> `[B, Q, 1]`."""
        largest = shares.topk(SEEN, dim=-1).values
        return self.reg_conf(torch.cat([largest, largest.mean(-1, keepdim=True)], dim=-1).flatten(2))


class DFineDecoder(nn.Module):
    """Query selection, one usual box for each query, and the refinement of its edges.

    Args:
        num_classes, activation, channels, strides, hidden_dim, num_layers, num_queries, denoising, num_heads,
        dim_feedforward, eval_idx, num_points, cross_attn_method, offset_scale, query_select_method, dropout,
        attention_dropout, activation_dropout, ffn_activation: as in `RTDETRDecoder`; maps that have D channels are read
            as they are.
        head_activation: of all perceptrons.
        position_layers: as in `RTDETRDecoder`.
        position_once: whether all layers have the positions of the first one's boxes, as in DEIMv2.
        encoder_output: whether cells are projected before queries are selected from them; DEIMv2 reads them as they
            are.
        share_box_head: whether one perceptron predicts the edges of all layers.
        gated, norm_type: of the layers.
        num_bins, edge_bound, edge_scale: see `edge_positions`. Weights are trained for them, so weights for others are
            refused.

    Attributes:
        strides: of the levels that are read.
        activations: of the layers and of the perceptrons.
        depth, every_layer: see `layer.depth.Layered`.
        traits: what else a network of the same tensors may do differently, or one of a similar name.
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
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        ffn_activation: str,
        head_activation: str,
        num_bins: int,
        edge_bound: float,
        edge_scale: float,
        position_layers: int = 2,
        position_once: bool = False,
        encoder_output: bool = True,
        share_box_head: bool = False,
        gated: bool = True,
        norm_type: str = "layer",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.activations = (ffn_activation, head_activation)
        self.traits = Traits(norm_type, position_layers, position_once, encoder_output, gated, share_box_head)
        self.num_queries = num_queries
        self.depth: int | None = None
        self.every_layer = False
        self.query_select_method = checked_selection(query_select_method)
        self.eval_idx = checked_layer(eval_idx, num_layers)
        self.edge_scale = edge_scale
        self.positions: Tensor
        self.register_buffer("positions", edge_positions(num_bins, edge_bound, edge_scale).float(), persistent=False)
        self.register_buffer("up", torch.tensor([float(edge_bound)]))  # these two only mark the weights
        self.register_buffer("reg_scale", torch.tensor([float(edge_scale)]))
        self.register_load_state_dict_pre_hook(refuse_other_edges)
        self.input_proj, self.strides = level_projections(
            channels, strides, hidden_dim, len(num_points), keep_equal=True
        )

        def layer() -> DecoderLayer:
            return DecoderLayer(
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
                project=False,
                gated=gated,
                norm_type=norm_type,
            )

        def box_head(outputs: int) -> MLP:
            return MLP(hidden_dim, hidden_dim, outputs, 3, head_activation)

        each_layer = range(num_layers)
        self.layers = nn.ModuleList(layer() for _ in each_layer)
        self.lqe_layers = nn.ModuleList(LocationQuality(64, head_activation) for _ in each_layer)
        if denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        position_width = hidden_dim * (2 if position_layers == 2 else 1)
        self.query_pos_head = MLP(4, position_width, hidden_dim, position_layers, head_activation)
        self.enc_output = nn.Sequential()
        if encoder_output:
            self.enc_output.proj, self.enc_output.norm = nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)
        background = int(activation == "softmax")
        encoder_classes = 1 if query_select_method == "agnostic" else num_classes
        self.enc_score_head = nn.Linear(hidden_dim, encoder_classes + background)
        self.enc_bbox_head = box_head(4)
        self.pre_bbox_head = box_head(4)
        self.dec_score_head = nn.ModuleList(nn.Linear(hidden_dim, num_classes + background) for _ in each_layer)
        heads = range(1 if share_box_head else num_layers)
        self.dec_bbox_head = nn.ModuleList(box_head(4 * (num_bins + 1)) for _ in heads)
        self._initialise()

    def _initialise(self) -> None:
        boxes = [self.enc_bbox_head, self.pre_bbox_head, *self.dec_bbox_head]
        start_heads([self.enc_score_head, *self.dec_score_head], boxes, self.activation)
        for linear in [*self.enc_output[:1], *self.query_pos_head.layers]:
            nn.init.xavier_uniform_(linear.get_parameter("weight"))

    def forward(self, maps: list[Tensor], noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """Encoder maps `[B, E, h, w]` -> predictions; arguments as in `RTDETRv2.body`."""
        memory = read_maps(maps, self.input_proj, padding_mask)
        content, reference, allowed, encoder = first_queries(self, memory, noisy)
        layers, initial, states = self._decode(content, reference, memory, allowed)
        return RawOutputs(cast(Prediction, layers), encoder, initial, states)

    def _decode(
        self, content: Tensor, reference: Tensor, memory: Memory, allowed: Tensor | None
    ) -> tuple[EdgePrediction, Prediction | None, list[Tensor]]:
        """The predictions of the layers that count, stacked, in training the usual ones of layer 0, and their states.

        Distributions and boxes are in float32 at least: half precision has not enough digits for the positions.

        Args:
            content: `[B, N + Q, D]`.
            reference: `[B, N + Q, 4]` boxes cxcywh in 0..1, without gradient.
            allowed: as in `SelfAttention`.
        """
        last = last_layer(self)
        exact, started = reference.dtype, inverse_sigmoid(reference)
        found, states, initial = [], [], None
        frozen = edges = before = position = reference.new_zeros(())
        for index, layer in enumerate(self.layers[: last + 1]):
            if index == 0 or not self.traits.position_once:
                position = self.query_pos_head(reference.to(content.dtype)).clamp(-FARTHEST, FARTHEST)
            content = layer(content, position, reference, memory, allowed)
            if index == 0:
                boxes = (self.pre_bbox_head(content) + started).sigmoid()
                frozen = boxes.detach()
                if self.training:
                    initial = Prediction(self.dec_score_head[0](content).to(exact), boxes)
            change = self.dec_bbox_head[index % len(self.dec_bbox_head)](content + before if index else content)
            edges = edges + change.unflatten(-1, (4, -1)).to(exact)
            shares = edges.softmax(-1)
            boxes = boxes_from_edges((shares * self.positions.to(exact)).sum(-1), frozen, self.edge_scale)
            if self.training or self.every_layer or index == last:
                logits = self.dec_score_head[index](content) + self.lqe_layers[index](shares.to(content.dtype))
                found.append((logits.to(exact), boxes, edges, frozen))
                states.append(content)
            before, reference = content.detach(), boxes.detach()
        return EdgePrediction._make([*map(torch.stack, zip(*found)), None]), initial, states

    def class_tensors(self) -> dict[str, int]:
        """Names of the tensors that depend on the classes, with the axis along which the classes are."""
        return class_tensors_of(self, self.query_select_method)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def shorten(self) -> None:
        """Remove layers that evaluation does not compute, and heads that it skips."""
        self.eval_idx = last_layer(self.eval())
        count = self.eval_idx + 1
        self.layers, self.dec_bbox_head = self.layers[:count], self.dec_bbox_head[:count]
        self.dec_score_head = only(self.dec_score_head, self.eval_idx)
        self.lqe_layers = only(self.lqe_layers, self.eval_idx)

    def drop_training_parts(self) -> None:
        """As `shorten`, and remove the denoising embedding."""
        self.shorten()
        if hasattr(self, "denoising_class_embed"):
            del self.denoising_class_embed


def refuse_other_edges(decoder: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The same logits mean other boxes where bound or scale are others: plausible ones, and wrong.

    Raises:
        ValueError: the weights are for others.
    """
    for name, key in (("up", "edge_bound"), ("reg_scale", "edge_scale")):
        own, theirs = decoder.get_buffer(name), state.get(prefix + name)
        if theirs is None or theirs.is_meta or own.is_meta or torch.allclose(theirs.to(own).abs(), own):
            continue
        value = theirs.abs().max().item()
        raise ValueError(
            f"the weights are for boxes with {key} {value:g}, but model.{key} is {own.item():g}; use the value they "
            f"were trained with: model.{key}={value:g}"
        )
