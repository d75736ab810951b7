"""Masks as inner products of queries and pixels, the head of RF-DETR's segmentation networks.

Robinson et al. 2025, "RF-DETR", after MaskDINO (Li et al. 2023) and ConvNeXt's blocks (Liu et al. 2022).

Legend: B images, Q queries, L decoder layers, D width, (h, w) size of the masks.
"""

from __future__ import annotations

from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.depth import layer_by_layer
from detr_exp.structures import Detections, MaskLogits

MASKS_AT_ONCE = 32  # masks of an image that are resized together; bounds the memory of large images


class Head(Protocol):
    """What a network needs of the head that predicts masks; an `nn.Module`. Only `RFDETR` asks for `of_encoder`."""

    def start(self, features: Tensor, image_size: torch.Size) -> Tensor:
        """The finest map of the neck `[B, D, .., ..]`, for images of (height, width) -> pixels `[B, D, h, w]`."""

    def __call__(self, pixels: Tensor, queries: Tensor) -> MaskLogits:
        """`forward`: pixels of `start` and queries `[l, B, Q, D]` of the last l layers -> masks of these layers."""

    def of_encoder(self, pixels: Tensor, tokens: Tensor) -> MaskLogits:
        """Pixels of `start` and selected encoder tokens `[B, Q, D]` -> their masks."""


class MaskHead(nn.Module):
    """Mask logits of every decoder layer; the pixels pass one more block for each.

    Args:
        hidden_dim: D.
        num_layers: L.
        downsample: pixels of the image on a side of a pixel of the masks.
        eval_blocks: blocks that pixels pass in evaluation; None: all of those layers that are computed, as in training.

    Attributes:
        depth, every_layer: see `layer.depth.Layered`; the queries say how many layers are asked for.
    """

    def __init__(self, *, hidden_dim: int, num_layers: int, downsample: int, eval_blocks: int | None = None) -> None:
        super().__init__()
        if eval_blocks is not None and not 1 <= eval_blocks <= num_layers:
            raise ValueError(
                f"model.mask_head.eval_blocks is {eval_blocks} but there are {num_layers} layers; use 1 to "
                f"{num_layers}, or null for all: model.mask_head.eval_blocks=null"
            )
        self.downsample = downsample
        self.eval_blocks = eval_blocks
        self.depth: int | None = None
        self.every_layer = False
        self.blocks = nn.ModuleList(Block(hidden_dim) for _ in range(num_layers))
        self.feature_proj = nn.Conv2d(hidden_dim, hidden_dim, 1)
        self.query_mlp = nn.Sequential(
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, 4 * hidden_dim),
            nn.GELU(),
            nn.Linear(4 * hidden_dim, hidden_dim),
        )
        self.query_proj = nn.Linear(hidden_dim, hidden_dim)
        self.bias = nn.Parameter(torch.zeros(1))

    def start(self, features: Tensor, image_size: torch.Size) -> Tensor:
        """The map `[B, D, .., ..]` that the decoder reads, at the size of the masks."""
        size = [side // self.downsample for side in image_size]
        return F.interpolate(features, size=size, mode="bilinear", align_corners=False)

    def forward(self, pixels: Tensor, queries: Tensor) -> MaskLogits:
        """Pixels of `start` and queries `[l, B, Q, D]` of the last l layers -> masks stacked over these layers."""
        alone = not self.training and len(queries) == 1
        count = (self.eval_blocks if alone else None) or self.depth or len(self.blocks)
        first = count - len(queries)
        features = []
        for index, block in enumerate(islice(self.blocks, count)):
            pixels = block(pixels)
            if index >= first:
                features.append(self.feature_proj(pixels))
        (projected,) = layer_by_layer(lambda states: (self._projected(states),), queries, self.training)
        return MaskLogits(torch.stack(features), projected, self.bias)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def shorten(self) -> None:
        """Drop the blocks that evaluation does not compute, in place."""
        del self.blocks[self.eval_blocks or self.depth or len(self.blocks) :]

    def of_encoder(self, pixels: Tensor, tokens: Tensor) -> MaskLogits:
        """Pixels of `start` and selected encoder tokens `[B, Q, D]` -> their masks; no block is applied."""
        return MaskLogits(self.feature_proj(pixels), self._projected(tokens), self.bias)

    def _projected(self, queries: Tensor) -> Tensor:
        return self.query_proj(queries + self.query_mlp(queries))


class Block(nn.Module):
    """Depthwise convolution, norm and linear layer beside a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, D, h, w]` -> the same."""
        change = F.gelu(self.linear(self.norm(self.conv(pixels).permute(0, 2, 3, 1))))
        return pixels + change.permute(0, 3, 1, 2)


def masks_in_pixels(masks: MaskLogits, image: int, queries: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks `[n, H, W]` bool of an image's `queries` `[n]`, at the (height, width) `size` of the original image.

    Args:
        masks: of one layer: features `[B, D, h, w]`, queries `[B, Q, D]`.
    """
    features = masks.features[image].float()
    masks_of_chunks = []
    for chunk in masks.queries[image].float()[queries].split(MASKS_AT_ONCE):
        logits = torch.einsum("nd,dhw->nhw", chunk, features) + masks.bias.float()
        large = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
        masks_of_chunks.append(large[:, 0] > 0)
    return torch.cat(masks_of_chunks)


def add_masks(detections: list[Detections], masks: MaskLogits, queries: Tensor, image_sizes: Tensor) -> None:
    """Give detections of each image their masks, in place, and the score NaN where masks are not of finite numbers.

    Args:
        masks: of one layer.
        queries: `[B, n]` of the detections.
        image_sizes: `[B, 2]` (height, width) of the original images, on the host.
    """
    for image, (height, width) in enumerate(image_sizes.round().tolist()):
        found = detections[image]
        found.masks = masks_in_pixels(masks, image, queries[image], (int(height), int(width)))
        found.scores = torch.where(finite_masks(masks, image, queries[image]), found.scores, torch.nan)


def finite_masks(masks: MaskLogits, image: int, queries: Tensor) -> Tensor:
    """`[n]` bool: whether masks of an image's `queries` `[n]` come from finite numbers; bool pixels do not show it."""
    return masks.queries[image][queries].isfinite().all(-1) & masks.features[image].isfinite().all()
