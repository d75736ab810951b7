"""Samples, made from keys in loader workers, and the `DataLoader` that runs them."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue
from types import TracebackType

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from detr_exp.data.augment import MIX_SHARE, Augment, Plan, Tiles, plain
from detr_exp.data.cache import ImageCache
from detr_exp.data.classes import ClassMap
from detr_exp.data.collate import Sample, collate
from detr_exp.data.content import Afar, Objects, Split
from detr_exp.data.fit import STRETCH, Fit
from detr_exp.data.image import ImageError
from detr_exp.data.phases import Phases
from detr_exp.data.render import blended, fitted, layer, needed, on_canvas, target_of, together
from detr_exp.data.sampler import EvalSampler, Key, TrainSampler
from detr_exp.data.tiles import TiledSplit
from detr_exp.signals import held_back, leave_to_parent
from detr_exp.structures import Batch, Target

_AUGMENT = 3  # random stream, separate from those of the sampler
MOST_WORKERS = 8
# Enough for any number of workers; without a limit, some programs iterate over all possible descriptors
OPEN_FILES = 65536
# parts of the messages of torch and the system when processes or shared memory run out, and how to fix it
WANTS = {
    ("Too many open files", "ancdata"): "the limit of open files is too low: raise it (ulimit -n 4096), or use",
    ("shared memory",): "shared memory (/dev/shm) is too small: give it more (docker run --shm-size=8g), or use",
    (
        "Cannot allocate memory",
        "can't start new thread",
        "Resource temporarily unavailable",
    ): "the system starts no further process (memory, ulimit -u or -v): use",
}
ENDED = {
    "SIGKILL": ", most likely because memory ran out",
    "SIGBUS": ", most likely because shared memory (/dev/shm; docker run --shm-size=8g) is too small",
}
FEWER = "fewer workers: data.num_workers=1, or 0 for none"


class WorkerError(RuntimeError):
    """A loader worker was lost or could not be started; the training state is intact and can be saved."""


@dataclass
class Loading:
    """Settings of the loader workers.

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

    def loader(self, samples: Samples, sampler: TrainSampler | EvalSampler) -> DataLoader[Sample]:
        workers = self.num_workers
        if workers is None:
            workers = min(_cores(), MOST_WORKERS, len(sampler))
        sampler.turns = max(1, workers)
        if workers > 0:
            _allow_open_files()
        return DataLoader(
            samples,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=workers > 0 and samples.augment is not None and self.persistent_workers is not False,
            prefetch_factor=(self.prefetch_factor or 2) if workers > 0 else None,
            worker_init_fn=_begin,
        )


def batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader whose workers ignore signals, which this process handles.

    Raises:
        WorkerError: between two batches, if a worker was lost.
    """
    iterator: Iterator[Batch] | None = None
    try:
        with held_back():
            iterator = iter(loader)
        yield from iterator
    except (RuntimeError, OSError) as error:
        if not getattr(loader, "num_workers", 0):
            raise
        started = iterator or getattr(loader, "_iterator", None)  # of persistent workers
        for worker in getattr(started, "_workers", ()):
            if worker.exitcode:
                raise WorkerError(f"{_ending(worker.exitcode)} use {FEWER}") from None
        for words, advice in WANTS.items():
            if any(word in str(error) for word in words):
                first = str(error).strip().splitlines()[-1]
                raise WorkerError(f"images cannot be loaded ({first}): {advice} {FEWER}") from error
        raise


def _ending(exit_code: int) -> str:
    if exit_code == errno.EMFILE:
        return "a process that loads images may not open further files: raise the limit (ulimit -n 4096), or"
    name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"
    return f"a process that loads images was ended by {name}{ENDED.get(name, '')};"


class Samples(Dataset[Sample]):
    """The samples of one split; each is a pure function of the seed and its key.

    Args:
        split: provides images and objects.
        class_map: maps category ids to labels.
        seed: of the run.
        augment: None for evaluation: the whole image, resized.
        phases: epochs of strong augmentation, mosaic and mixup.
        with_masks: rasterise masks.
        flip_order: `[C, K]` of the keypoint schema where keypoints are wanted; None: no keypoints.
        flippable: whether images may be mirrored.
        cache: holds decoded images; None: they are decoded every time.
        fit: of images to the size of the network's input.
        channels: of the images.
        skip: replace an image that cannot be decoded: by the next one in training, by a black one in evaluation.
    """

    def __init__(
        self,
        *,
        split: Split,
        class_map: ClassMap,
        seed: int,
        augment: Augment | None,
        phases: Phases,
        with_masks: bool,
        flip_order: np.ndarray | None,
        flippable: bool,
        cache: ImageCache | None = None,
        fit: Fit = STRETCH,
        channels: int = 3,
        skip: bool = False,
    ) -> None:
        self.split, self.class_map, self.seed, self.augment = split, class_map, seed, augment
        self.phases, self.with_masks = phases, with_masks
        self.flip_order, self.flippable, self.fit, self.skip = flip_order, flippable, fit, skip
        self.channels = channels
        self.cache, self.image = cache, split.image if cache is None else partial(cache.image, split)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Sample:
        skipped: list[str] = []
        while True:
            try:
                sample = self._plain(key) if self.augment is None else self._augmented(key, self.augment)
            except ImageError as error:
                skipped.append(str(error))
                if not self.skip or len(skipped) > len(self.split):
                    raise
                if self.augment is None:
                    return self._black(key, skipped)
                key = key._replace(image=key.image + 1)
                continue
            sample.skipped = skipped
            return sample

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """The samples of a batch; images of the next one are read meanwhile where they are far away."""
        if isinstance(self.split, Afar):
            coming = [i for key in (*keys, *getattr(keys, "coming", ())) for i in self._used(key)]
            self.split.ahead(coming if self.cache is None else self.cache.missing(self.split, coming))
        return [self[key] for key in keys]

    def _used(self, key: Key) -> list[int]:
        """The images that a sample is made of, those that operations add left out."""
        if self.augment is None:
            return [key.image]
        return [index for part in self._layers(key, self.augment)[1] for index, _ in part]

    def target(self, objects: Objects, plan: Plan, with_masks: bool | None = None) -> Target:
        """The objects of one image, transformed by a plan; with masks as for samples, unless told otherwise."""
        labels, wanted = (
            self.class_map.labels(objects.categories),
            self.with_masks if with_masks is None else with_masks,
        )
        target = target_of(plan, objects, labels, with_masks=wanted, flip_order=self.flip_order)
        if objects.annotated is not None:
            target.annotated = torch.from_numpy(self.class_map.mask(objects.annotated))
        return target

    def _plain(self, key: Key) -> Sample:
        return self._sample(key, fitted(self.image(key.image), (key.height, key.width), self.fit))

    def _black(self, key: Key, skipped: list[str]) -> Sample:
        """A black sample for an image that cannot be read: its objects count as missed."""
        sample = self._sample(key, np.zeros((key.height, key.width, self.channels), np.uint8))
        sample.skipped = skipped
        return sample

    def _sample(self, key: Key, pixels: np.ndarray) -> Sample:
        index, size = key.image, self.split.size(key.image)
        objects = self.split.objects(index)
        plan = plain(size, objects.boxes_xyxy, (key.height, key.width), self.fit)
        target, content = self.target(objects, plan), self._content([[plan]])
        tile = self.split.tiles[index] if isinstance(self.split, TiledSplit) else None
        return Sample(_tensor(pixels), target, size, self.split.image_ids[index], content, tile)

    def _augmented(self, key: Key, augment: Augment) -> Sample:
        rng, tiles = self._layers(key, augment)
        strong = self.phases.has("strong", key.epoch)
        first, out = key.image % len(self.split), (key.height, key.width)
        pixels, targets, plans = [], [], []
        for part in tiles:
            pastes: list[tuple[Plan, np.ndarray]] = []
            for index, tile in part:
                size, objects = self.split.size(index), self.split.objects(index)
                plan = augment.plan(
                    *(rng, size, objects.boxes_xyxy, out),
                    tile=tile,
                    strong=strong,
                    flippable=self.flippable,
                    fit=self.fit,
                )
                pastes.append((plan, self.image(index, needed(plan))))
                targets.append(self.target(objects, plan))
            pixels.append(layer(pastes, self.fit))
            plans.append([plan for plan, _ in pastes])
        image = blended(pixels, rng.uniform(*MIX_SHARE)) if len(pixels) > 1 else pixels[0]
        target = together(targets)
        image_id, content = self.split.image_ids[first], self._content(plans)
        if strong and augment.operations:
            another = partial(self._another, augment, rng, content or out)
            image, target = _operated(augment, rng, image, target, content or out, another)
        return Sample(_tensor(image), target, self.split.size(first), image_id, content)

    def _layers(self, key: Key, augment: Augment) -> tuple[np.random.Generator, list[Tiles]]:
        """The random numbers of a sample, and the images that it is made of, which are the first thing they decide."""
        rng = np.random.default_rng((self.seed, _AUGMENT, key.epoch, key.image))
        mosaic, mixup = (self.phases.has(name, key.epoch) for name in ("mosaic", "mixup"))
        first, count, out = key.image % len(self.split), len(self.split), (key.height, key.width)
        return rng, augment.layers(rng, first, count, out, mosaic=mosaic, mixup=mixup)

    def _another(self, augment: Augment, rng: np.random.Generator, out: tuple[int, int]) -> tuple[np.ndarray, Target]:
        """A random image of this size, augmented, with the masks of its objects where there are outlines."""
        index = int(rng.integers(len(self.split)))
        size, objects = self.split.size(index), self.split.objects(index)
        plan = augment.plan(rng, size, objects.boxes_xyxy, out, flippable=self.flippable, fit=self.fit)
        return layer([(plan, self.image(index, needed(plan)))], self.fit), self.target(
            objects, plan, self.split.has_masks
        )

    def _content(self, layers: Sequence[Sequence[Plan]]) -> tuple[int, int] | None:
        """(height, width) of all that is seen; a mosaic fills its output, a mix is as large as the larger image."""
        if not self.fit.pads:
            return None
        ends = [part[0].out if len(part) > 1 else part[0].frame[:1:-1] for part in layers]
        return max(height for height, _ in ends), max(width for _, width in ends)


def _operated(
    augment: Augment,
    rng: np.random.Generator,
    image: np.ndarray,
    target: Target,
    content: tuple[int, int],
    another: Callable[[], tuple[np.ndarray, Target]] | None = None,
) -> tuple[np.ndarray, Target]:
    """Apply the user-defined operations to what lies on the canvas: padding stays where it is."""
    canvas, (height, width) = (image.shape[0], image.shape[1]), content
    if content == canvas:
        return augment.operated(rng, image, target, another)
    seen, inner = np.ascontiguousarray(image[:height, :width]), on_canvas(target, canvas, content)
    changed, inner = augment.operated(rng, seen, inner, another)
    image = image.copy()
    image[:height, :width] = changed
    return image, on_canvas(inner, content, canvas)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(pixels, requirements="W"))


def _cores() -> int:
    """CPU cores of this machine for each of its ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _allow_open_files() -> None:
    """Raise the limit of open files of this process and its children: each shared tensor needs one file."""
    try:
        import resource
    except ImportError:  # not available on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _begin(worker: int) -> None:
    """Prepare a new worker: an error while it passes on a batch is reported, not waited for without end."""
    leave_to_parent()
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = _hand_over_error  # type: ignore[attr-defined]
    sys.excepthook = _end_with


def _hand_over_error(queue: Queue[object], error: BaseException, item: tuple[int, object]) -> None:
    """Send the error in place of a batch that cannot be put into shared memory."""
    queue.put((item[0], ExceptionWrapper(exc_info=(type(error), error, None), where="a process that loads images")))


def _end_with(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the worker when its thread that shares open files fails."""
    os._exit(getattr(error, "errno", None) or 1)
