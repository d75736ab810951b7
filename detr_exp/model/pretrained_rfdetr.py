"""Weights of RF-DETR and LW-DETR files under our names, and back.

Three kinds of file exist: the published `.pth`/`.pt`, those written by training with rfdetr 1.x, and Lightning's
`.ckpt`. All are read without executing anything they contain.

Three parts may differ: groups and queries beyond the network's are dropped (group by group, because the file lists one
group after another); a class head of another width is not loaded; position embeddings are resampled when they are
loaded (see the backbone). All other tensors have to fit.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import types

import torch
from torch import Tensor

from detr_exp.model import pretrained_lwdetr as lwdetr
from detr_exp.model.pretrained_rfdetr_transformers import from_transformers
from detr_exp.model.pretrained_rtdetr import renamed_by, swapped
from detr_exp.model.recognition import network_of, patches_of, task
from detr_exp.protocols import Network
from detr_exp.tensor_files import Stored, named

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# What a file may contain besides tensors and plain values.
SAFE_GLOBALS = (argparse.Namespace, types.SimpleNamespace)

_VIT = "backbone.0.encoder.encoder"
_PROJECTORS = {"neck": "backbone.0.projector", "keypoint_neck": "backbone.0.cross_attn_projector"}
# Of the head that EdgeCrafter has, too.
MASK_HEAD = [
    ("mask_head.blocks.{}.conv", "segmentation_head.blocks.{}.dwconv"),
    ("mask_head.blocks.{}.linear", "segmentation_head.blocks.{}.pwconv1"),
    ("mask_head.feature_proj", "segmentation_head.spatial_features_proj"),
    ("mask_head.query_mlp.0", "segmentation_head.query_features_block.norm_in"),
    ("mask_head.query_mlp.1", "segmentation_head.query_features_block.layers.0"),
    ("mask_head.query_mlp.3", "segmentation_head.query_features_block.layers.2"),
    ("mask_head.query_proj", "segmentation_head.query_features_proj"),
    ("mask_head", "segmentation_head"),
]
# Ours and theirs; {} is a number, and what follows a name stays as it is. `@i` marks the i-th of several tensors that
# are one tensor here.
_NAMES = [
    ("backbone.embedding.class_token", f"{_VIT}.embeddings.cls_token"),
    ("backbone.embedding.position", f"{_VIT}.embeddings.position_embeddings"),
    ("backbone.embedding.patches", f"{_VIT}.embeddings.patch_embeddings.projection"),
    *(
        (f"backbone.blocks.{{}}.qkv@{n}", f"{_VIT}.encoder.layer.{{}}.attention.attention.{part}")
        for n, part in enumerate(("query", "key", "value"))
    ),
    ("backbone.blocks.{}.out", f"{_VIT}.encoder.layer.{{}}.attention.output.dense"),
    ("backbone.blocks.{}.scale{}", f"{_VIT}.encoder.layer.{{}}.layer_scale{{}}.lambda1"),
    ("backbone.blocks.{}.fc{}", f"{_VIT}.encoder.layer.{{}}.mlp.fc{{}}"),
    ("backbone.blocks.{}.norm{}", f"{_VIT}.encoder.layer.{{}}.norm{{}}"),
    ("backbone.norm", f"{_VIT}.layernorm"),
    *(
        (f"{neck}.levels.{{}}.{ours}.{n}", f"{projector}.{theirs}.{part}")
        for neck, projector in _PROJECTORS.items()
        for ours, theirs in (
            ("mix.enter", "stages.{}.0.cv1"),
            ("mix.leave", "stages.{}.0.cv2"),
            ("mix.bottlenecks.{}.0", "stages.{}.0.m.{}.cv1"),
            ("mix.bottlenecks.{}.1", "stages.{}.0.m.{}.cv2"),
            ("resample.{}", "stages_sampling.{}.{}.0"),
        )
        for n, part in enumerate(("conv", "bn"))
    ),
    *(
        (f"{neck}.levels.{{}}.{ours}", f"{projector}.{theirs}")
        for neck, projector in _PROJECTORS.items()
        for ours, theirs in (("resample.{}", "stages_sampling.{}.{}.0"), ("norm", "stages.{}.1"))
    ),
    ("queries.project@{}", "transformer.enc_output.{}"),
    ("queries.norm@{}", "transformer.enc_output_norm.{}"),
    ("queries.class_head@{}", "transformer.enc_out_class_embed.{}"),
    ("queries.box_head@{}", "transformer.enc_out_bbox_embed.{}"),
    ("queries.position_mlp", "transformer.decoder.ref_point_head"),
    ("queries.delta", "refpoint_embed.weight"),
    ("queries.content", "query_feat.weight"),
    ("layers", "transformer.decoder.layers"),
    ("norm", "transformer.decoder.norm"),
    ("head.classes", "class_embed"),
    ("head.box", "bbox_embed"),
    *MASK_HEAD,
]
# First where there are keypoints, whose layers hold those of the queries.
_KEYPOINT_NAMES = [
    *(
        (f"layers.{{}}.{ours}", f"transformer.decoder.layers.{{}}.{theirs}")
        for ours, theirs in (
            ("self_attn", "kp_inst_self_attn"),
            ("scale", "instance_kp_layer_scale"),
            ("query_norm", "kp_inst_norm"),
            ("norm1", "kp_norm"),
            ("cross_attn", "kp_cross_attn"),
            ("norm2", "kp_cross_attn_norm"),
            ("linear1", "kp_linear1"),
            ("linear2", "kp_linear3"),
            ("norm3", "kp_norm5"),
        )
    ),
    ("layers.{}.query_layer", "transformer.decoder.layers.{}"),
    ("keypoint_position", "transformer.decoder.keypoint_pos_embed"),
    *(
        (f"{ours}{our_part}", f"transformer.{theirs}{their_part}")
        for ours, theirs in (
            ("keypoint_queries", "keypoint_query_initializer"),
            ("encoder_keypoint_queries", "keypoint_query_initializer_enc"),
        )
        for our_part, their_part in ((".tokens", ".queries"), (".modulation", ".adaLN_modulation"), ("", ""))
    ),
    ("encoder_keypoint_head@{}", "transformer.enc_out_keypoint_embed.{}"),
    ("keypoint_head", "keypoint_embed"),
]

# Tensors whose first axis is that of the groups; of these, those whose second axis is that of the queries.
GROUPED = (
    *(f"queries.{part}" for part in ("project.", "norm.", "class_head.", "box_head.", "content", "delta")),
    "encoder_keypoint_head.",
)
QUERIES = ("queries.content", "queries.delta")
RESAMPLED = "backbone.embedding.position"  # when it is loaded
# Tensors whose first axis is that of the keypoints.
BY_KEYPOINT = ("keypoint_queries.tokens", "encoder_keypoint_queries.tokens", "keypoint_position")
AVERAGED = "average_model_state_dict"
PREFIXES = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
_PART = re.compile(r"(.+)@(\d+)\.(.+)")
_WHOLE = re.compile(r"(backbone\.blocks\.\d+\.qkv|queries\.(?:project|norm|class_head|box_head))\.(.+)")
KEYPOINT_MASK = "_kp_active_mask"  # [classes, keypoints]


def is_rfdetr(state: State) -> bool:
    """Whether these are the weights of an RF-DETR in the names of its authors."""
    return "refpoint_embed.weight" in state and any(name.startswith("backbone.0.encoder.") for name in state)


def rfdetr_state(file: Stored) -> State | None:
    """The weights in the content of a file, averaged ones where it has them; None if there are none."""
    callbacks = file.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    averaged = next((s[AVERAGED] for s in states if isinstance(s, dict) and AVERAGED in s), None)
    for state in (averaged, file.get("ema_model"), file.get("model"), file.get("state_dict"), file):
        plain = {PREFIXES.sub("", name): tensor for name, tensor in named(state).items()}
        plain = lwdetr.from_huggingface(plain) if lwdetr.is_huggingface(plain) else from_transformers(plain)
        if is_rfdetr(plain):
            return plain
    return None


def from_rfdetr(state: State, network: Network) -> State:
    """Weights in the names of `network`, complete; those that the file does not determine are the network's tensors.

    Logs one line about dropped tensors, and one about the class head.

    Raises:
        ValueError: if the file is for another architecture.
    """
    if any(".base_model." in name for name in state):
        raise ValueError(
            "model.weights is a file with LoRA adapters, which are not supported; merge them into the weights first"
        )
    own = network.state_dict()
    converted = _split_position(_joined(_renamed(state)))
    _refuse_other_task(converted, own)
    converted = _by_group(converted)
    if "keypoint_neck.levels.0.norm.weight" in own:
        neck = {f"keypoint_{name}": tensor for name, tensor in converted.items() if name.startswith("neck.")}
        converted = neck | converted
    fitted = _with_own_keypoints(_with_own_class_head(converted, network, own), own)
    for name, tensor in fitted.items():
        if name in own and name.startswith(GROUPED) and tensor is not own[name]:
            fitted[name] = _leading(name, tensor, own[name])
    _refuse_misfits(fitted, own)
    dropped = sorted(set(fitted) - set(own))
    if dropped:
        logger.info("weights that this network does not have, ignored: %s", ", ".join(dropped))
    return {name: fitted[name] for name in own}


def to_rfdetr(state: State, num_queries: int) -> State:
    """Our names, for boxes or boxes and masks -> names of the authors.

    Args:
        state: of an `RFDETR`.
        num_queries: of each group; the queries after them are left out.
    """
    whole, is_lwdetr = dict(state), lwdetr.POSITION in state
    if not is_lwdetr:
        positions = [whole.pop("backbone.embedding.class_position"), state[RESAMPLED].flatten(2).mT]
        whole[RESAMPLED] = torch.cat(positions, dim=1)
    whole |= {name: state[name][:, :num_queries].flatten(0, 1) for name in QUERIES}
    return renamed_by(_split(whole), [*lwdetr.NAMES, *_NAMES] if is_lwdetr else _NAMES)


def _renamed(state: State) -> State:
    has_keypoints = any(name.startswith("keypoint_embed.") for name in state)
    first = lwdetr.NAMES if lwdetr.MARK in state else _KEYPOINT_NAMES if has_keypoints else []
    names = [*first, *_NAMES]
    return renamed_by(state, swapped(names))


def _joined(state: State) -> State:
    """Join the tensors marked by `@i`: query, key and value are concatenated, groups are stacked on a new axis."""
    parts: dict[str, dict[int, Tensor]] = {}
    joined = {}
    for name, tensor in state.items():
        if match := _PART.fullmatch(name):
            parts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        else:
            joined[name] = tensor
    for name, pieces in parts.items():
        in_order = [pieces[index] for index in sorted(pieces)]
        joined[name] = torch.stack(in_order) if name.startswith(GROUPED) else torch.cat(in_order)
    return joined


def _split(state: State) -> State:
    """The inverse of `_joined`."""
    split: State = {}
    for name, tensor in state.items():
        if match := _WHOLE.fullmatch(name):
            pieces = tensor.unbind() if name.startswith(GROUPED) else tensor.chunk(3)
            split |= {f"{match[1]}@{index}.{match[2]}": piece for index, piece in enumerate(pieces)}
        else:
            split[name] = tensor
    return split


def _split_position(state: State) -> State:
    """The position embedding as the class token's and a square grid, where there are class tokens."""
    if RESAMPLED not in state:
        return state
    position = state.pop(RESAMPLED)
    side = math.isqrt(position.shape[1] - 1)
    grid = position[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
    return state | {"backbone.embedding.class_position": position[:, :1], RESAMPLED: grid}


def _by_group(state: State) -> State:
    """Queries `[G * Q, ...]` -> `[G, Q, ...]`."""
    groups = len(state["queries.project.weight"])
    return state | {name: state[name].unflatten(0, (groups, -1)) for name in QUERIES}


def _leading(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """The network's tensor with the file's values in its first groups (and queries)."""
    axes = 2 if name in QUERIES else 1
    if tensor.shape[axes:] != own.shape[axes:]:
        return tensor  # refused later
    shared = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape[:axes], own.shape[:axes]))
    filled = own.clone()
    filled[shared] = tensor[shared]
    return filled


def _with_own_class_head(state: State, network: Network, own: State) -> State:
    """The class head cut to the network's labels, or the network's own where the file is for other labels."""
    rows, wanted = len(state["head.classes.bias"]), len(own["head.classes.bias"])
    first = _first_class_row(state, network, rows, wanted)
    heads = network.class_tensors()
    if first is None:
        logger.info(
            "class head: initialised anew; the file has %d sigmoid logits, this network %d (%s)",
            *(rows, wanted, network.activation),
        )
        return state | {name: own[name] for name in heads}
    if rows != wanted:
        logger.info("class head: %d of its %d logits loaded; the others are no labels", wanted, rows)
    return state | {name: state[name].narrow(axis, first, wanted) for name, axis in heads.items()}


def _first_class_row(state: State, network: Network, rows: int, wanted: int) -> int | None:
    """The row of the file's class head that is label 0, or None if its rows are not the network's labels.

    A file trained on K labels has K + 1 logits, the last of which belongs to no label. In a keypoint file the classes
    with keypoints come first, however many logits follow; in the oldest files one class without keypoints precedes.
    """
    if network.activation != "sigmoid":
        return None
    if rows in (wanted, wanted + 1):
        return 0
    ours = network.keypoint_counts
    if not ours or rows < wanted:
        return None
    theirs = tuple(state[KEYPOINT_MASK].sum(1).tolist())
    return {ours: 0, (0, *ours): 1}.get(theirs)


def _with_own_keypoints(state: State, own: State) -> State:
    """The network's own tokens where the file has another number of keypoints."""
    names = [name for name in BY_KEYPOINT if name in own and name in state]
    changed = {name: own[name] for name in names if own[name].shape != state[name].shape}
    if changed:
        logger.info(
            "keypoints: initialised anew; the file has %d, this network %d", *(len(x[names[0]]) for x in (state, own))
        )
    return state | changed


def _refuse_other_task(state: State, own: State) -> None:
    theirs, ours = task(state), task(own) if patches_of(own) else "another"
    if theirs != ours:
        raise ValueError(f"model.weights is a file for model={theirs}, but the network is {ours}; {_advice(state)}")


def _advice(state: State) -> str:
    """Which published network a file is for."""
    network = network_of(state)
    if not network:
        return "it is none of the published networks; set model.* as the file was made with"
    return f"use {network}, for which the file was made, or another file"


def _refuse_misfits(fitted: State, own: State) -> None:
    """Refuse a file of another architecture; the most informative difference first: patches, width, depth."""
    patches = patches_of(own)
    if fitted[patches].shape != own[patches].shape:
        width, _, size, _ = fitted[patches].shape
        raise ValueError(
            f"model.weights is for patches of {size} pixels and a backbone of {width} channels, but this network has "
            f"{own[patches].shape[-1]} and {own[patches].shape[0]}; {_advice(fitted)}"
        )
    missing = sorted(set(own) - set(fitted))
    if missing:
        raise ValueError(
            f"model.weights lacks {len(missing)} tensors of this network ({', '.join(missing[:4])}, ...); "
            f"{_advice(fitted)}"
        )
    wrong = [n for n, t in own.items() if fitted[n].shape != t.shape and n != RESAMPLED]
    if wrong:
        shapes = ", ".join(f"{n}: {list(fitted[n].shape)} instead of {list(own[n].shape)}" for n in wrong[:4])
        raise ValueError(
            f"model.weights has {len(wrong)} tensors of other shapes than this network ({shapes}); {_advice(fitted)}"
        )
