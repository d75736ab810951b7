"""EdgeCrafter weights in the names of their authors, and back: those of D-FINE but for some parts.

As in `pretrained_rtdetr`, tensors are renamed, never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.model import pretrained_dfine as dfine
from detr_exp.model.decoder.dfine import DFineDecoder, Traits
from detr_exp.model.decoder.pose import PoseDecoder
from detr_exp.model.layer.memory import Memory
from detr_exp.model.layer.query_selection import ANCHOR_MARGIN
from detr_exp.model.pretrained_rfdetr import MASK_HEAD
from detr_exp.model.pretrained_rtdetr import renamed_by, swapped

State = dict[str, Tensor]

TRAITS = Traits("layer", 3, True, False, True, False)
_PERIODS = "backbone.backbone.rope_embed.periods"
_WAVES = "decoder.decoder.dim_t"
OFFICIAL = [
    *(
        (f"backbone.body.blocks.{{}}.{ours}", f"backbone.backbone.blocks.{{}}.{theirs}")
        for ours, theirs in (("qkv", "attn.qkv"), ("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"))
    ),
    ("backbone.body.stem", "backbone.backbone.patch_embed.convs"),
    ("backbone.body.patches", "backbone.backbone.patch_embed.proj"),
    ("backbone.body.cls_token", "backbone.backbone.register_token"),
    ("backbone.body", "backbone.backbone"),
    ("decoder.decoder.layers.{}.norm3", "decoder.decoder.layers.{}.norm2"),
    *((ours, f"decoder.decoder.{theirs}") for ours, theirs in MASK_HEAD),
]


# Ours and theirs of poses, beside those above; the norms of layers are in the names of D-FINE already.
POSE = [
    *(
        (f"decoder.{ours}", f"decoder.{theirs}")
        for ours, theirs in (
            ("query_pos_head", "decoder.half_pose_ref_point_head"),
            ("lqe_layers", "lqe_embed"),
            ("instance_embed", "instance_embedding"),
            ("point_embed", "keypoint_embedding"),
            ("noise_label_embed", "label_enc"),
            ("noise_point_embed", "pose_enc"),
            ("enc_output.proj", "enc_output"),
            ("enc_output.norm", "enc_output_norm"),
            ("enc_score_head", "enc_out_class_embed"),
            ("enc_pose_head", "enc_pose_embed"),
            ("pre_pose_head", "pre_pose_embed"),
            ("dec_score_head", "class_embed"),
            ("dec_pose_head", "pose_embed"),
        )
    ),
]
_SCORES = "decoder.enc_out_class_embed.bias"


def is_pose(state: State) -> bool:
    """Whether these are weights of poses in the names of their authors."""
    return "decoder.keypoint_embedding.weight" in state


def classes_of(state: State) -> list[str] | None:
    """Class names of published files of poses, whose two logits are of category ids; None for all others."""
    return ["unused_0", "person"] if is_pose(state) and len(state[_SCORES]) == 2 else None


def is_ec(state: State) -> bool:
    """Whether these are weights of EdgeCrafter in the names of its authors."""
    return "backbone.backbone.register_token" in state


def from_official(state: State) -> State:
    """Official names -> ours."""
    kept = {name: tensor for name, tensor in state.items() if name not in (_PERIODS, _WAVES)}
    if is_pose(state):
        kept = renamed_by(kept, swapped(POSE))
    return dfine.from_official(renamed_by(kept, swapped(OFFICIAL)))


def to_official(state: State, *, num_points: list[int], spatial_shapes: list[tuple[int, int]]) -> State:
    """Our names -> official ones; arguments as in `official_constants`."""
    periods = 100.0 ** (torch.arange(16) / 16)  # of heads with 64 channels, which all have
    if "decoder.point_embed.weight" in state:
        theirs = renamed_by(renamed_by(state, POSE), dfine.OFFICIAL) | _constants_of_poses(state, spatial_shapes)
    else:
        theirs = dfine.to_official(state, num_points=num_points, spatial_shapes=spatial_shapes)
    return renamed_by(theirs, OFFICIAL) | {_PERIODS: periods}


def _constants_of_poses(state: State, spatial_shapes: list[tuple[int, int]]) -> State:
    boxes, _ = Memory(torch.zeros(0), spatial_shapes, None).proposals()
    centres, half = boxes[..., :2], state["decoder.tgt_embed.weight"].shape[1] // 2
    outside = ((centres - 0.5).abs() >= 0.5 - ANCHOR_MARGIN).any(-1, keepdim=True)
    waves = 10000 ** (2 * (torch.arange(half) // 2) / half)
    return {"decoder.anchors": centres.logit(), "decoder.valid_mask": outside, _WAVES: waves}


def official_name(decoder: DFineDecoder | PoseDecoder) -> str:
    """A name for a file in official names.

    Raises:
        ValueError: the official code has no such decoder.
    """
    if isinstance(decoder, PoseDecoder):
        return "ecpose.pth"
    if decoder.activations != ("silu", "silu"):
        raise ValueError(
            f"the decoder has {' in its layers and '.join(decoder.activations)} in its perceptrons, and official files "
            "of EdgeCrafter are of networks with silu in both; use format=safetensors"
        )
    return "ec.pth"
