"""Checkpoints of sharded runs: every rank writes its shards, and any number of ranks can read them.

`checkpoint.pth` has its usual content, but its sharded tensors have no values (meta tensors). The values are in a
folder next to it, written by `torch.distributed.checkpoint`; its name and file digests are in the file. The folder is
written first and the file is renamed into place last, so that the file and its folder are complete at any time.
"""

from __future__ import annotations

import pickle
import re
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from detr_exp.tensor_files import Stored, sha256_of
from detr_exp.trainer.background import Background
from detr_exp.trainer.distributed import on_first_rank, rank
from detr_exp.trainer.sharding import PREFIX, SHARDS, copied, each_tensor, is_sharded

METADATA = ".metadata"
# Classes and functions in the index of a folder; calling them has no side effects.
NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "bool", "uint8"),
    "pathlib": ("PosixPath", "WindowsPath"),
}


def save(
    state: Stored, path: Path, write: Callable[[Stored, Path], None], background: Background | None = None
) -> None:
    """Write a state with sharded tensors; all ranks call this.

    Args:
        state: nested, with sharded tensors in it.
        path: the checkpoint file.
        write: writes that file, which names the folder of its shards.
        background: copy the state to the host, and write it there while training goes on.

    Raises:
        ValueError: the folder cannot be written; the previous checkpoint is untouched.
    """
    sharded: dict[str, Tensor] = {}

    def remove_values(name: str, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        sharded[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    without_values = each_tensor(state, remove_values)
    folder = path.with_name(on_first_rank(lambda: PREFIX + uuid.uuid4().hex[:12]))
    if background is None:
        dcp.save(sharded, checkpoint_id=folder)
        on_first_rank(_point, without_values, path, folder, write)
        return
    # tensors that are on the host already are not copied by all versions of torch
    copies = {
        name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor for name, tensor in sharded.items()
    }
    writing = cast("Future[Any]", dcp.async_save(copies, checkpoint_id=folder, process_group=background.group))
    without_values = copied(without_values)

    def complete() -> None:
        writing.result()  # on rank 0: all ranks have written
        if rank() == 0:
            _point(without_values, path, folder, write)

    background.add(complete)


def _point(without_values: Stored, path: Path, folder: Path, write: Callable[[Stored, Path], None]) -> None:
    digests = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    write(without_values | {SHARDS: {"folder": folder.name, "files": digests}}, path)


def load_shards(state: Stored, folder: Path) -> Stored:
    """Load the values of the sharded tensors of a state; needs no other rank.

    Raises:
        ValueError: shards are missing, damaged, or contain more than tensors.
    """
    reference = state[SHARDS]
    if not isinstance(reference, dict) or not re.fullmatch(f"{PREFIX}\\w+", str(reference.get("folder"))):
        raise ValueError(f"a checkpoint in {folder} has no valid folder of shards; give another checkpoint of this run")
    parts = folder / reference["folder"]
    digests = reference["files"] if isinstance(reference.get("files"), dict) else {}
    for name, digest in (dict.fromkeys([METADATA]) | digests).items():
        file = parts / Path(str(name)).name
        if not file.is_file() or sha256_of(file) != digest:
            raise ValueError(f"{file} is missing or damaged; give another checkpoint of this run")
    _refuse_code(parts / METADATA)
    tensors: dict[str, Tensor] = {}

    def make(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return tensors[name]

    loaded = each_tensor(state, make)
    try:
        dcp.load(tensors, checkpoint_id=parts, no_dist=True)
    except Exception as error:  # torch has several exception classes for it
        raise ValueError(f"{parts} does not fit its checkpoint ({error}); give another one") from error
    del loaded[SHARDS]
    return loaded


def _refuse_code(metadata: Path) -> None:
    """Torch reads this file with pickle, which can call anything, so its content is checked first."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if name in NAMES.get(module, ()):
                return super().find_class(module, name)
            raise ValueError(f"{metadata} names {module}.{name}, which tensors do not need; it was not loaded")

    try:
        with open(metadata, "rb") as file:
            Reader(file).load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{metadata} is damaged ({error!r}); give another checkpoint of this run") from error
