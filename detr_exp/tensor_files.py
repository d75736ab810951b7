"""The only way to open a file of tensors, of any origin: no code in it is executed, and it has to be complete.

The format is recognised by the first bytes of a file, not by its name.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

Stored = dict[str, Any]  # content of a file: tensors and plain values by name, possibly nested
FORMAT = 1
HEADER = "detr_exp"  # in the metadata of our own safetensors: all but the tensors, as JSON
HEAD = 256
POINTER = b"version https://git-lfs.github.com/spec/"
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
ONNX, OPENVINO = re.compile(rb"\x08[\x01-\x40]\x12", re.DOTALL), b"<net "  # version and producer; XML
# Required entries of our checkpoints and their types.
KINDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "kind": str,
    "model": dict,
    "ema": (dict, type(None)),
    "config": dict,
    "classes": list,
    "category_ids": list,
    "keypoints": (dict, type(None)),
    "metrics": dict,
    "threshold": (int, float),
    "weights": str,
    "base": dict,
    "start": dict,
}


def read(path: Path, fix: str, also: tuple[type, ...] = ()) -> Stored:
    """Read a file written by `torch.save` or safetensors, to the CPU.

    Args:
        path: of the file.
        fix: end of the error message: how to fix it.
        also: types that are allowed in it besides tensors and plain values.

    Returns:
        the entries by name; of our own safetensors, the whole checkpoint.

    Raises:
        ValueError: it cannot be read, is empty, truncated, damaged, in another format, or has more than plain values.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}){fix}") from error
    if not head:
        raise ValueError(f"{path} is empty{fix}")
    if head.startswith(POINTER):
        raise ValueError(f"{path} is a pointer of git-lfs in place of the file; fetch that with git lfs pull{fix}")
    if ONNX.match(head) or OPENVINO in head:
        raise _exported(path, fix)
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a page of the web in place of the file; download that again{fix}")
    if head.startswith(ZIP):
        _refuse_damaged_archive(path, fix)
    elif head[8:9] == b"{":
        return _safetensors(path, fix)
    elif not head.startswith(PICKLE):
        raise ValueError(f"{path} is damaged or no file of tensors (it begins with {head[:8]!r}){fix}")
    try:
        with torch.serialization.safe_globals(list(also)), open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types; each means "not a file of plain tensors"
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} is damaged or holds more than tensors and plain values and was not opened ({reason}){fix}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors{fix}")
    return content


def _refuse_damaged_archive(path: Path, fix: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            is_program = any("/code/" in part for part in archive.namelist())
            is_packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
            damaged = None if is_packed else archive.testzip()
    except Exception as error:  # from archives, names that are not UTF-8, the disk
        raise ValueError(f"{path} is truncated or no checkpoint ({error}){fix}") from error
    if is_program:  # of TorchScript
        raise _exported(path, fix)
    if is_packed:  # its content may be larger than the memory
        raise ValueError(f"{path} is compressed, which files of torch are not; unpack it{fix}")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged!r} does not match{fix}")


def _exported(path: Path, fix: str) -> ValueError:
    return ValueError(f"{path} is an exported network, whose weights have no names; give its checkpoint instead{fix}")


def _safetensors(path: Path, fix: str) -> Stored:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        rest = None if header is None else json.loads(header)
    except Exception as error:  # from safetensors, JSON, or types that torch does not have
        raise ValueError(f"{path} is truncated or no safetensors file ({error}){fix}") from error
    if rest is None:
        return tensors
    if not isinstance(rest, dict):
        raise ValueError(f"{path} is damaged: its header holds a {type(rest).__name__}{fix}")
    return rest | {"model": tensors}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def named(tensors: object) -> dict[str, torch.Tensor]:
    """The tensors of a file's content by name; empty if it has no names."""
    if not isinstance(tensors, dict):
        return {}
    return {name: value for name, value in tensors.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def refuse_non_finite(tensors: dict[str, torch.Tensor], path: Path, fix: str) -> None:
    """Refuse weights of a training that has diverged: nothing can be learned from them.

    Args:
        tensors: of a network, by name.
        path: of their file, for the message.
        fix: end of the message: how to fix it.

    Raises:
        ValueError: names some that are not finite.
    """
    wrong = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise ValueError(
            f"{path} has values that are not finite in {len(wrong)} tensors ({', '.join(wrong[:3])}), as after a "
            f"training that diverged{fix}"
        )


def refuse_misshapen(state: Stored, path: Path, needs: tuple[str, ...] = ()) -> None:
    """Refuse one of our checkpoints in which entries are missing or have a wrong type.

    Args:
        state: its content.
        path: of the file, for messages.
        needs: required entries besides the weights.

    Raises:
        ValueError: names these entries, or the format of a newer version.
    """
    wrong = [name for name, kind in KINDS.items() if name in state and not isinstance(state[name], kind)]
    wrong += [name for name in ("format", "model", *needs) if name not in state]
    for name, kind in (("classes", str), ("category_ids", int)):
        if name not in wrong and not all(isinstance(value, kind) for value in state.get(name, ())):
            wrong.append(name)
    if not wrong:
        average = (state.get("ema") or {}).get("average", {})
        wrong += [name for name, held in (("model", state["model"]), ("ema", average)) if len(named(held)) != len(held)]
        if {"classes", "category_ids"} <= state.keys() and len(state["classes"]) != len(state["category_ids"]):
            wrong.append("category_ids")
    if wrong:
        raise ValueError(
            f"{path} is a damaged checkpoint: {', '.join(dict.fromkeys(wrong))} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or not what stands there; give another checkpoint of its run"
        )
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update detr_exp")
