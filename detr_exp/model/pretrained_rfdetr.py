"""Weights of RF-DETR files under our names.

Three kinds of file exist: the published `.pth`/`.pt`, those that training with rfdetr 1.x writes, and Lightning's
`.ckpt`. All are read without executing anything they contain.

What does not fit as it is: groups and queries beyond the network's are cut off (group by group, since the file lists
them one group after another); a class head of another width is left as it was made; position embeddings are resampled
when they are loaded (see the backbone). Everything else has to fit.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# What a file may contain besides tensors and plain values.
SAFE_GLOBALS = [argparse.Namespace, types.SimpleNamespace]

VIT = r"^backbone\.0\.encoder\.encoder\."

# Theirs -> ours. `@i` marks the i-th of several tensors that are one tensor here.
NAMES = [
    (VIT + r"embeddings\.cls_token$", "backbone.embedding.class_token"),
    (VIT + r"embeddings\.position_embeddings$", "backbone.embedding.position"),
    (VIT + r"embeddings\.patch_embeddings\.projection\.", "backbone.embedding.patches."),
    (VIT + r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)$", r"backbone.blocks.\1.qkv.\2@0"),
    (VIT + r"encoder\.layer\.(\d+)\.attention\.attention\.key\.(\w+)$", r"backbone.blocks.\1.qkv.\2@1"),
    (VIT + r"encoder\.layer\.(\d+)\.attention\.attention\.value\.(\w+)$", r"backbone.blocks.\1.qkv.\2@2"),
    (VIT + r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"backbone.blocks.\1.out."),
    (VIT + r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"backbone.blocks.\1.scale\2"),
    (VIT + r"encoder\.layer\.(\d+)\.(?:mlp\.)?(fc\d|norm\d)\.", r"backbone.blocks.\1.\2."),
    (VIT + r"layernorm\.", "backbone.norm."),
    (r"^backbone\.0\.projector\.", "neck."),
    (r"^neck\.stages\.(\d+)\.0\.cv1\.", r"neck.levels.\1.mix.enter."),
    (r"^neck\.stages\.(\d+)\.0\.cv2\.", r"neck.levels.\1.mix.leave."),
    (r"^neck\.stages\.(\d+)\.0\.m\.(\d+)\.cv1\.", r"neck.levels.\1.mix.bottlenecks.\2.0."),
    (r"^neck\.stages\.(\d+)\.0\.m\.(\d+)\.cv2\.", r"neck.levels.\1.mix.bottlenecks.\2.1."),
    (r"^neck\.stages\.(\d+)\.1\.", r"neck.levels.\1.norm."),
    (r"^neck\.stages_sampling\.(\d+)\.(\d+)\.0\.", r"neck.levels.\1.resample.\2."),
    (r"^(neck\..*)\.conv\.weight$", r"\1.0.weight"),
    (r"^(neck\..*)\.bn\.(\w+)$", r"\1.1.\2"),
    (r"^transformer\.enc_output\.(\d+)\.(\w+)$", r"selection.project.\2@\1"),
    (r"^transformer\.enc_output_norm\.(\d+)\.(\w+)$", r"selection.norm.\2@\1"),
    (r"^transformer\.enc_out_class_embed\.(\d+)\.(\w+)$", r"selection.classify.\2@\1"),
    (r"^transformer\.enc_out_bbox_embed\.(\d+)\.layers\.(\d+)\.(\w+)$", r"selection.box.\2.\3@\1"),
    (r"^transformer\.decoder\.ref_point_head\.", "position_mlp."),
    (r"^transformer\.decoder\.", ""),
    (r"^class_embed\.", "class_head."),
    (r"^bbox_embed\.", "box_head."),
    (r"^refpoint_embed\.weight$", "query_delta"),
    (r"^query_feat\.weight$", "query_content"),
]
# Task, channels and patch size of the backbone, decoder layers -> position grid -> option of `model`.
PUBLISHED = {
    ("rfdetr", 384, 16, 2): {24: "rfdetr"},
    ("rfdetr", 384, 16, 3): {32: "rfdetr_small"},
    ("rfdetr", 384, 16, 4): {36: "rfdetr_medium", 44: "rfdetr_large"},
    ("rfdetr", 384, 14, 3): {37: "rfdetr_base"},
    ("rfdetr_seg", 384, 12, 4): {26: "rfdetr_seg", 32: "rfdetr_seg_small"},
    ("rfdetr_seg", 384, 12, 5): {36: "rfdetr_seg_medium", 42: "rfdetr_seg_large"},
    ("rfdetr_seg", 384, 12, 6): {52: "rfdetr_seg_xlarge", 64: "rfdetr_seg_2xlarge"},
    ("rfdetr_keypoint", 384, 12, 4): {48: "rfdetr_keypoint"},
}

GROUPED = ("selection.", "query_")
CLASS_HEADS = ("class_head.", "selection.classify.")


def is_rfdetr(state: State) -> bool:
    """Whether these are the weights of an RF-DETR in the names of its authors."""
    return "refpoint_embed.weight" in state and any(name.startswith("backbone.0.encoder.") for name in state)


def rfdetr_state(file: dict[str, Any]) -> State | None:
    """The weights in the content of a file, those that its own evaluation would use; None if it has none."""
    callbacks = file.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    averaged = next((s["average_model_state_dict"] for s in states if "average_model_state_dict" in s), None)
    for state in (averaged, file.get("ema_model"), file.get("model"), file.get("state_dict"), file):
        if isinstance(state, dict) and is_rfdetr(plain := dict(_without_prefixes(state))):
            return plain
    return None


def _without_prefixes(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            yield re.sub(r"^(?:(?:module|model|_orig_mod)\.)+", "", name), tensor


def from_rfdetr(state: State, network: nn.Module) -> State:
    """Weights in the names of `network`, complete.

    Says in one line what was left out, and in one what was done to the class head.

    Raises:
        ValueError: if the file is for another architecture.
    """
    if any(".base_model." in name for name in state):
        raise ValueError(
            "model.weights is a file with LoRA adapters, which are not supported; merge them into the weights first"
        )
    own = network.state_dict()
    found = _split_position(_joined(_renamed(state)))
    _refuse_other_task(found, own)
    found = _by_group(found)
    taken = _with_own_class_head(found, network, own)
    for name, tensor in taken.items():
        if name in own and name.startswith(GROUPED):
            taken[name] = _leading(tensor, own[name])
    _refuse_misfits(taken, own)
    dropped = sorted(set(taken) - set(own))
    if dropped:
        logger.info("weights without a place in this network, left out: %s", ", ".join(dropped))
    return {name: taken[name] for name in own}


def _renamed(state: State) -> State:
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def _joined(state: State) -> State:
    """Put together what `@i` marks: query, key and value one below the other, groups on an axis of their own."""
    parts: dict[str, dict[int, Tensor]] = {}
    joined = {}
    for name, tensor in state.items():
        whole, mark, index = name.partition("@")
        if mark:
            parts.setdefault(whole, {})[int(index)] = tensor
        else:
            joined[name] = tensor
    for name, pieces in parts.items():
        in_order = [pieces[index] for index in sorted(pieces)]
        joined[name] = torch.stack(in_order) if name.startswith(GROUPED) else torch.cat(in_order)
    return joined


def _split_position(state: State) -> State:
    """The position embedding as the class token's and a square grid."""
    position = state.pop("backbone.embedding.position")
    side = math.isqrt(position.shape[1] - 1)
    grid = position[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
    return state | {"backbone.embedding.class_position": position[:, :1], "backbone.embedding.position": grid}


def _by_group(state: State) -> State:
    """Queries `[G * Q, ...]` -> `[G, Q, ...]`."""
    groups = len(state["selection.project.weight"])
    return {n: t.unflatten(0, (groups, -1)) if n.startswith("query_") else t for n, t in state.items()}


def _leading(tensor: Tensor, own: Tensor) -> Tensor:
    """The first groups (and queries) of the file in those of the network, which keeps its own where it has more."""
    if tensor.dim() != own.dim() or tensor.shape == own.shape:
        return tensor
    shared = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape[:2], own.shape[:2]))
    if tensor.shape[2:] != own.shape[2:]:
        return tensor
    filled = own.clone()
    filled[shared] = tensor[shared]
    return filled


def _with_own_class_head(state: State, network: Any, own: State) -> State:
    """Replace a class head of another width by the network's own.

    A file trained on K labels has K + 1 logits, of which the last was never meant by a label; it is cut off.
    """
    rows, wanted = len(state["class_head.bias"]), len(own["class_head.bias"])
    if rows == wanted and network.activation == "sigmoid":
        return state
    heads = [name for name in own if name.startswith(CLASS_HEADS)]
    if rows == wanted + 1 and network.activation == "sigmoid":
        logger.info("class head: taken without the last of its %d logits, which no label meant", rows)
        return state | {n: state[n][:, :-1] if n.startswith("selection.") else state[n][:-1] for n in heads}
    logger.info(
        "class head: starts anew; the file has %d sigmoid logits, this network %d (%s)",
        *(rows, wanted, network.activation),
    )
    return state | {name: own[name] for name in heads}


def _refuse_other_task(state: State, own: State) -> None:
    theirs, ours = _task(state), _task(own)
    if theirs != ours:
        raise ValueError(f"model.weights is a file for model={theirs}, but the network is {ours}; {_advice(state)}")


def _task(state: State) -> str:
    for part, task in (("mask_head.", "rfdetr_seg"), ("keypoint_head.", "rfdetr_keypoint")):
        if any(name.startswith(part) for name in state):
            return task
    return "rfdetr"


def _advice(state: State) -> str:
    """Which published network a file is for."""
    width, _, patch_size, _ = state["backbone.embedding.patches.weight"].shape
    num_layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    grid = state["backbone.embedding.position"].shape[-1]
    alike = PUBLISHED.get((_task(state), width, patch_size, num_layers), {})
    if not alike:
        return "it is none of the published networks; set model.* as the file was made with"
    return f"use model={alike.get(grid, next(iter(alike.values())))}, which the file is for, or another file"


def _refuse_misfits(taken: State, own: State) -> None:
    """Refuse a file of another architecture, with what tells most first: patches, width, depth."""
    patches = "backbone.embedding.patches.weight"
    if patches in own and taken[patches].shape != own[patches].shape:
        width, _, size, _ = taken[patches].shape
        raise ValueError(
            f"model.weights is for patches of {size} pixels and a backbone of {width} channels, but this network has "
            f"{own[patches].shape[-1]} and {own[patches].shape[0]}; {_advice(taken)}"
        )
    missing = sorted(set(own) - set(taken))
    if missing:
        raise ValueError(
            f"model.weights has nothing for {len(missing)} tensors of this network ({', '.join(missing[:4])}, ...); "
            f"{_advice(taken)}"
        )
    resampled = "backbone.embedding.position"
    wrong = [n for n, t in own.items() if taken[n].shape != t.shape and n != resampled]
    if wrong:
        shapes = ", ".join(f"{n}: {list(taken[n].shape)} instead of {list(own[n].shape)}" for n in wrong[:4])
        raise ValueError(
            f"model.weights has {len(wrong)} tensors of other shapes than this network ({shapes}); {_advice(taken)}"
        )
