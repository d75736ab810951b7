"""The maps of an image, flattened for the decoder.

Legend: B images, S cells of all levels, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_exp.model.layer.conv import ConvNorm
from detr_exp.ops.deformable import Shapes
from detr_exp.ops.transfer import filled
from detr_exp.protocols import Attending, Backbone


class Memory(NamedTuple):
    """Cells of all levels one after another, each level row by row.

    Attributes:
        cells: `[B, S, D]`.
        shapes: (height, width) of each level.
        padding: of each level `[B, height, width]` bool, True where there is no image; None: no padding.
    """

    cells: Tensor
    shapes: Shapes
    padding: list[Tensor] | None

    @classmethod
    def of(cls, maps: list[Tensor], padding_mask: Tensor | None) -> Memory:
        """Maps `[B, D, height, width]` and the padding `[B, H, W]` bool of the images they were made from."""
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        padding = None if padding_mask is None else padding_of(padding_mask, shapes)
        return cls(torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1), shapes, padding)

    def padded_cells(self) -> Tensor | None:
        """`[B, S]` bool, True for padded cells."""
        return None if self.padding is None else torch.cat([level.flatten(1) for level in self.padding], dim=1)

    def proposals(self) -> tuple[Tensor, Tensor]:
        """A square box on every cell, 0.05 of the canvas on the first level and twice as large on each further one.

        Returns:
            boxes `[1, S, 4]` cxcywh, and `[B or 1, S]` whether they are valid: all of it within 0.01..0.99, and not on
            padding.
        """
        device, boxes = self.cells.device, []
        exact = torch.promote_types(self.cells.dtype, torch.float32)
        for level, (height, width) in enumerate(self.shapes):
            x = torch.arange(width, device=device).expand(height, width)
            y = torch.arange(height, device=device)[:, None].expand(height, width)
            center = (torch.stack([x, y], dim=-1) + 0.5) / filled([width, height], device).to(exact)
            boxes.append(torch.cat([center, torch.full_like(center, 0.05 * 2**level)], dim=-1).flatten(0, 1))
        proposals, padded = torch.cat(boxes)[None], self.padded_cells()
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1)
        return proposals, valid if padded is None else valid & ~padded


def level_projections(
    channels: list[int], strides: list[int], hidden_dim: int, num_levels: int, *, keep_equal: bool = False
) -> tuple[nn.ModuleList, list[int]]:
    """Convolutions from the encoder's maps to the levels of a decoder, and the strides of these.

    Args:
        channels, strides: of the encoder's maps, from fine to coarse.
        hidden_dim: of the levels.
        num_levels: those beyond the maps come from further convolutions, with stride 2.
        keep_equal: pass on maps that have as many channels.

    Raises:
        ValueError: there are more maps than levels.
    """
    further = num_levels - len(channels)
    if further < 0:
        raise ValueError(
            f"model.num_points has {num_levels} counts but the encoder makes {len(channels)} maps; give each "
            "map its count, or leave strides out of model.backbone.out_strides"
        )
    projections = nn.ModuleList(
        nn.Identity() if keep_equal and width == hidden_dim else ConvNorm(width, hidden_dim, 1) for width in channels
    )
    for width in [channels[-1], *[hidden_dim] * further][:further]:
        projections.append(ConvNorm(width, hidden_dim, 3, 2))
    return projections, [*strides, *(strides[-1] * 2**step for step in range(1, further + 1))]


def read_maps(maps: list[Tensor], projections: nn.ModuleList, padding_mask: Tensor | None) -> Memory:
    """All levels as rows, fine to coarse.

    Args:
        maps: of the encoder, `[B, E, h, w]`.
        projections: of `level_projections`.
        padding_mask: `[B, H, W]` bool, True where there is no image.
    """
    levels = [project(level) for project, level in zip(projections, maps)]
    source = maps[-1]
    for project in projections[len(maps) :]:
        levels.append(project(source))
        source = levels[-1]
    shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
    padding = None if padding_mask is None else padding_of(padding_mask, shapes)
    return Memory(torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1), shapes, padding)


def padding_of(padding_mask: Tensor, shapes: Shapes) -> list[Tensor]:
    """The padding of each level, `[B, h, w]`: a cell is padded if no pixel of the image lies in it.

    So its first pixel is enough, because an image lies in the top left corner of its canvas; and every image has a cell
    on every level.

    Args:
        padding_mask: `[B, H, W]` bool, True where there is no image.
        shapes: (height, width) of each level. One that does not divide H x W is half of the level before, rounded up.
    """
    levels: list[Tensor] = []
    for height, width in shapes:
        rows, columns = padding_mask.shape[1], padding_mask.shape[2]
        divides = rows % height == 0 and columns % width == 0
        levels.append(padding_mask[:, :: rows // height, :: columns // width] if divides else levels[-1][:, ::2, ::2])
    return levels


def seen_by(backbone: Backbone, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
    """Maps of a backbone, which does not attend to padding where it attends to anything."""
    if padding_mask is not None and isinstance(backbone, Attending):
        return backbone.forward_padded(images, padding_mask)
    return backbone(images)
