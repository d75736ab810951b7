"""One evaluation loop, for training, the `evaluate` command and all other commands that report mAP."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_exp.data.content import Split
from detr_exp.data.joined import image_ids_by_set
from detr_exp.data.loader import batches
from detr_exp.model.postprocess import detect
from detr_exp.ops.merging import Merging
from detr_exp.protocols import Metric, Network
from detr_exp.signals import Interrupt, Interrupted
from detr_exp.structures import Batch, Detections, Outputs, Tree, mapped, on_host
from detr_exp.trainer import distributed
from detr_exp.trainer.precision import Precision

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Some of the evaluated images, which get values of their own.

    Attributes:
        image_ids: of these images.
        metric: with their ground truth.
    """

    image_ids: Collection[int]
    metric: Metric


HEADLINE = {"mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"}


@torch.inference_mode()
def evaluate(
    network: Network,
    loader: Iterable[Batch],
    metric: Metric,
    precision: Precision,
    *,
    criterion: nn.Module | None = None,
    parts: Mapping[str, Part] | None = None,
    on_batch: Callable[[Batch, list[Detections]], None] | None = None,
    interrupt: Interrupt | None = None,
) -> dict[str, float]:
    """Run `network` over `loader` and compute the metric; with several ranks, over the detections of all ranks.

    Args:
        network: in any mode; it is evaluated in `eval()` mode, and its mode is restored.
        loader: batches of the split whose ground truth `metric` has.
        metric: reset first.
        precision: device and type of the computation.
        criterion: also compute the loss (`loss`, mean over images).
        parts: by name, for the main values of some of the images, `<name>/mAP` ...
        on_batch: called with every batch and its finite detections, on the CPU; of tiles, with those of each tile.
        interrupt: checked after every batch.

    Returns:
        the metric's values (`mAP`, `mAP50`, ...; see `invalidate_non_finite`), `loss` and its terms if requested,
        `time/network_ms` for an image from its pixels to its boxes, and `time/images_per_second`.

    Raises:
        Interrupted: a signal came.
        WorkerError: a process that loads images was lost.
    """
    was_training, parts = network.training, parts or {}
    network.eval()
    for one in (metric, *(part.metric for part in parts.values())):
        one.reset()
    losses: dict[str, Tensor] = {}
    merging = Merging(network.num_queries)
    images, network_seconds, started = 0, 0.0, time.perf_counter()
    try:
        for batch in batches(loader):
            moved = batch.to(precision.device, non_blocking=True)
            began = time.perf_counter()
            with precision.autocast():
                outputs: Outputs = network(moved.pixels(precision.memory_format), padding_mask=moved.padding_mask)
            outputs = as_float32(outputs)
            detections = on_host(detect(network, outputs, batch.image_sizes, batch.padding_mask))
            network_seconds += time.perf_counter() - began
            ids, of_images = batch.image_ids, detections
            if batch.tiles is not None:
                ids, of_images = merging.complete(ids, batch.tiles, detections)
            metric.update(ids, of_images)
            for part in parts.values():
                some = [i for i, number in enumerate(ids) if number in part.image_ids]
                part.metric.update([ids[i] for i in some], [of_images[i] for i in some])
            if criterion is not None:
                for name, term in criterion(outputs, moved.targets, num_boxes=len(batch.targets)).items():
                    losses[name] = losses.get(name, 0) + term * len(batch)
            images += len(batch)
            if on_batch is not None:
                on_batch(batch, [d.finite() for d in detections])
            if interrupt is not None and interrupt.number is not None:
                break
    finally:
        network.train(was_training)
    if interrupt is not None and (number := distributed.signal_of_any_rank(interrupt.number)):
        raise Interrupted(number)
    metric.merge(distributed.gather_on_first_rank)
    values = invalidate_non_finite(distributed.on_first_rank(metric.compute))
    for name, part in parts.items():
        part.metric.merge(distributed.gather_on_first_rank)
        found = headline(invalidate_non_finite(distributed.on_first_rank(part.metric.compute)))
        values |= {f"{name}/{key}": value for key, value in found.items()}
    values["time/network_ms"] = 1000 * network_seconds / max(1, images)
    sums_of = distributed.gather(({name: float(value) for name, value in losses.items()}, images))
    images = sum(count for _, count in sums_of)
    for name in losses:
        values["loss" if name == "total" else name] = sum(sums.get(name, 0.0) for sums, _ in sums_of) / images
    values["time/images_per_second"] = images / (time.perf_counter() - started)
    return values


def parts_of(split: Split, make_metric: Callable[[tuple[int, ...]], Metric]) -> dict[str, Part]:
    """A part for each data set of a split that has images of several.

    Args:
        split: the evaluated images.
        make_metric: image ids -> metric with the ground truth of these.
    """
    return {name: Part(frozenset(ids), make_metric(ids)) for name, ids in image_ids_by_set(split).items()}


def invalidate_non_finite(values: dict[str, float]) -> dict[str, float]:
    """The values of an evaluation; all are NaN if some predictions were not finite, because the network has diverged.

    The values of the remaining predictions may be high by chance, and must not be used to compare evaluations.
    """
    count = values.get("nonfinite", 0)
    if not count:
        return values
    if distributed.rank() == 0:
        log.warning(
            "%.0f predictions are not finite, so the values of this evaluation are NaN. Lower optim.lr, or if the "
            "evaluation uses half precision: trainer.hardware.eval_amp=null",
            count,
        )
    return dict.fromkeys(values, math.nan) | {"nonfinite": count}


def as_float32(outputs: Tree) -> Tree:
    """Outputs with every half-precision tensor as float32: losses and box maths are computed in it."""
    return mapped(outputs, lambda part: part.float() if part.dtype in (torch.bfloat16, torch.float16) else part)


def headline(found: dict[str, float]) -> dict[str, float]:
    """The main metrics of each task; for an evaluator with other metric names, all values except those per class."""
    shown = {
        name: value for name, value in found.items() if name.removeprefix("segm_").removeprefix("keypoint_") in HEADLINE
    }
    return shown or {name: value for name, value in found.items() if "/" not in name and name != "nonfinite"}
