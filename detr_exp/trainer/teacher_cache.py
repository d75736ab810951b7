"""What a frozen teacher makes of images, computed once, where images do not change from step to step."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from detr_exp import tensor_files
from detr_exp.data.augment import Augment
from detr_exp.data.cache import Room, room_for
from detr_exp.structures import Batch, leaves, mapped
from detr_exp.trainer.hardware import Hardware
from detr_exp.values import Values
from detr_exp.writing import write

log = logging.getLogger(__name__)
T = TypeVar("T")
OF_CACHE = {"cache", "cache_gb"}  # keys of `teacher` that are not arguments of its constructor
BESIDE = {"checkpoint", "threshold"}  # those that do not change what it makes of an image


class TeacherCache:
    """One file for each image that the teacher sees, named by its pixels: another image is another file.

    Absent images are computed one at a time, so that what is kept depends on no other image of a batch, and a resumed
    run computes the same. When the limit is reached, further images are computed every time.

    Args:
        room: for the files.

    Attributes:
        used: bytes of the files.
        shape: what the teacher made of some image, which tells how the tensors of a file belong together.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.used = sum(file.stat().st_size for file in room.folder.iterdir())
        self.shape: Any = None

    def joined(
        self, see: Callable[[Tensor, Tensor | None], T], batch: Batch, images: Tensor, padding_mask: Tensor | None
    ) -> T:
        """What a teacher makes of each image of a batch, stacked as it does itself.

        Args:
            see: images `[B, 3, H, W]` and padding mask `[B, H, W]` or None -> a tree of `[B, ...]`.
            batch: whose images these are.
            images: of it, at any size.
            padding_mask: likewise.
        """
        parts = []
        for index, name in enumerate(_names(batch, images)):
            file, one = self.room.folder / name, slice(index, index + 1)
            part = None if self.shape is None else _read(file, images.device)
            if part is None:
                self.shape = see(images[one], None if padding_mask is None else padding_mask[one])
                part = list(leaves(self.shape))
                self._keep(file, part)
            parts.append(part)
        stacked = iter([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
        return mapped(self.shape, lambda _: next(stacked))

    def _keep(self, file: Path, part: list[Tensor]) -> None:
        if file.exists() or not self.room.limit:
            return
        held = io.BytesIO()
        torch.save({str(number): tensor.cpu() for number, tensor in enumerate(part)}, held)
        size = held.getbuffer().nbytes
        problem = (
            "" if self.used + size <= self.room.limit else f"it has {self.used / 1e9:.1f} GB; teacher.cache_gb=..."
        )
        try:
            if not problem:
                write(file, held.getvalue())
                self.used += size
        except ValueError as error:
            problem = str(error)
        if problem:
            log.warning("the cache of the teacher gets no further images, which are computed every time: %s", problem)
            self.room.limit = 0


@dataclass(frozen=True)
class Caching:
    """Whether what a teacher makes of images is kept.

    Attributes:
        where: `none`, `ram` or `disk`.
        gigabytes: upper limit.
        settings: of the teacher, which decide what that is, beside its file.
    """

    where: str = "none"
    gigabytes: float = 1.0
    settings: Values = field(default_factory=dict)

    @classmethod
    def of(cls, teacher: Values, augment: Augment) -> Caching:
        """That of the settings of a teacher.

        Raises:
            ValueError: images change from step to step, so that nothing could be kept.
        """
        settings = {name: value for name, value in teacher.items() if name not in OF_CACHE | BESIDE}
        made = cls(teacher.get("cache", cls.where), teacher.get("cache_gb", cls.gigabytes), settings)
        if made.where != "none" and augment.changes:
            raise ValueError(
                f"teacher.cache is {made.where}, which keeps what the teacher makes of each image, but a training "
                f"image is another one in each step ({', '.join(augment.changes)}): teacher.cache=none, or "
                "data/augment=none"
            )
        return made

    def opened(self, record: Mapping[str, str], hardware: Hardware) -> TeacherCache | None:
        """The cache of a teacher on its device; None: `none`.

        Raises:
            ValueError: for another place, or a teacher whose file is not known.
        """
        if self.where == "disk" and "sha256" not in record:
            raise ValueError(
                f"teacher.cache is disk, but the teacher {record['teacher']} has no sha256, by which later runs would "
                "know it: teacher.cache=ram"
            )
        precision = hardware.precision()
        said = [record.get("sha256"), sorted(self.settings.items()), str(precision.dtype), precision.device.type]
        name = hashlib.sha256(repr([*said, hardware.products, torch.__version__]).encode()).hexdigest()[:16]
        room = room_for(self.where, self.gigabytes, f"teacher/{name}", "teacher")
        if room is None:
            return None
        log.info("what the teacher makes of images is kept in %s, at most %.1f GB", room.folder, room.limit / 1e9)
        return TeacherCache(room)


def _names(batch: Batch, images: Tensor) -> list[str]:
    """A name for each image: of its pixels, where it is padded, and the size at which it is seen."""
    masks = (
        [b""] * len(batch) if batch.padding_mask is None else [m.numpy().tobytes() for m in batch.padding_mask.cpu()]
    )
    size = str(tuple(images.shape[1:])).encode()
    pixels = batch.images.cpu().contiguous()
    return [
        hashlib.blake2b(size + mask + image.numpy().tobytes(), digest_size=20).hexdigest()
        for image, mask in zip(pixels, masks, strict=True)
    ]


def _read(file: Path, device: torch.device) -> list[Tensor] | None:
    """The tensors of a file; None: it is absent or damaged."""
    if file.is_file():
        with suppress(ValueError):
            return [tensor.to(device) for tensor in tensor_files.read(file, "").values()]
    return None
