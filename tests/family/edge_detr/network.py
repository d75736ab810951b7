"""A network that says of each edge of a box how likely it is at which distance from the query's point.

Legend: B images, S cells, Q queries, C classes, D channels, E bins of a distance, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_exp.model.adapter.slim import merge
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.structures import Detections, Outputs, Targets


class EdgePrediction(NamedTuple):
    """A prediction with a field of its own, beside the logits and boxes that every network has.

    Attributes:
        logits: `[..., B, Q, C]`.
        boxes: `[..., B, Q, 4]` cxcywh in 0..1.
        edges: `[..., B, Q, 4, E]` logits of the distances from `points` to left, top, right and bottom.
        points: `[..., B, Q, 2]` x, y in 0..1.
    """

    logits: Tensor
    boxes: Tensor
    edges: Tensor
    points: Tensor


class Strided(nn.Module):
    """A backbone of two convolutions; one map."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 2, 2), nn.ReLU())
        )
        self.out_channels, self.out_strides = [width], [8]
        self.pixel_mean, self.pixel_std = [0.5] * 3, [0.5] * 3

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.stages(images)]

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        pass  # there is little to keep


class EdgeDecoder(nn.Module):
    """Queries that read the map layer by layer; each layer predicts."""

    def __init__(
        self, *, num_classes: int, channels: int, hidden_dim: int, num_layers: int, num_queries: int, bins: int
    ) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        self.project = nn.Linear(channels, hidden_dim)
        self.queries = nn.Embedding(num_queries, hidden_dim)
        self.keys = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(num_layers))
        self.score = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(num_layers))
        self.place = nn.ModuleList(nn.Linear(hidden_dim, 2 + 4 * bins) for _ in range(num_layers))
        self.register_buffer("distances", torch.linspace(0, 1, bins), persistent=False)

    def forward(self, features: Tensor) -> EdgePrediction:
        """`[B, D, h, w]` -> predictions of all layers; in evaluation of the last."""
        cells = self.project(features.flatten(2).transpose(1, 2))
        hidden = self.queries.weight.expand(cells.shape[0], -1, -1)  # `len` would be a constant in an exported file
        found = []
        for keys, score, place in zip(self.keys, self.score, self.place):
            attention = (hidden @ keys(cells).transpose(1, 2) / hidden.shape[-1] ** 0.5).softmax(-1)
            hidden = hidden + attention @ cells
            found.append(self._predicted(score(hidden), place(hidden)))
        found = found if self.training else found[-1:]
        return EdgePrediction(*(torch.stack(parts) for parts in zip(*found)))

    def _predicted(self, logits: Tensor, places: Tensor) -> EdgePrediction:
        points, edges = places[..., :2].sigmoid(), places[..., 2:].unflatten(-1, (4, self.bins))
        left, top, right, bottom = (edges.softmax(-1) @ self.distances).unbind(-1)
        x, y = points.unbind(-1)
        boxes = torch.stack([x + (right - left) / 2, y + (bottom - top) / 2, left + right, top + bottom], -1)
        return EdgePrediction(logits, boxes, edges, points)


class EdgeDETR(nn.Module):
    """The members of `protocols.Network`, and nothing inherited.

    Args:
        num_classes, activation: told by the data and the class loss.
        backbone: image to a map.
        decoder: makes the decoder.
        image_size: (height, width).
        hidden_dim, num_layers, num_queries: D, L and Q.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        backbone: Strided,
        decoder: Callable[..., EdgeDecoder],
        image_size: list[int],
        hidden_dim: int,
        num_layers: int,
        num_queries: int,
    ) -> None:
        super().__init__()
        self.activation, self.num_queries = activation, num_queries
        self.image_size, self.stride = (image_size[0], image_size[1]), backbone.out_strides[-1]
        self.tasks: tuple[str, ...] = ("boxes",)
        self.keypoint_counts: tuple[int, ...] = ()
        self.cuts_boxes = True
        self.backbone = backbone
        self.decoder = decoder(
            num_classes=num_classes,
            channels=backbone.out_channels[-1],
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_queries=num_queries,
        )
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(backbone, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor, targets: Targets | None = None, padding_mask: Tensor | None = None) -> Outputs:
        return Outputs(self.decoder(self.backbone((images - self.pixel_mean) / self.pixel_std)[-1]))

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, image_sizes: Tensor, max_detections: int | None = None) -> list[Detections]:
        return best_in_pixels(self, outputs.pred, image_sizes, max_detections).detections()

    def class_tensors(self) -> dict[str, int]:
        return {f"decoder.{name}": 0 for name, _ in self.decoder.named_parameters() if name.startswith("score.")}

    def agree_on_denoising(self, most_objects: int) -> None:
        pass  # there are no denoising queries

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        self.backbone.set_gradient_checkpointing(enabled)

    @torch.no_grad()
    def deploy(self) -> EdgeDETR:
        merge(self.eval())  # the weights of an adapter
        return self
