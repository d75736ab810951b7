"""Class losses of the logits of queries, given the objects they are matched with.

Legend: N queries (of all layers and images of a set), C logits of a query.

All have the same signature, so that the configuration can choose any of them:
`loss(logits [N, C], labels [N], quality [N], *, num_classes, <shape>) -> [N, C] or [N]`, unreduced; the criterion sums
and divides. `labels` is the class of the matched object, `num_classes` where there is none; `quality` is the overlap of
the matched boxes in 0..1, detached, 0 where there is none. Label smoothing of 0 changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_exp.loss.box import quality
from detr_exp.loss.matches import Matches


def of_queries(matches: Matches, *, loss: Callable[..., Tensor], overlap: str | None) -> list[Tensor]:
    """A class loss on the queries of all layers, as a term (see `loss.term`): of each stack `[l, B * Q * C]`.

    A prediction with fewer classes than the data is class-agnostic: any object is its class 0.

    The weight of a class multiplies what a query with an object of this class loses at its own logit; with a softmax,
    all it loses. Negatives and divisors do not change: a match of weight 2 counts as two.

    Args:
        loss: one of those below, with its shape bound.
        overlap: the target of the scores; see `loss.box.quality`.
    """
    found = []
    placed = matches.to_queries(quality(matches, overlap=overlap))
    for stack, labels, overlaps in zip(matches.stacks, matches.labels, placed):
        logits = stack.prediction.logits
        num_classes = logits.shape[-1] - (matches.activation == "softmax")
        weights = None if matches.class_weights is None else matches.class_weights[labels.flatten()]
        used = None if num_classes < matches.num_classes else _used(matches, logits, labels)
        if used is not None and matches.activation == "softmax":
            logits = logits.masked_fill(~used, -torch.inf)
        if num_classes < matches.num_classes:
            labels = (labels == matches.num_classes).to(labels.dtype)
        values = loss(logits.flatten(0, 2), labels.flatten(), overlaps.flatten(), num_classes=num_classes)
        if used is not None and matches.activation == "sigmoid":
            values = torch.where(used.flatten(0, 2), values, 0.0)
        if weights is not None and values.ndim == 1:
            values = values * weights
        elif weights is not None:
            values = torch.where(_is_class(labels.flatten(), num_classes, logits), values * weights[:, None], values)
        found.append(values.view(len(logits), -1))
    return found


def _used(matches: Matches, logits: Tensor, labels: Tensor) -> Tensor | None:
    """`[l, B, Q, C]` bool: the logits that are trained; None: all."""
    annotated = matches.targets.annotated
    if annotated is None:
        return None
    used = annotated[None, :, None] | (labels[..., None] == torch.arange(matches.num_classes, device=labels.device))
    return F.pad(used, (0, logits.shape[-1] - matches.num_classes), value=True)  # the background is never left out


def vfl(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
    label_smoothing: float,
) -> Tensor:
    """Varifocal loss (Zhang et al. 2021, VarifocalNet, eq. 2): the target of the score is the box's overlap.

    Args:
        alpha: weight of the negatives.
        gamma: focusing exponent: how much easy negatives are down-weighted.
        label_smoothing: share subtracted from the overlap.
    """
    positive = _is_class(labels, num_classes, logits)
    quality = _smoothed(quality, label_smoothing)[:, None]
    score = torch.where(positive, quality, 0.0)
    weight = torch.where(positive, quality, alpha * logits.detach().sigmoid().pow(gamma))
    return F.binary_cross_entropy_with_logits(logits, score, weight, reduction="none")


def mal(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
    label_smoothing: float,
) -> Tensor:
    """Matchability-aware loss (Huang et al. 2025, DEIM): badly placed matches count fully, with a low target.

    Args:
        alpha: weight of the negatives.
        gamma: exponent of the overlap in the target and of the score in the negatives' weight.
        label_smoothing: share subtracted from the overlap.
    """
    positive = _is_class(labels, num_classes, logits)
    score = torch.where(positive, _smoothed(quality, label_smoothing).pow(gamma)[:, None], 0.0)
    weight = torch.where(positive, 1.0, alpha * logits.detach().sigmoid().pow(gamma))
    return F.binary_cross_entropy_with_logits(logits, score, weight, reduction="none")


def focal(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
    label_smoothing: float,
) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017, RetinaNet, eq. 5).

    Args:
        alpha: weight of the positives; negatives weigh `1 - alpha`.
        gamma: focusing exponent: how much easy examples are down-weighted.
        label_smoothing: share of a matched query's target spread over the other classes.
    """
    target = _class_target(labels, num_classes, logits, label_smoothing)
    # 1 - p_t from both sigmoids stays precise for confident logits; clamped above 0, else gamma < 1 has no gradient.
    error = torch.lerp(logits.sigmoid(), (-logits).sigmoid(), target).clamp(min=torch.finfo(logits.dtype).tiny)
    balance = (1 - alpha) + (2 * alpha - 1) * target
    return balance * error.pow(gamma) * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def bce(logits: Tensor, labels: Tensor, quality: Tensor, *, num_classes: int, label_smoothing: float) -> Tensor:
    """Binary cross-entropy of each class independently.

    Args:
        label_smoothing: share of a matched query's target spread over the other classes.
    """
    target = _class_target(labels, num_classes, logits, label_smoothing)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def ce(
    logits: Tensor, labels: Tensor, quality: Tensor, *, num_classes: int, eos_coef: float, label_smoothing: float
) -> Tensor:
    """Softmax cross-entropy with a background column, the last (Carion et al. 2020, DETR, eq. 2).

    Args:
        logits: `[N, num_classes + 1]`.
        eos_coef: weight of the queries without an object; the criterion divides by the sum of weights.
        label_smoothing: share of the target spread over all columns, background included.

    Returns:
        `[N]`.
    """
    weight = logits.new_ones(num_classes + 1)
    weight[num_classes].fill_(eos_coef)
    return F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=label_smoothing)


def ia_bce(logits: Tensor, labels: Tensor, quality: Tensor, *, num_classes: int, alpha: float) -> Tensor:
    """IoU-aware binary cross-entropy (Cai et al. 2023, Align-DETR, as RF-DETR weighs it).

    The target of a match combines score and overlap; every other logit is a negative weighed by its squared score,
    through which gradients flow.

    Args:
        alpha: share of the score against the overlap in the target, `p^alpha * IoU^(1 - alpha)`.
    """
    positive = _is_class(labels, num_classes, logits)
    score = logits.sigmoid()
    own_score = score.detach().gather(1, labels.clamp(max=num_classes - 1)[:, None])
    target = (own_score.pow(alpha) * quality.pow(1 - alpha)[:, None]).clamp(min=0.01)
    positive_weight = torch.where(positive, target, 0.0)
    negative_weight = torch.where(positive, 1 - target, score.square())
    return negative_weight * logits - F.logsigmoid(logits) * (positive_weight + negative_weight)


def _is_class(labels: Tensor, num_classes: int, logits: Tensor) -> Tensor:
    """`[N, C]` bool, True at the class of a matched query."""
    return labels[:, None] == torch.arange(num_classes, device=logits.device)


def _class_target(labels: Tensor, num_classes: int, logits: Tensor, smoothing: float) -> Tensor:
    """`[N, C]`: one at the class of a matched query, smoothed over the others; zero for queries without an object."""
    target = _is_class(labels, num_classes, logits).to(logits.dtype)
    if smoothing == 0 or num_classes == 1:
        return target
    spread = smoothing / (num_classes - 1)
    matched = (labels < num_classes).to(logits.dtype)[:, None]
    return target * (1 - smoothing - spread) + matched * spread


def _smoothed(score: Tensor, smoothing: float) -> Tensor:
    return score if smoothing == 0 else score * (1 - smoothing)
