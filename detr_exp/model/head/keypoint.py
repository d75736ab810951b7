"""Keypoints of objects: their queries, their predictions, and the conversion of these to pixels.

Eight numbers are predicted for each keypoint:

| channel | meaning |
|---|---|
| 0, 1 | x, y: the head's output is an offset from the box's centre, in sizes of the box; 0..1 of the image in the end |
| 2 | findable: logit of "the point is labelled" |
| 3 | visible: logit of "the point is not hidden" |
| 4, 5, 6 | log l11, l21, log l22: the factor U = [[l11, l21], [0, l22]] of the precision, for an object of area 1 |
| 7 | class evidence: summed over a class's keypoints and added to its logit |

Networks that only predict where points are have predictions `[..., K, 2]`, for all classes together.

Legend: B images, Q queries, D width, N keypoints of all classes, counts: those of each class, K their maximum,
C classes. Predictions are laid out `[..., C * K, 8]`, class by class; keypoints that a class does not have are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.ops.keypoints import LOG_SCALE_LIMIT, existing_keypoints, keypoint_covariance, slot_keypoints

CHANNELS = 8


class KeypointQueries(nn.Module):
    """Initial content of the keypoints of a query: learned tokens, modulated by the query.

    Scale, shift and gate as in adaptive layer norm (Peebles & Xie 2023, "DiT").

    Args:
        hidden_dim: D.
        num_keypoints: N.
    """

    def __init__(self, *, hidden_dim: int, num_keypoints: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_keypoints, hidden_dim))
        inner, last = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, 3 * hidden_dim)
        self.modulation = nn.Sequential(inner, nn.GELU(), last)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        for weight in (self.tokens, inner.weight, last.weight, self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(last.bias)

    def forward(self, queries: Tensor) -> Tensor:
        """`[..., D]` -> `[..., N, D]`."""
        scale, shift, gate = self.modulation(queries[..., None, :]).chunk(3, dim=-1)
        normal = F.layer_norm(self.tokens, self.tokens.shape[-1:])
        return self.out_proj(normal * (1 + scale) + shift) * gate + self.tokens


def placed_keypoints(output: Tensor, reference: Tensor, counts: tuple[int, ...]) -> Tensor:
    """A head's output `[..., N, 8]` for boxes `reference` `[..., 4]` cxcywh -> predictions `[..., C * K, 8]`."""
    center, size = reference[..., None, :].split(2, dim=-1)
    offset, rest = output.float().split((2, CHANNELS - 2), dim=-1)
    points = torch.cat([center + offset * size, rest], dim=-1)
    if len(set(counts)) == 1:
        return points
    most = max(counts)
    by_class = points.split(list(counts), dim=-2)
    return torch.cat([F.pad(part, (0, 0, 0, most - part.shape[-2])) for part in by_class], dim=-2)


def class_evidence(keypoints: Tensor, counts: tuple[int, ...], num_logits: int) -> Tensor:
    """What keypoints `[..., C * K, 8]` add to the class logits `[..., num_logits]`; zero for the background."""
    evidence = slot_keypoints(keypoints, len(counts))[..., 7].sum(-1)
    return F.pad(evidence, (0, num_logits - len(counts)))


def attention_among(counts: tuple[int, ...]) -> Tensor | None:
    """`[1 + N, 1 + N]` bool: keypoints attend to their class and the query, the query to all; None: all to all."""
    if sum(count > 0 for count in counts) == 1:
        return None
    owner = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    return F.pad(owner[:, None] == owner, (1, 0, 1, 0), value=True)


def with_keypoints(
    best: tuple[Tensor, Tensor, Tensor, Tensor],
    keypoints: Tensor,
    boxes: Tensor,
    counts: tuple[int, ...],
    sizes: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Detections with their keypoints, sorted by a score that includes their certainty.

    Args:
        best: scores, labels, boxes in pixels and queries of n detections of each image, `[B, n, ...]`.
        keypoints, boxes: `[B, Q, ...]` of all queries.
        counts, sizes, alpha: as in `keypoints_in_pixels`.

    Returns:
        scores, labels, boxes in pixels, points and covariances.
    """
    scores, labels, boxes_px, queries = best
    scores, points, covariance = keypoints_in_pixels(
        scores,
        labels,
        rows(keypoints.float().flatten(2), queries).unflatten(-1, keypoints.shape[2:]),
        rows(boxes.float(), queries),
        counts,
        sizes,
        alpha,
    )
    scores, order = scores.topk(scores.shape[1], dim=1)  # sorted; engines have no stable sort
    points = rows(points.flatten(2), order).unflatten(-1, points.shape[2:])
    covariance = rows(covariance.flatten(2), order).unflatten(-1, covariance.shape[2:])
    return scores, labels.gather(1, order), rows(boxes_px, order), points, covariance


def with_points(
    best: tuple[Tensor, Tensor, Tensor, Tensor], points: Tensor, counts: tuple[int, ...], sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections with the keypoints that their classes have, all of confidence 1, and the bounding boxes of these.

    Args:
        best, counts, sizes: as in `with_keypoints`; a class without keypoints keeps its boxes.
        points: `[B, Q, K, 2]` x, y in 0..1 of all queries.

    Returns:
        scores, labels, boxes in pixels and points `[B, n, K, 3]`, zero where a class has none.
    """
    scores, labels, boxes, queries = best
    exists = existing_keypoints(counts, points.device)[labels][..., None]
    placed = rows(points.to(boxes.dtype).flatten(2), queries).unflatten(-1, points.shape[2:])
    placed = placed * sizes.to(placed).flip(1)[:, None, None]
    far = torch.finfo(placed.dtype).max
    ends = placed.masked_fill(~exists, far).amin(2), placed.masked_fill(~exists, -far).amax(2)
    boxes = torch.where(exists.any(2), torch.cat(ends, dim=-1), boxes)
    return scores, labels, boxes, torch.where(exists, F.pad(placed, (0, 1), value=1.0), 0.0)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, n]` of `[B, Q, d]`: `[B, n, d]`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def keypoints_in_pixels(
    scores: Tensor,
    labels: Tensor,
    keypoints: Tensor,
    boxes: Tensor,
    counts: tuple[int, ...],
    size: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints of detections, and scores that include their certainty; leading axes are images.

    The score s becomes s / (s + trace ** alpha), where trace is the mean of the keypoints' variances (x plus y, for an
    object of area 1), or 1 for a class without keypoints.

    Args:
        scores, labels: `[..., n]`.
        keypoints: `[..., n, C * K, 8]` predicted by their queries.
        boxes: `[..., n, 4]` cxcywh in 0..1 predicted by their queries, which the covariances are scaled by.
        counts: keypoints of each class.
        size: `[..., 2]` (height, width) of the image.
        alpha: 0 leaves the scores alone.

    Returns:
        scores `[..., n]`; points `[..., n, K, 3]` (x, y in pixels, confidence), zero where a class has none; and
        covariances `[..., n, K, 2, 2]` in squared pixels, NaN there.
    """
    exists = existing_keypoints(counts, keypoints.device)[labels]
    slots = slot_keypoints(keypoints, len(counts))
    own = slots.gather(-3, labels[..., None, None, None].expand(*labels.shape, 1, *slots.shape[-2:])).squeeze(-3)
    pixels = size.to(own).flip(-1)[..., None, None, :]
    points = torch.cat([own[..., :2] * pixels, own[..., 2:3].sigmoid()], dim=-1)
    area = boxes[..., 2:].clamp(min=0).prod(-1)
    covariance = (
        keypoint_covariance(own, area[..., None].expand(exists.shape)) * pixels[..., None] * pixels[..., None, :]
    )
    if alpha > 0:
        log_trace = torch.where(exists.any(-1), _log_mean_trace(own, exists), 0.0)
        scores = (scores.log() - alpha * log_trace).sigmoid().clamp(max=1 - torch.finfo(scores.dtype).eps)
    points = torch.where(exists[..., None], points, 0.0)
    return scores, points, torch.where(exists[..., None, None], covariance, torch.nan)


def _log_mean_trace(own: Tensor, exists: Tensor) -> Tensor:
    """Logarithm of the keypoints' mean variance, each weighted by its visibility: `[..., K, 8]` -> `[...]`."""
    log_l11, log_l22 = (own[..., i].clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT) for i in (4, 6))
    log_shear = own[..., 5].abs().clamp(min=1e-12).log()
    variances = torch.stack([-2 * log_l11, -2 * log_l22, 2 * (log_shear - log_l11 - log_l22)])
    weight = own[..., 2].sigmoid().clamp(min=1e-12).log().masked_fill(~exists, -torch.inf)
    return (variances.logsumexp(0) + weight).logsumexp(-1) - weight.logsumexp(-1)
