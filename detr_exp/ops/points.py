"""Sample maps and masks at points, and choose the points.

Legend: N maps, P points of a map, M masks. Points are (x, y) in 0..1 of the map, whatever its size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels of a mask head's map per sampled point, in losses and matching costs.
PIXELS_PER_POINT = 16

# PointRend's settings (Kirillov et al. 2020, section 4.1): candidates per point, and share of the points that are where
# the mask is least certain.
OVERSAMPLING = 3
UNCERTAIN_SHARE = 0.75


def sample_bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear interpolation with border padding.

    Args:
        maps: `[N, C, H, W]`.
        points: `[N, P, 2]`.

    Returns:
        `[N, C, P]`.
    """
    grid = (2 * points - 1).unsqueeze(2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False).squeeze(3)


def sample_nearest(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Values of the nearest pixels, without a copy of the selected masks.

    Args:
        masks: `[T, H, W]` of any type.
        index: `[M]` int64 into the masks.
        points: `[M, P, 2]`, or `[1, P, 2]` for the same points everywhere.

    Returns:
        `[M, P]`.
    """
    height, width = masks.shape[-2:]
    x = (points[..., 0] * width - 0.5).round().long().clamp(0, width - 1)
    y = (points[..., 1] * height - 0.5).round().long().clamp(0, height - 1)
    return masks.flatten()[index[:, None] * (height * width) + y * width + x]


@torch.no_grad()
def uncertain_points(logits: Tensor, num_points: int) -> Tensor:
    """Random points, most of them where the mask is uncertain.

    Args:
        logits: `[M, H, W]` mask logits.
        num_points: P.

    Returns:
        `[M, P, 2]`: three quarters are those of `3P` uniform candidates with the smallest absolute logits, the others
        are uniform.
    """
    candidates = torch.rand(len(logits), OVERSAMPLING * num_points, 2, device=logits.device)
    certainty = sample_bilinear(logits[:, None], candidates).squeeze(1).abs()
    num_uncertain = int(UNCERTAIN_SHARE * num_points)
    chosen = certainty.topk(num_uncertain, largest=False).indices
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(len(logits), num_points - num_uncertain, 2, device=logits.device)
    return torch.cat((uncertain, anywhere), dim=1)
