"""A data set as the other parts use it: classes, splits, keypoint schema, loaders."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from detr_exp.data.augment import Augment
from detr_exp.data.balance import Balance
from detr_exp.data.cache import image_cache
from detr_exp.data.channels import in_channels, refuse_colours
from detr_exp.data.checks import check_splits
from detr_exp.data.classes import ClassMap
from detr_exp.data.collate import Sample
from detr_exp.data.content import SPLITS, Source, Split
from detr_exp.data.fit import checked_fit, fit_of, refuse_other_sizes, refuse_several
from detr_exp.data.halves import halves_of
from detr_exp.data.keypoints import FlipPairs, KeypointSchema, mirror_remarks, schema
from detr_exp.data.loader import Loading, Samples
from detr_exp.data.part import Part, sample
from detr_exp.data.phases import Phases
from detr_exp.data.problems import DataError, listed
from detr_exp.data.sampler import EvalSampler, TrainSampler, multi_scale_sizes
from detr_exp.data.splits import HELD_OUT
from detr_exp.data.table import flat
from detr_exp.data.tiles import AUTO, TiledSplit, Tiles, tiles_for, tiles_of
from detr_exp.protocols import missing

log = logging.getLogger(__name__)


class Network(Protocol):
    """What a loader needs of a network; batches carry masks and keypoints if `tasks` has them (`protocols.Network`)."""

    image_size: tuple[int, int]
    stride: int
    tasks: tuple[str, ...]
    pixel_mean: Tensor


class DataSet:
    """A data set of any layout.

    Args:
        source: reads or generates it; see `coco.coco`, `yolo.yolo`, `shapes.shapes`, `auto.auto`.
        root: its folder.
        train, val, test: locations of the splits; their form depends on the layout.
        category_ids: `contiguous` or `raw`; see `classes.ClassMap`.
        num_classes: None: from the data.
        augment: of training images.
        channels: of images: 1 (grey), 3 (colours), or those of the files.
        fit, tiles: of images to the network's input; see `fit.Fit` and `tiles.tiles_of`.
        multi_scale: sizes of training batches; see `sampler.multi_scale_sizes`.
        stop_epoch, phases: epochs of strong augmentation and multi-scale; see `phases.Phases`.
        repeat_threshold, keep_empty: how often an epoch uses each training image; see `balance.Balance`.
        val_sample: validation images that a training evaluates; see `sampled`.
        keypoint_flip_pairs: 0-based pairs of keypoints that are swapped when mirrored, for every class or by the name
            of a class; None: from their names.
        keypoint_sigmas: OKS scale per keypoint; None: COCO's for its 17 points, else 0.05.
        on_error: `error`, or `skip` to leave out images that cannot be decoded; sources have an `on_error` of their
            own for what they read of an image.
        cache: where decoded images are cached, `none`, `ram` or `disk`; see `cache.image_cache`.
        cache_gb: upper limit of its size.
        num_workers, pin_memory, persistent_workers, prefetch_factor: of processes that load; see `loader.Loading`.

    Attributes:
        classes, category_ids: a name and the original id per label.
        num_classes: number of labels.
        keypoints: the keypoint schema, or None.

    Raises:
        ValueError: the data or the settings cannot be used.
    """

    def __init__(
        self,
        *,
        source: Source,
        root: str | None = None,
        train: object = None,
        val: object = None,
        test: object = None,
        category_ids: str = "contiguous",
        num_classes: int | None = None,
        augment: Augment,
        channels: int = 3,
        fit: str | None = None,
        tiles: Mapping[str, Any] | str | None = None,
        multi_scale: str | Sequence[int] | None = None,
        stop_epoch: int | None = None,
        phases: Mapping[str, Sequence[int | None] | None] | None = None,
        repeat_threshold: float | None = None,
        keep_empty: float = 1.0,
        val_sample: int | None = None,
        keypoint_flip_pairs: FlipPairs | None = None,
        keypoint_sigmas: Sequence[float] | None = None,
        on_error: str = "error",
        cache: str = "none",
        cache_gb: float = 8.0,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
    ) -> None:
        self.loading = Loading(num_workers, pin_memory, persistent_workers, prefetch_factor)
        self.cache = image_cache(cache, cache_gb, root, channels)
        self.content = source(root, {"train": train, "val": val, "test": test})
        self.class_map = ClassMap(self.content.categories, category_ids, num_classes, self.content.origin)
        self.classes, self.category_ids = self.class_map.classes, self.class_map.category_ids
        self.num_classes = self.class_map.num_classes
        self.keypoints: KeypointSchema | None = schema(
            self.class_map.by_label, flip_pairs=keypoint_flip_pairs, sigmas=keypoint_sigmas
        )
        self.augment, self.multi_scale, self.channels = augment, multi_scale, channels
        refuse_colours(augment, channels)
        self.fit = checked_fit(fit)
        self.tiles = tiles if isinstance(tiles, str) and tiles == AUTO else tiles_of(tiles)
        refuse_other_sizes(self.fit, tiles=self.tiles, multi_scale=multi_scale)
        used = {"mosaic": augment.mosaic, "mixup": augment.mixup, "multi_scale": multi_scale}
        self.phases = Phases(stop_epoch, phases, [name for name, value in used.items() if not value])
        self.balance = Balance(repeat_threshold, keep_empty)
        self.val_sample, self.on_error = val_sample, on_error
        missing = [name for name in SPLITS if name not in self.content.read]
        log.info("%s: classes (%d): %s", self.content.origin, len(self.content.categories), self.class_map)
        if missing:
            log.info("%s: no %s split", self.content.origin, " and no ".join(missing))

    @cached_property
    def train(self) -> Split:
        return self._read("train")

    @cached_property
    def val(self) -> Split | None:
        return self._read("val") if "val" in self.content.read else None

    @cached_property
    def test(self) -> Split | None:
        return self._read("test") if "test" in self.content.read else None

    @cached_property
    def held_out(self) -> Split | None:
        """The half of the validation images that is not `val`; None where that is all of them."""
        return self._read(HELD_OUT) if HELD_OUT in self.content.read else None

    @property
    def has_masks(self) -> bool:
        return self.train.has_masks

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all annotations, their images' paths and their sizes."""
        parts = [f"{name} {split.fingerprint}" for name in SPLITS if (split := getattr(self, name)) is not None]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def object_counts(self) -> list[int]:
        """Training objects of each label."""
        return np.bincount(self.class_map.labels(flat(self.train).categories), minlength=self.num_classes).tolist()

    def split(self, name: str) -> Split:
        """The split `train`, `val`, `test` or `held_out`.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.content.read:
            raise ValueError(f"{self.content.origin}: {self._lacks(name)}")
        return getattr(self, name)

    def _lacks(self, name: str) -> str:
        if name == HELD_OUT:
            why = "only runs with metric.honest_selection=true hold one out, of the data that they are trained on"
            return f"no half of the validation images is held out here; {why}: data.split=val"
        if name not in SPLITS:
            return f"data.split is {name!r}, and splits are {', '.join(SPLITS)}: data.split=test"
        return (
            f"the data set has no {name} split, only {', '.join(self.content.read)}; add one beside it, or name its "
            f"files where the layout has keys data.{name}"
        )

    def loader(
        self,
        split: str,
        *,
        network: Network,
        batch_size: int,
        seed: int,
        training: bool = False,
        step_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> DataLoader[Sample]:
        """Batches of one split, as `structures.Batch`.

        Args:
            split: `train`, `val`, `test` or `held_out`.
            network: provides the image size, the stride, and whether masks and keypoints are needed.
            batch_size: per rank.
            seed: decides order, sizes and augmentation of training batches.
            training: shuffled, augmented, without remainder; `loader.batch_sampler` has `set_epoch` and `set_start`.
                Otherwise every image once, in order, only resized.
            step_batches: batches of an optimiser step: they have one size.
            rank: of this process.
            world_size: processes that share the split.

        Raises:
            ValueError: the split does not exist, or the network needs what the data do not have.
        """
        self.refuse(split, network)
        whole = self.split(split)
        tiles = self.tiles_for(network)
        part: Split = whole if tiles is None else TiledSplit(whole, tiles, self.cache)
        owners = part.owners if isinstance(part, TiledSplit) else range(len(part))
        with_masks, with_keypoints = ("masks" in network.tasks, "keypoints" in network.tasks)
        own = network.image_size[0], network.image_size[1]
        sizes = multi_scale_sizes(self.multi_scale if training else None, own, network.stride)
        fit = fit_of(self.fit, network)
        canvases = [fit.canvas(part.size(i), own) for i in range(len(part))] if fit.buckets else None
        samples = Samples(
            split=part,
            class_map=self.class_map,
            seed=seed,
            augment=self.augment if training else None,
            phases=self.phases,
            with_masks=with_masks,
            flip_order=self.keypoints.flip_order() if with_keypoints and self.keypoints else None,
            flippable=not with_keypoints or self.keypoints is None or self.keypoints.flippable,
            cache=self.cache if part is whole else None,
            fit=fit,
            channels=self.channels,
            skip=self.on_error == "skip",
        )
        if training and with_keypoints and self.keypoints and (self.augment.flip or self.augment.vertical_flip):
            for kind, cases in mirror_remarks(self.keypoints, self.classes, sideways=self.augment.flip > 0).items():
                log.warning("%s: %s (%d): %s", self.content.origin, kind, len(cases), listed(cases, "; "))
        sampler: TrainSampler | EvalSampler
        if training:
            sampler = TrainSampler(
                *(len(part), batch_size, seed, own),
                sizes=sizes,
                step_batches=step_batches,
                phases=self.phases,
                uses=self.balance.uses(part),
                canvases=canvases,
                rank=rank,
                world_size=world_size,
            )
        else:
            ranks = {"rank": rank, "world_size": world_size}
            sampler = EvalSampler(owners, batch_size, own, canvases=canvases, **ranks)
        return self.loading.loader(samples, sampler)

    def tiles_for(self, network: Network) -> Tiles | None:
        """How images are cut for a network; the numbers of `auto` are chosen once."""
        if isinstance(self.tiles, str):
            self.tiles = tiles_for(self.train, network)
        return self.tiles

    def refuse(self, split: str, network: Network) -> None:
        """Refuse a network that needs masks or keypoints which a split does not have, or sizes that are chosen here.

        Raises:
            ValueError: it does, or the split does not exist.
        """
        refuse_several(network, self.fit, tiles=self.tiles, multi_scale=self.multi_scale)
        lacks = {
            "masks": "masks" in network.tasks and not self.split(split).has_masks,
            "keypoints": "keypoints" in network.tasks and self.keypoints is None,
        }
        for what in (name for name, is_absent in lacks.items() if is_absent):
            raise ValueError(
                f"{self.content.origin}: the {split} split has no {what}, but the network learns them; use "
                "model=rfdetr for boxes"
            )

    def first(self, count: int) -> DataSet:
        """The first training images that have objects, without augmentation, to train and to validate on.

        A setup that cannot overfit a few images has a fault that more data do not fix.
        """
        indices = [*islice((i for i in range(len(self.train)) if len(self.train.objects(i))), count)]
        part = Part(self.train, indices or range(min(count, len(self.train))))
        few = copy(self)
        for name in (*SPLITS, "fingerprint"):
            vars(few).pop(name, None)  # cached values of the full data set
        few.content = replace(self.content, read={"train": lambda: part, "val": lambda: part})
        few.augment, few.multi_scale, few.balance, few.val_sample = Augment(), None, Balance(), None
        return few

    def only(self, name: str, indices: Sequence[int]) -> DataSet:
        """The same with a part of the images of a split."""
        part, few = Part(self.split(name), indices), copy(self)
        vars(few).pop(name, None)
        few.content = replace(self.content, read={**self.content.read, name: lambda: part})
        return few

    def halved(self) -> DataSet:
        """The same with half of the validation images as `val`, and the others as `held_out`; see `halves.halves`.

        Raises:
            DataError: there are too few images with objects.
        """
        whole = self.split("val")
        parts = halves_of(whole, dict(zip(self.category_ids, self.classes)), self.content.origin)
        made = self.only("val", parts[0])
        made.fingerprint = self.fingerprint  # the data are the same
        made.content = replace(made.content, read={**made.content.read, HELD_OUT: lambda: Part(whole, parts[1])})
        return made

    def sampled(self) -> DataSet:
        """The same with `val_sample` of the images of `val`, and of `held_out` if there is one; see `part.sample`."""
        if self.val_sample is None:
            return self
        made = self
        for name in ("val", HELD_OUT):
            if name in self.content.read:
                made = made.only(name, sample(self.split(name), self.val_sample, f"{self.content.origin}: {name}"))
        made.fingerprint = self.fingerprint  # the data are the same
        return made

    def check(self, needed: Sequence[str] = ("train", "val")) -> None:
        """Read all annotations and the headers of all images; training and `check_data` do this before they start.

        Args:
            needed: the splits that have to be there.

        Raises:
            DataError: lists all problems of all splits, or that there is no object to train on.
        """
        lacks = {name: self._lacks(name) for name in needed if name not in self.content.read}
        check_splits(self.content, self.classes, self.split, self.on_error, lacks)

    def _read(self, name: str) -> Split:
        read: Callable[[], Split] = self.content.read[name]
        split = read()
        if lacking := missing(split, Split):
            raise DataError(
                f"{self.content.origin}: the {name} split, a {type(split).__name__}, has no {', '.join(lacking)}; a "
                f"split needs all that {Split.__module__}.Split lists: add these to it, or choose another data.source"
            )
        return in_channels(split, self.channels)
