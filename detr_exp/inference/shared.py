"""Several members of a network evaluated together: what they share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from detr_exp.data.loader import batches
from detr_exp.inference.on_data import OnData
from detr_exp.model.member import Elastic, Member, outputs_of
from detr_exp.model.postprocess import detect
from detr_exp.ops.merging import Merging
from detr_exp.protocols import Metric
from detr_exp.structures import on_host
from detr_exp.trainer.evaluation import as_float32, invalidate_non_finite

Measured = tuple[Member, Metric, dict[str, float]]


@torch.inference_mode()
def evaluate_members(
    opened: OnData,
    split: str,
    members: Sequence[Member],
    batch_size: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[list[Measured]]:
    """Metrics of several members, equal to those of separate evaluations to the last bit; one list for each image size.

    A size takes one pass of the backbone and the encoder over the split, and a decoder pass for each number of queries.
    Their detections are in memory until the next size.

    Args:
        opened: a detector whose network is `Elastic` and not compiled, with the data.
        split: of the data.
        members: with their image sizes.
        batch_size: None: as in training.
        on_batch: called after each batch of each size.

    Yields:
        each member with its metric, after `compute`, and its values. Smaller images come first.
    """
    network, precision = opened.detector.network, opened.detector.precision
    assert isinstance(network, Elastic)
    sizes = {member.of(network.own).image_size for member in members}
    for size in sorted(sizes, key=lambda one: (one[0] * one[1], one)):
        those = [member for member in members if member.of(network.own).image_size == size]
        metrics = dict(zip(those, opened.metrics(split, len(those))))
        for metric in metrics.values():
            metric.reset()
        merging = {member: Merging(network.num_queries) for member in those}
        network.set_member(replace(those[0], layers=None))
        for batch in batches(opened.loader(split, batch_size)):
            moved = batch.to(precision.device, non_blocking=True)
            with precision.autocast():
                found = list(outputs_of(network, moved.pixels(precision.memory_format), those, moved.padding_mask))
            for member, outputs in found:
                queries = member.of(network.own).queries
                canvas = batch.image_sizes, batch.padding_mask
                detections = on_host(detect(network, as_float32(outputs), *canvas, queries))
                if batch.tiles is None:
                    metrics[member].update(batch.image_ids, detections)
                else:
                    metrics[member].update(*merging[member].complete(batch.image_ids, batch.tiles, detections))
            on_batch()
        network.set_member(Member())
        yield [(member, metric, invalidate_non_finite(metric.compute())) for member, metric in metrics.items()]
