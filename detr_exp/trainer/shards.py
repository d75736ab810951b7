"""Checkpoints of sharded runs: every rank writes its own parts, and any number of ranks reads them.

`checkpoint.pth` is what it always is, but sharded tensors in it are empty outlines. Their values lie beside it, in
a folder of `torch.distributed.checkpoint` that it names with the digest of every file. The folder is written first and
the file is renamed into place last, so that at every instant the file is whole and so is what it names.
"""

from __future__ import annotations

import pickle
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from detr_exp.tensor_files import Stored, sha256_of
from detr_exp.trainer.distributed import on_first_rank
from detr_exp.trainer.sharding import PREFIX, SHARDS, is_sharded

METADATA = ".metadata"
# What the index of a folder is made of; none of it does anything when it is called.
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


def save(state: Stored, path: Path, write: Callable[[Stored, Path], None]) -> None:
    """Write a state with sharded tensors; all ranks call this.

    Args:
        state: nested, with sharded tensors in it.
        path: of the file that names the parts.
        write: makes that file.

    Raises:
        ValueError: the folder cannot be written; the previous checkpoint is untouched.
    """
    sharded: dict[str, Tensor] = {}

    def outline(name: str, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        sharded[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    outlined = _each_tensor(state, outline)
    folder = path.with_name(on_first_rank(lambda: PREFIX + uuid.uuid4().hex[:12]))
    dcp.save(sharded, checkpoint_id=folder)
    on_first_rank(_point, outlined, path, folder, write)


def _point(outlined: Stored, path: Path, folder: Path, write: Callable[[Stored, Path], None]) -> None:
    digests = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    write(outlined | {SHARDS: {"folder": folder.name, "files": digests}}, path)


def load_shards(state: Stored, folder: Path) -> Stored:
    """A state read from a file, with the values of its outlines, whole; asks no other rank.

    Raises:
        ValueError: parts are missing, damaged, or hold more than tensors.
    """
    told = state[SHARDS]
    if not isinstance(told, dict) or not re.fullmatch(f"{PREFIX}\\w+", str(told.get("folder"))):
        raise ValueError(f"a checkpoint in {folder} names no folder of its parts; give another checkpoint of this run")
    parts = folder / told["folder"]
    digests = told["files"] if isinstance(told.get("files"), dict) else {}
    for name, digest in (dict.fromkeys([METADATA]) | digests).items():
        place = parts / Path(str(name)).name
        if not place.is_file() or sha256_of(place) != digest:
            raise ValueError(f"{place} is missing or damaged; give another checkpoint of this run")
    _refuse_code(parts / METADATA)
    wanted: dict[str, Tensor] = {}

    def make(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        wanted[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return wanted[name]

    whole = _each_tensor(state, make)
    try:
        dcp.load(wanted, checkpoint_id=parts, no_dist=True)
    except Exception as error:  # of its own kinds
        raise ValueError(f"{parts} does not hold what its checkpoint names ({error}); give another one") from error
    del whole[SHARDS]
    return whole


def _each_tensor(nest: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """A copy of nested dictionaries and lists with every tensor changed, given its dotted name."""
    if isinstance(nest, dict):
        return {key: _each_tensor(value, change, f"{name}.{key}") for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        return type(nest)(_each_tensor(value, change, f"{name}.{i}") for i, value in enumerate(nest))
    return change(name, nest) if isinstance(nest, Tensor) else nest


def _refuse_code(metadata: Path) -> None:
    """Torch reads this file with pickle, which can call anything: look before it does."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if name in NAMES.get(module, ()):
                return super().find_class(module, name)
            raise ValueError(f"{metadata} names {module}.{name}, which tensors do not need; it was not opened")

    try:
        with open(metadata, "rb") as file:
            Reader(file).load()
    except ValueError:
        raise
    except Exception as error:  # what reading a damaged pickle ends with is another exception each time
        raise ValueError(f"{metadata} is damaged ({error!r}); give another checkpoint of this run") from error
