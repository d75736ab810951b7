"""Inputs of compiled losses: sizes that follow from the number of objects are left open, and numbers are tensors.

Then one graph serves all batches, and reads nothing of the host, so that a CUDA graph can hold it. Only an axis of
length 0 or 1 makes torch compile another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.loss.matches import Stack
from detr_exp.ops.transfer import to_device
from detr_exp.structures import Targets, mapped, predicted


def open_stack(stack: Stack) -> Stack:
    """Predictions, but not their masks, with their pairs; the numbers of pairs and of denoising queries are open."""
    device = stack.pairs.query.device
    image, query, target = (_open(index, 1) for index in stack.pairs[:3])
    prediction = stack.prediction
    if predicted(prediction, "masks") is not None:
        prediction = prediction._replace(masks=None)
    queries = 2 if "denoising" in stack.place else None
    return stack._replace(
        prediction=mapped(prediction, lambda part: _open(part, queries)),
        pairs=stack.pairs._replace(image=image, query=query, target=target, host=None),
        copies=as_tensor(stack.copies, device),
        num_pairs=as_tensor(stack.num_pairs, device),
        num_queries=as_tensor(stack.num_queries, device),
    )


def open_targets(targets: Targets) -> Targets:
    """Targets whose number of objects is left open, without the counts of the host."""

    def opened(part: Tensor | None) -> Tensor | None:
        return None if part is None else _open(part, 0)

    return Targets(
        labels=_open(targets.labels, 0),
        boxes=_open(targets.boxes, 0),
        counts=(),
        masks=opened(targets.masks),
        keypoints=opened(targets.keypoints),
        extra={name: _open(part, 0) for name, part in targets.extra.items()},
        image_extra=targets.image_extra,
        annotated=targets.annotated,
    )


def as_tensor(number: float | Tensor, device: torch.device) -> Tensor:
    """`[]` on the device: a number of the host would become a constant of the graph."""
    return number if isinstance(number, Tensor) else to_device(torch.tensor(float(number)), device)


def _open(part: Tensor, axis: int | None) -> Tensor:
    """A contiguous tensor of its own, because offsets and strides of views are compiled into a graph."""
    whole = part.clone(memory_format=torch.contiguous_format)
    if axis is not None:
        torch._dynamo.maybe_mark_dynamic(whole, axis)
    return whole
