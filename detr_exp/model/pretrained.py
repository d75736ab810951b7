"""Weights from a file into a network: naming scheme, fit, and tensors that have to be initialised anew.

Files are read without executing anything in them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp import tensor_files
from detr_exp.model import (
    pretrained_deimv2,
    pretrained_dfine,
    pretrained_ec,
    pretrained_lwdetr,
    pretrained_rfdetr,
    pretrained_rtdetr,
)
from detr_exp.model.construction import for_channels
from detr_exp.model.decoder.rtdetr import OfKeypoints
from detr_exp.model.recognition import network_of
from detr_exp.protocols import Network
from detr_exp.tensor_files import named
from detr_exp.values import Values

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# Counters that frozen norms lack on one side, and denoising where it is switched off, are no misfit.
ONLY_SOME_HAVE = (
    ".num_batches_tracked",
    *(f".{name}.weight" for name in ("denoising_class_embed", "noise_label_embed", "noise_point_embed")),
)
# In a folder, the first of these that exists is meant.
_IN_FOLDER = ("checkpoint_best_total.pth", "model.safetensors", "pytorch_model.bin")


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        state: tensors, in our names, except those of RF-DETR and LW-DETR, whose translation needs the network.
        origin: the code that wrote the file, for messages.
        classes: class names in the order of the logits, or None where the file does not name them.
    """

    state: State
    origin: str
    classes: list[str] | None


def load_weights(network: Network, path: str | Path, classes: list[str] | None = None) -> str:
    """Load a file of ours, of the official code of a family or of Hugging Face into `network`.

    Class-dependent rows are copied for every class name that file and network share. Without names on both sides the
    classes are assumed to be the same if their numbers are equal. All other class-dependent tensors keep their initial
    values; the log lists them.

    Args:
        classes: names of the network's classes, in the order of its logits.

    Returns:
        how much of the network is from the file, in words.

    Raises:
        ValueError: when the file cannot be read, or anything that does not depend on the classes does not fit.
    """
    weights = read_weights(path)
    fix = "; give another file, or start without: model.weights=null"
    tensor_files.refuse_non_finite(weights.state, Path(path), fix)
    own = network.state_dict()
    new_classes: list[str] = []
    if pretrained_rfdetr.is_rfdetr(weights.state):
        with _whole(path, weights.origin):
            state, new_classes = _of_rfdetr(weights, network, classes)
            state = _with_channels(state, own)
    else:
        pretrained_dfine.refuse_other_activations(Path(path), weights.origin, network)
        state, new_classes = _fitted(weights, network, classes, path)
    share = _share(state, own, network.class_tensors(), new_classes, classes)
    network.load_state_dict(state, strict=False)
    logger.info("weights: %s, from %s (%s)", share, path, weights.origin)
    return share


def _share(
    state: State, own: State, by_class: dict[str, int], new_classes: list[str], classes: list[str] | None
) -> str:
    """How much of a network is from a file: "299 of 302 tensors; new: 3 class tensors for 5 classes"."""
    names = [name for name in own if not name.endswith(".num_batches_tracked")]
    anew = [name for name in names if name not in state or state[name].data_ptr() == own[name].data_ptr()]
    of_classes = sum(name in by_class for name in anew)
    count = len(classes or [])
    new = [f"{len(new_classes)} of {count} classes: {_some(new_classes)}"] if new_classes else []
    new += [f"{of_classes} class tensors" + (f" for {count} classes" if count else "")] if of_classes else []
    new += [f"{len(anew) - of_classes} keypoint tensors"] if len(anew) > of_classes else []
    return f"{len(names) - len(anew)} of {len(names)} tensors" + (f"; new: {', '.join(new)}" if new else "")


def read_weights(path: str | Path) -> Weights:
    """The weights in a file (or folder), averaged ones where there are two kinds.

    Raises:
        ValueError: when there is no such file, or it has no known content.
    """
    path = weights_file(path)
    fix = "; give a file of weights, or start without: model.weights=null"
    content = tensor_files.read(path, fix, also=pretrained_rfdetr.SAFE_GLOBALS)
    if (state := pretrained_rfdetr.rfdetr_state(content)) is not None:
        of_transformers = path.suffix == ".safetensors" or path.name == "pytorch_model.bin"
        family = "LW-DETR" if pretrained_lwdetr.MARK in state else "RF-DETR"
        return Weights(state, family, _names_beside(path) if of_transformers else None)
    if isinstance(content.get("format"), int) and "model" in content:
        tensor_files.refuse_misshapen(content, path)
        _refuse_slim(content, path)
        average = (content.get("ema") or {}).get("average", {})
        return Weights(content["model"] | average, "detr_exp", content.get("classes"))
    averaged = content["ema"].get("module") if isinstance(content.get("ema"), dict) else None
    state = next(filter(None, map(named, (averaged, content.get("model"), content))), {})
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    family, names = ("D-FINE", pretrained_dfine) if pretrained_dfine.is_dfine(state) else ("RT-DETR", pretrained_rtdetr)
    if pretrained_deimv2.is_deimv2(state):
        family, names = "DEIMv2", pretrained_deimv2
    elif pretrained_ec.is_ec(state):
        family, names = "EdgeCrafter", pretrained_ec
    if pretrained_rtdetr.is_official(state):
        with _whole(path, origin := f"official {family}"):
            return Weights(names.from_official(state), origin, pretrained_ec.classes_of(state))
    if pretrained_rtdetr.is_huggingface(state):
        with _whole(path, origin := f"Hugging Face {family}"):
            return Weights(names.from_huggingface(state), origin, _names_beside(path))
    raise ValueError(
        f"model.weights={path} holds none of the known kinds of weights (ours, official RT-DETR, D-FINE, DEIMv2, "
        "EdgeCrafter, LW-DETR or RF-DETR, Hugging Face RT-DETR, D-FINE, LW-DETR or RF-DETR); it begins with "
        f"{', '.join(list(map(str, content))[:3]) or 'nothing'}"
    )


def _refuse_slim(content: Values, path: Path) -> None:
    if "base" in content:
        raise ValueError(
            f"model.weights={path} holds an adapter and not the weights that it adapts; put both into one file, "
            f"python -m detr_exp.export_weights checkpoint={path} format=safetensors, and give that"
        )


@contextmanager
def _whole(path: str | Path, origin: str) -> Iterator[None]:
    """Report missing tensors or other shapes, which appear as different errors where tensors are joined."""
    try:
        yield
    except (LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"model.weights={path} looks like {origin}, but parts of it are missing or of another shape "
            f"({' '.join(str(error).split())[:300]}); choose the model it was made with, or fetch the file again"
        ) from error


def weights_file(path: str | Path) -> Path:
    """The file that `model.weights` means.

    Raises:
        ValueError: there is none.
    """
    path = Path(str(path)).expanduser()
    if path.is_dir():
        candidates = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if not candidates:
            raise ValueError(f"model.weights={path} is a folder without {' or '.join(_IN_FOLDER)}; name the file")
        return candidates[0]
    if not path.is_file():
        raise ValueError(f"model.weights={path} is not a file; give the path of a checkpoint, or model.weights=null")
    return path


def _names_beside(path: Path) -> list[str] | None:
    """Class names from the `config.json` that Hugging Face saves beside the weights.

    Raises:
        ValueError: it is there and cannot be read.
    """
    config = path.with_name("config.json")
    if not config.is_file():
        return None
    try:
        names = json.loads(config.read_bytes()).get("id2label") or {}
        known = [names[key] for key in sorted(names, key=int)]
        if not all(isinstance(name, str) for name in known):
            raise TypeError("class names are no texts")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{config} does not name the classes as Hugging Face does, id2label: {{number: name}} "
            f"({error}); fetch it again, or remove it to match the classes by their order"
        ) from error
    is_placeholder = all(re.fullmatch(r"LABEL_\d+", name) for name in known)  # what transformers writes by itself
    return None if is_placeholder else known


def _of_rfdetr(weights: Weights, network: Network, classes: list[str] | None) -> tuple[State, list[str]]:
    """RF-DETR's or LW-DETR's weights, with class rows by name where both sides have names; and the new classes."""
    theirs = weights.classes if len(weights.classes or []) == len(weights.state.get("class_embed.bias", ())) else None
    if theirs is None or classes is None or _in_same_order(theirs, classes):
        return pretrained_rfdetr.from_rfdetr(weights.state, network), []
    shared = dict(_shared_classes(theirs, classes) or [])
    rows = torch.tensor([shared.get(row, 0) for row in range(len(classes))])
    state = {name: tensor[rows] if "class_embed." in name else tensor for name, tensor in weights.state.items()}
    loaded = pretrained_rfdetr.from_rfdetr(state, network)
    new = [row for row in range(len(classes)) if row not in shared]
    for name, axis in network.class_tensors().items():
        own = network.state_dict()[name]
        if shared and new and loaded[name].data_ptr() != own.data_ptr():
            kept = own.index_select(axis, torch.tensor(new)).to(loaded[name].dtype)
            loaded[name] = loaded[name].index_copy(axis, torch.tensor(new), kept)
        elif not shared:
            loaded[name] = own
    return loaded, sorted(classes[row] for row in new)


def _in_same_order(theirs: list[str], ours: list[str]) -> bool:
    """Whether all rows are of the same classes; gaps between category ids are called `unused_<id>` here."""
    pairs = zip(theirs, ours)
    return len(theirs) == len(ours) and all(a.casefold() == b.casefold() or b.startswith("unused_") for a, b in pairs)


def _fitted(weights: Weights, network: Network, classes: list[str] | None, path: str | Path) -> tuple[State, list[str]]:
    """Tensors for the network: all that do not depend on the classes, and of the others the rows it can use.

    Returns:
        the tensors, and the classes without rows where file and network name theirs.

    Raises:
        ValueError: listing the keys that are missing, superfluous or of another shape.
    """
    own = network.state_dict()
    state = {name: tensor for name, tensor in weights.state.items() if name in own or not name.endswith(ONLY_SOME_HAVE)}
    state = _with_channels(state, own)
    by_class = network.class_tensors()
    by_keypoint = (
        [name for name in network.keypoint_tensors() if name in own] if isinstance(network, OfKeypoints) else []
    )
    _refuse_misfits(state, own, by_class, by_keypoint, path)
    shared = _shared_classes(weights.classes, classes)
    anew = []
    if new_points := [name for name in by_keypoint if name in state and state[name].shape != own[name].shape]:
        state |= {name: own[name] for name in new_points}
        logger.info("keypoints: initialised anew, for %s has another number of them", path)
    for name, axis in by_class.items():
        if name in state and shared is not None:
            state[name] = _with_rows(own[name], state[name], axis, shared, len(classes or []))
        elif name not in state or state[name].shape != own[name].shape:
            state.pop(name, None)
            anew.append(name)
    new = [] if shared is None else sorted(set(classes or []) - {(classes or [])[mine] for mine, _ in shared})
    if new:
        logger.info("classes that are not in %s are initialised anew: %s", path, ", ".join(new))
    if anew:
        logger.info("tensors that depend on the classes and are initialised anew: %s", ", ".join(anew))
    return state, new


def _with_channels(state: State, own: State) -> State:
    """Tensors with first layers of the backbone for the channels of the network, from those for colours."""
    made = dict(state)
    for name in (name for name in state if name in own and name.startswith("backbone.")):
        ours, theirs = own[name].shape, state[name].shape
        if len(ours) == 4 and theirs[1:2] == (3,) and ours[1] != 3 and (ours[0], *ours[2:]) == (theirs[0], *theirs[2:]):
            made[name] = for_channels(state[name], ours[1])
    return made


def _refuse_misfits(
    state: State, own: State, by_class: dict[str, int], by_keypoint: list[str], path: str | Path
) -> None:
    def fits(name: str) -> bool:
        ours, theirs = list(own[name].shape), list(state[name].shape)
        if name in by_class and len(ours) == len(theirs):
            ours[by_class[name]] = theirs[by_class[name]]
        is_resampled = name == pretrained_rfdetr.RESAMPLED and ours[:2] == theirs[:2]
        return ours == theirs or name in by_keypoint or is_resampled

    missing = [n for n in own if n not in state and n not in by_class and not n.endswith(".num_batches_tracked")]
    misfits = {
        "not in the file": missing,
        "not in the network": [name for name in state if name not in own],
        "of another shape": [name for name in state if name in own and not fits(name)],
    }
    if any(misfits.values()):
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in misfits.items() if names)
        made_for = network_of(state) or "the model, model/backbone and sizes the file was made with"
        raise ValueError(
            f"model.weights={path} does not fit the network ({listed}); choose {made_for}, or model.weights=null"
        )


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")


def _shared_classes(theirs: list[str] | None, ours: list[str] | None) -> list[tuple[int, int]] | None:
    """(our index, their index) of every class both know, or None where one side has no names."""
    if theirs is None or ours is None:
        return None
    known = {name.casefold(): index for index, name in enumerate(theirs)}
    return [(index, known[name.casefold()]) for index, name in enumerate(ours) if name.casefold() in known]


def _with_rows(own: Tensor, theirs: Tensor, axis: int, shared: list[tuple[int, int]], num_classes: int) -> Tensor:
    """`own` with the rows of shared classes, and the row after the last class (background, padding), of `theirs`."""
    mine, yours = (list(indices) for indices in zip(*shared)) if shared else ([], [])
    filled = own.clone()
    if own.shape[axis] > num_classes:
        mine, yours = [*mine, own.shape[axis] - 1], [*yours, theirs.shape[axis] - 1]
    return filled.index_copy(
        axis,
        torch.tensor(mine, dtype=torch.long),
        theirs.index_select(axis, torch.tensor(yours, dtype=torch.long)).to(own.dtype),
    )
