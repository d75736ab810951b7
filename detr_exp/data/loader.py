"""Loader workers: from a key to a sample, and the `DataLoader` around them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detr_exp.data.augment import Augment, plain
from detr_exp.data.classes import ClassMap
from detr_exp.data.collate import Sample, collate
from detr_exp.data.content import Split
from detr_exp.data.render import needed, render, resized_plainly, target_of
from detr_exp.data.sampler import EvalSampler, Key, TrainSampler

_AUGMENT = 3  # stream of random numbers, beside those of the sampler
MOST_WORKERS = 8


@dataclass
class Loading:
    """How pictures get to the device.

    Attributes:
        num_workers: processes that load; None: one per core, at most 8 and one per batch; 0: the training process.
        pin_memory: page-locked batches, which copy to a GPU while it computes; None: where there is one.
        persistent_workers: keep the training workers from epoch to epoch; None: yes.
        prefetch_factor: batches that a worker prepares ahead; None: 2.
    """

    num_workers: int | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    prefetch_factor: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}; use 0 or more, or null to have it chosen")
        if self.prefetch_factor is not None and self.prefetch_factor < 1:
            raise ValueError(f"data.prefetch_factor is {self.prefetch_factor}; use 1 or more, or null for 2")

    def loader(self, samples: Samples, sampler: TrainSampler | EvalSampler) -> DataLoader:
        workers = self.num_workers
        if workers is None:
            workers = min(_cores(), MOST_WORKERS, len(sampler))
        return DataLoader(
            samples,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=workers > 0 and samples.augment is not None and self.persistent_workers is not False,
            prefetch_factor=(self.prefetch_factor or 2) if workers > 0 else None,
            worker_init_fn=_one_thread,
        )


class Samples(Dataset):
    """The samples of one split; each is a pure function of the seed and its key.

    Args:
        split: where pictures and objects come from.
        class_map: gives labels.
        seed: of the run.
        augment: None for evaluation: the whole picture, resized.
        stop_epoch: strong augmentation ends here; None: never.
        with_masks: rasterise masks.
        flip_order: `[C, K]` of the keypoint schema where keypoints are wanted; None: no keypoints.
        flippable: whether pictures may be mirrored.
    """

    def __init__(
        self,
        *,
        split: Split,
        class_map: ClassMap,
        seed: int,
        augment: Augment | None,
        stop_epoch: int | None,
        with_masks: bool,
        flip_order: np.ndarray | None,
        flippable: bool,
    ) -> None:
        self.split, self.class_map, self.seed, self.augment = split, class_map, seed, augment
        self.stop_epoch, self.with_masks = stop_epoch, with_masks
        self.flip_order, self.flippable = flip_order, flippable

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Sample:
        index, out = key.picture % len(self.split), (key.height, key.width)
        size, objects = self.split.size(index), self.split.objects(index)
        if self.augment is None:
            plan = plain(size, objects.boxes_xyxy, out)
            pixels = resized_plainly(self.split.picture(index), out)
        else:
            plan = self.augment.plan(
                np.random.default_rng((self.seed, _AUGMENT, key.epoch, key.picture)),
                size,
                objects.boxes_xyxy,
                out,
                strong=self.stop_epoch is None or key.epoch < self.stop_epoch,
                flippable=self.flippable,
            )
            pixels = render(plan, self.split.picture(index, needed(plan)))
        labels = self.class_map.labels(objects.categories)
        target = target_of(plan, objects, labels, with_masks=self.with_masks, flip_order=self.flip_order)
        return Sample(torch.from_numpy(np.require(pixels, requirements="W")), target, size, self.split.image_ids[index])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
