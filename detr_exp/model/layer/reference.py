"""Reference boxes and points of queries: how they are refined, and how they are embedded."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def refine_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Move boxes cxcywh by `delta` `[..., 4]`, in units of their own size.

    The centre moves by a share of the size, the size is multiplied by an exponential (the parametrisation of R-CNN;
    "bbox_reparam" in LW-DETR). Nothing is clipped: a box may leave 0..1, and a box of size zero keeps it.
    """
    exact = torch.promote_types(delta.dtype, torch.float32)
    delta, reference = delta.to(exact), reference.to(exact)
    center, size = reference.split(2, dim=-1)
    shift, growth = delta.split(2, dim=-1)
    return torch.cat([center + shift * size, size * growth.exp()], dim=-1)


def embed_boxes(boxes: Tensor, dim: int) -> Tensor:
    """Sines and cosines of boxes cxcywh in 0..1: `[..., 4]` -> `[..., 4 * dim]`, in the order y, x, w, h.

    Or of points: `[..., 2]` -> `[..., 2 * dim]`, in the order y, x.

    Channel k of a coordinate turns `10000^(-2 floor(k / 2) / dim)` times as fast as once round for 0..1; even
    channels are sines, odd ones cosines (DAB-DETR, section 4.3).
    """
    channel = torch.arange(dim // 2, dtype=torch.float32, device=boxes.device)
    speed = 2 * math.pi * 10000 ** (-2 * channel / dim)
    x, y, *size = boxes.unbind(-1)
    angles = torch.stack([y, x, *size], dim=-1)[..., None] * speed
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
