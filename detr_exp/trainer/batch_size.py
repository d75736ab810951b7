"""Whether a batch fits into memory, and the largest batch that does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp.data.fit import STRETCH, sizes_of
from detr_exp.data.sampler import multi_scale_sizes
from detr_exp.protocols import Network
from detr_exp.structures import Batch, Target, Targets
from detr_exp.trainer.distributed import world_size
from detr_exp.trainer.evaluation import as_float32
from detr_exp.trainer.memory import available, saved_bytes, state_preserved
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import Run

MAX_BATCH_SIZE = 128  # larger batches are not tried
MEMORY_SHARE = 0.9  # of what fits: memory is fragmented, and other programs need some
COPIES_PER_PARAMETER = 4  # values stored per trained parameter: gradient, two moments, average
GIB = 2**30


class MemoryNeed(NamedTuple):
    """Bytes that a training step uses besides the weights: `fixed + images * per_image`."""

    fixed: int
    per_image: int

    def of(self, images: int) -> int:
        return self.fixed + images * self.per_image


def find_batch_size(settings: Settings, run: Run, network: Network, devices: int = 1) -> tuple[int, int]:
    """Batch size and accumulation for `trainer.batch_size=auto`.

    Devices that raise an error when their memory is full run a trial step. On a CPU a step that does not fit would end
    the process; there the memory is estimated from the tensors that one image saves for the backward pass.

    Args:
        network: on its device.
        devices: number of devices that share the effective batch.

    Raises:
        ValueError: not even one image fits.
    """
    fits = fits_by_estimate if settings.hardware.torch_device.type == "cpu" else fits_by_trial
    largest = largest_that_fits(fits(settings, run, network), min(MAX_BATCH_SIZE, len(run.data.train)))
    if not largest:
        free = available(settings.hardware.torch_device) or 0
        raise ValueError(_too_large(settings, run, network, need_of(settings, run, network), free, 1))
    headroom = settings.auto_batch_ema_headroom if settings.use_ema else 1.0
    return split_effective_batch(largest, headroom, settings.auto_batch_target_effective, devices)


def refuse_too_large(settings: Settings, run: Run, network: Network, batch_size: int) -> None:
    """Refuse a batch that cannot fit, before anything is trained; costs the forward pass of one image.

    Counts activations, gradients, moments and the average, but no temporary tensors.

    Raises:
        ValueError: with the numbers and the settings to lower.
    """
    free = available(settings.hardware.torch_device)
    if free is None:
        return
    need = need_of(settings, run, network)
    if need.of(batch_size) > free:
        raise ValueError(_too_large(settings, run, network, need, free, batch_size))


def num_overfit_images(batches: int, batch_size: int | str) -> int:
    """Number of images for `trainer.overfit_batches`.

    Raises:
        ValueError: the batch size is not known yet.
    """
    if not isinstance(batch_size, int):
        raise ValueError(
            f"trainer.overfit_batches needs batches of a known size, not {batch_size!r}: trainer.batch_size=4"
        )
    return batches * batch_size * world_size()


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest count in 1..`most` that fits, found by doubling and bisection; 0 if not even one fits.

    Args:
        fits: whether a number of images fits; if it does, smaller numbers must fit, too.
        most: largest count to try.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def split_effective_batch(largest: int, headroom: float, target: int, devices: int) -> tuple[int, int]:
    """Batch size per device and batches to accumulate, as in RF-DETR.

    Args:
        largest: number of images that fit.
        headroom: fraction of them to use, in (0, 1].
        target: smallest number of images of an effective batch.
        devices: number of devices that share it.
    """
    batch_size = max(1, int(headroom * int(MEMORY_SHARE * largest)))
    return batch_size, max(1, math.ceil(math.ceil(target / devices) / batch_size))


def fits_by_estimate(settings: Settings, run: Run, network: Network) -> Callable[[int], bool]:
    """Whether a batch of some size needs no more memory than is free, as a function of its size."""
    need, free = need_of(settings, run, network), available(settings.hardware.torch_device)
    return lambda images: free is None or need.of(images) <= free


def fits_by_trial(settings: Settings, run: Run, network: Network) -> Callable[[int], bool]:
    """Whether a forward and a backward pass of a batch succeed with moments and average allocated, by its size."""

    def fits(images: int) -> bool:
        with state_preserved(network):
            try:
                beside = [
                    p.new_empty(COPIES_PER_PARAMETER - 1, *p.shape) for p in network.parameters() if p.requires_grad
                ]
                loss_of(settings, run, network, images).backward()
                del beside
            except RuntimeError as error:  # MPS has no exception class for it
                if "out of memory" not in str(error):
                    raise
                return False
        return True

    return fits


def need_of(settings: Settings, run: Run, network: Network) -> MemoryNeed:
    """Memory per image, and the memory that does not depend on the batch."""
    with state_preserved(network):
        saved = saved_bytes(network, lambda: loss_of(settings, run, network, 1))
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    states = COPIES_PER_PARAMETER if settings.use_ema else COPIES_PER_PARAMETER - 1
    return MemoryNeed(fixed=states * trained + saved.weights, per_image=saved.activations)


def loss_of(settings: Settings, run: Run, network: Network, images: int) -> Tensor:
    """The loss of a batch at the largest scale; every image has as many objects as the fullest image of the data."""
    device = settings.hardware.torch_device
    precision = settings.hardware.precision()
    batch = worst_case_batch(run, network, images, settings.auto_batch_max_targets_per_image).to(device)
    network.train()
    with torch.compiler.set_stance("force_eager"):  # what is compiled would be compiled for this batch, too
        with precision.autocast():
            pixels = batch.pixels(precision.memory_format)
            outputs = network(pixels, batch.targets, batch.padding_mask)
        taught = run.teaching(batch, pixels, outputs, precision) if run.teaching is not None else None
        boxes = len(batch.targets)
        losses = run.criterion(as_float32(outputs), batch.targets, boxes, num_images=images, taught=taught)
    return losses["total"]


def worst_case_batch(run: Run, network: Network, images: int, most_targets: int) -> Batch:
    """Grey images of the largest training size, each with the largest number of objects of an image, up to a limit."""
    height, width = _largest_size(run, network)
    count = max(1, min(most_targets, run.data.train.most_objects))
    masks = torch.zeros(count, height, width, dtype=torch.bool) if "masks" in network.tasks else None
    keypoints = None
    if "keypoints" in network.tasks and run.data.keypoints is not None:
        keypoints = torch.tensor([0.5, 0.5, 2.0]).expand(count, max(run.data.keypoints.counts), 3).clone()
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(count, 4).clone()
    train = run.data.train
    known = next((objects for i in range(len(train)) if len(objects := train.objects(i))), train.objects(0))
    target = Target(
        *(torch.zeros(count, dtype=torch.int64), boxes, masks, keypoints),
        extra={name: torch.from_numpy(values[[0] * count]) for name, values in known.extra.items()},
        image_extra={name: torch.from_numpy(values.copy()) for name, values in known.image_extra.items()},
    )
    return Batch(
        images=torch.full((images, height, width, len(network.pixel_mean)), 127, dtype=torch.uint8),
        targets=Targets.pack([target] * images),
        image_sizes=torch.tensor([[height, width]] * images),
        padding_mask=torch.zeros(images, height, width, dtype=torch.bool) if run.data.fit != STRETCH.name else None,
    )


def _largest_size(run: Run, network: Network) -> tuple[int, int]:
    """(height, width) of the largest images of training."""
    height, width = network.image_size
    several = multi_scale_sizes(run.data.multi_scale, (height, width), network.stride)
    return max([*several, *sizes_of(network)], key=math.prod)


def _too_large(settings: Settings, run: Run, network: Network, need: MemoryNeed, free: int, batch_size: int) -> str:
    height, width = _largest_size(run, network)
    remedies = ["a smaller model.image_size"]
    if not settings.hardware.gradient_checkpointing:
        remedies.insert(0, "trainer.hardware.gradient_checkpointing=true")
    for smaller in range(batch_size - 1, 0, -1):
        if batch_size % smaller == 0 and need.of(smaller) <= MEMORY_SHARE * free:
            accumulated = batch_size // smaller * settings.grad_accum_steps
            remedies.insert(0, f"trainer.batch_size={smaller} trainer.grad_accum_steps={accumulated}")
            break
    return (
        f"a step of {batch_size} images of {height} x {width} needs at least {need.of(batch_size) / GIB:.1f} GiB "
        f"({need.per_image / GIB:.2f} each, {need.fixed / GIB:.2f} for gradients, moments and average), but "
        f"{free / GIB:.1f} GiB are free; use {', or '.join(remedies)}"
    )
