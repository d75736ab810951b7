"""A decoder of poses: keypoints as distributions of coordinates, refined layer by layer (DETRPose, EdgeCrafter).

As in D-FINE, layer 0 predicts points in the usual way. All layers then add logits to distributions over the distances
of both coordinates from that one point, and each layer's points are at the means.

Legend: B images, Q matching queries, N denoising queries in front of them, C logits, D channels, E channels of the
encoder, L decoder layers, K keypoints, T = 1 + K tokens of a query: one of the instance, then one of each keypoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.decoder.dfine import refuse_other_edges
from detr_exp.model.decoder.rtdetr import RawOutputs, checked_layer, class_tensors_of, last_layer, only, start_heads
from detr_exp.model.layer.denoising import NoisyQueries
from detr_exp.model.layer.memory import Memory, level_projections, read_maps
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.pose_decoder_layer import PoseDecoderLayer
from detr_exp.model.layer.query_selection import ANCHOR_MARGIN, POINT_EPS, inverse_sigmoid, top_cells
from detr_exp.model.layer.reference import embed_boxes
from detr_exp.ops.deformable import deformable_sample
from detr_exp.ops.edges import edge_positions
from detr_exp.structures import Prediction

SEEN = 4  # largest channels at a point that say how certain it is


class PoseQuality(nn.Module):
    """One number for each pose, added to all its class logits, from what the finest map shows at its points.

    Attributes:
        method: how the map is read; see `DeformableAttention`.
    """

    def __init__(self, num_keypoints: int, hidden_dim: int) -> None:
        super().__init__()
        self.method = "bilinear"
        self.reg_conf = MLP(num_keypoints * (SEEN + 1), hidden_dim, 1, 2)
        for parameter in self.reg_conf.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, cells: Tensor, shape: tuple[int, int], points: Tensor) -> Tensor:
        """Cells `[B, h * w, D]` of a map (h, w) and points `[B, Q, K, 2]` in 0..1 -> `[B, Q, 1]`."""
        places = points.flatten(1, 2)[:, :, None, None]
        seen = deformable_sample(cells[:, :, None], [shape], places, torch.ones_like(places[..., 0]), [1], self.method)
        largest = seen.topk(SEEN, dim=-1).values
        seen = torch.cat([largest, largest.mean(-1, keepdim=True)], dim=-1)
        return self.reg_conf(seen.unflatten(1, points.shape[1:3]).flatten(2))


class PoseDecoder(nn.Module):
    """Query selection, one usual pose for each query, and the refinement of its points.

    Args:
        num_classes, activation, channels, strides, hidden_dim, num_layers, num_queries, denoising, num_heads,
        dim_feedforward, eval_idx, num_points, cross_attn_method, ffn_activation, num_bins, edge_bound,
        edge_scale: as in `DFineDecoder`; distances are in image sizes.
        num_keypoints: K.
        num_noise_labels: labels that denoising queries may have.

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
        num_keypoints: int,
        num_noise_labels: int,
        num_heads: int,
        dim_feedforward: int,
        eval_idx: int,
        num_points: list[int],
        cross_attn_method: str,
        ffn_activation: str,
        num_bins: int,
        edge_bound: float,
        edge_scale: float,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.num_queries, self.num_keypoints = num_queries, num_keypoints
        self.depth: int | None = None
        self.every_layer = False
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
        each_layer = range(num_layers)
        self.layers = nn.ModuleList(
            PoseDecoderLayer(
                hidden_dim=hidden_dim,
                num_heads=num_heads,
                dim_feedforward=dim_feedforward,
                points_per_level=num_points,
                method=cross_attn_method,
                act=ffn_activation,
            )
            for _ in each_layer
        )
        self.query_pos_head = MLP(hidden_dim, hidden_dim, hidden_dim, 2)
        self.instance_embed = nn.Embedding(1, hidden_dim)
        self.point_embed = nn.Embedding(num_keypoints, hidden_dim)
        self.tgt_embed = nn.Embedding(num_queries, hidden_dim)
        if denoising:
            self.noise_label_embed = nn.Embedding(num_noise_labels + 1, hidden_dim)
            self.noise_point_embed = nn.Embedding(num_keypoints, hidden_dim)
        logits = num_classes + (activation == "softmax")
        self.enc_output = nn.Sequential()
        self.enc_output.proj, self.enc_output.norm = nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)
        self.enc_score_head = nn.Linear(hidden_dim, logits)
        self.enc_pose_head = MLP(hidden_dim, 2 * hidden_dim, 2 * num_keypoints, 4)
        self.pre_pose_head = MLP(hidden_dim, hidden_dim, 2, 3)
        self.dec_score_head = nn.ModuleList(nn.Linear(hidden_dim, logits) for _ in each_layer)
        self.dec_pose_head = nn.ModuleList(MLP(hidden_dim, hidden_dim, 2 * (num_bins + 1), 3) for _ in each_layer)
        self.lqe_layers = nn.ModuleList(PoseQuality(num_keypoints, 256) for _ in each_layer)
        self._initialise()

    def _initialise(self) -> None:
        poses = [self.enc_pose_head, self.pre_pose_head, *self.dec_pose_head]
        start_heads([self.enc_score_head, *self.dec_score_head], poses, self.activation)
        embeddings = [module for module in self.children() if isinstance(module, nn.Embedding)]
        for part in [self.enc_output.proj, *self.query_pos_head.layers, *embeddings]:
            nn.init.xavier_uniform_(part.get_parameter("weight"))

    def forward(self, maps: list[Tensor], noisy: NoisyQueries | None, padding_mask: Tensor | None) -> RawOutputs:
        """Encoder maps `[B, E, h, w]` -> predictions; arguments as in `RTDETRv2.body`."""
        memory = read_maps(maps, self.input_proj, padding_mask)
        points, encoder = self._selected(memory)
        content = self.point_embed.weight + self.tgt_embed.weight[: self.num_queries, None]
        instance = self.instance_embed.weight.expand(self.num_queries, 1, -1)
        tokens = torch.cat([instance, content], dim=1).expand(points.shape[0], -1, -1, -1)
        reference = with_centre(points)
        if noisy is not None:
            label = self.noise_label_embed(noisy.labels)[:, :, None]
            content = self.noise_point_embed.weight.expand(*noisy.labels.shape, -1, -1)
            present = (noisy.labels < self.noise_label_embed.num_embeddings - 1)[..., None, None]
            tokens = torch.cat([torch.cat([label, content], dim=2) * present, tokens], dim=1)
            reference = torch.cat([noisy.places.to(reference.dtype).sigmoid(), reference], dim=1)
        layers, initial = self._decode(tokens, reference, memory, None if noisy is None else noisy.allowed)
        return RawOutputs(layers, encoder, initial)

    def _selected(self, memory: Memory) -> tuple[Tensor, Prediction]:
        """Points `[B, Q, K, 2]` of the best cells without gradient, and what is predicted for these cells."""
        exact = torch.promote_types(memory.cells.dtype, torch.float32)
        boxes, _ = memory.proposals()
        centres, padded = boxes[..., :2].to(exact), memory.padded_cells()
        valid = ((centres > ANCHOR_MARGIN) & (centres < 1 - ANCHOR_MARGIN)).all(-1, keepdim=True)
        valid = valid if padded is None else valid & ~padded[..., None]
        features = self.enc_output(memory.cells * valid)
        logits = self.enc_score_head(features)
        chosen = top_cells(logits.detach(), self.num_queries, "default", self.activation, padded)[..., None]
        logits, features = (part.gather(1, chosen.expand(-1, -1, part.shape[-1])) for part in (logits, features))
        starts = inverse_sigmoid(centres).expand(chosen.shape[0], -1, -1).gather(1, chosen.expand(-1, -1, 2))
        moves = self.enc_pose_head(features).unflatten(-1, (self.num_keypoints, 2))
        points = (moves + starts[:, :, None]).sigmoid()
        return points.detach(), prediction(logits.to(exact), points)

    def _decode(
        self, tokens: Tensor, reference: Tensor, memory: Memory, allowed: Tensor | None
    ) -> tuple[Prediction, Prediction | None]:
        """The predictions of the layers that count, stacked, and in training the usual ones of layer 0.

        Distributions and points are in float32 at least, as in `DFineDecoder`.

        Args:
            tokens: `[B, N + Q, T, D]`.
            reference: `[B, N + Q, T, 2]` points in 0..1, the centre first, without gradient.
            allowed: as in `SelfAttention`.
        """
        last, exact, shape = last_layer(self), reference.dtype, memory.shapes[0]
        finest, padded = memory.cells[:, : shape[0] * shape[1]], memory.padded_cells()
        if padded is not None:
            finest = finest.masked_fill(padded[:, : finest.shape[1], None], 0.0)
        started = inverse_sigmoid(reference[:, :, 1:], POINT_EPS)
        found, initial = [], None
        frozen = distances = before = reference.new_zeros(())
        for index, layer in enumerate(self.layers[: last + 1]):
            position = self.query_pos_head(embed_boxes(reference[:, :, 1:], tokens.shape[-1] // 2).to(tokens.dtype))
            position = F.pad(position, (0, 0, 1, 0))  # none of the instance
            placed = tokens + position
            before = placed[:, :, 1:].detach()
            tokens = layer(placed, position, reference, memory, allowed)
            instance, content = tokens[:, :, 0], tokens[:, :, 1:]
            if index == 0:
                points = (self.pre_pose_head(content) + started).sigmoid()
                frozen = points.detach()
                if self.training:
                    initial = prediction(self.dec_score_head[0](instance).to(exact), points)
            change = self.dec_pose_head[index](content + before if index else content)
            distances = distances + change.unflatten(-1, (2, -1)).to(exact)
            points = frozen + (distances.softmax(-1) * self.positions.to(exact)).sum(-1) / self.edge_scale
            if self.training or self.every_layer or index == last:
                quality = self.lqe_layers[index](finest, shape, points)
                found.append((self.dec_score_head[index](instance).to(exact) + quality, points))
            reference = with_centre(points.detach())
        logits, poses = map(torch.stack, zip(*found))
        return prediction(logits, poses), initial

    def class_tensors(self) -> dict[str, int]:
        """Names of the tensors that depend on the classes, with the axis along which the classes are."""
        return class_tensors_of(self, "default")

    def keypoint_tensors(self) -> list[str]:
        """Names of the tensors that depend on the number of keypoints."""
        last = self.enc_pose_head.layers[-1]
        names = [f"lqe_layers.{index}.reg_conf.layers.0.weight" for index in range(len(self.lqe_layers))]
        names += [
            f"enc_pose_head.layers.{len(self.enc_pose_head.layers) - 1}.{name}" for name, _ in last.named_parameters()
        ]
        return [*names, "point_embed.weight", "noise_point_embed.weight"]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def shorten(self) -> None:
        """Remove layers that evaluation does not compute, and heads that it skips."""
        self.eval_idx = last_layer(self.eval())
        count = self.eval_idx + 1
        self.layers, self.dec_pose_head = self.layers[:count], self.dec_pose_head[:count]
        self.dec_score_head = only(self.dec_score_head, self.eval_idx)
        self.lqe_layers = only(self.lqe_layers, self.eval_idx)

    def drop_training_parts(self) -> None:
        """As `shorten`, and remove what makes denoising queries and the content of queries that are not used."""
        self.shorten()
        for name in ("noise_label_embed", "noise_point_embed"):
            if hasattr(self, name):
                delattr(self, name)
        self.tgt_embed = nn.Embedding.from_pretrained(self.tgt_embed.weight[: self.num_queries].clone())


def with_centre(points: Tensor) -> Tensor:
    """Keypoints `[..., K, 2]` and in front of them their mean: `[..., 1 + K, 2]`."""
    return torch.cat([points.mean(-2, keepdim=True), points], dim=-2)


def prediction(logits: Tensor, points: Tensor) -> Prediction:
    """Logits `[..., C]` and points `[..., K, 2]`, with their bounding boxes."""
    low, high = points.amin(-2), points.amax(-2)
    return Prediction(logits, torch.cat([(low + high) / 2, high - low], dim=-1), keypoints=points)
