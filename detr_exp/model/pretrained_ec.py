"""EdgeCrafter weights in the names of their authors, and back: those of D-FINE but for some parts.

As in `pretrained_rtdetr`, tensors are renamed, never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.model import pretrained_dfine as dfine
from detr_exp.model.decoder.dfine import DFineDecoder, Traits
from detr_exp.model.pretrained_rfdetr import MASK_HEAD
from detr_exp.model.pretrained_rtdetr import renamed_by, swapped

State = dict[str, Tensor]

TRAITS = Traits("layer", 3, True, False, True, False)
_PERIODS = "backbone.backbone.rope_embed.periods"
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


def is_ec(state: State) -> bool:
    """Whether these are weights of EdgeCrafter in the names of its authors."""
    return "backbone.backbone.register_token" in state


def from_official(state: State) -> State:
    """Official names -> ours."""
    kept = {name: tensor for name, tensor in state.items() if name != _PERIODS}
    return dfine.from_official(renamed_by(kept, swapped(OFFICIAL)))


def to_official(state: State, *, num_points: list[int], spatial_shapes: list[tuple[int, int]]) -> State:
    """Our names -> official ones; arguments as in `official_constants`."""
    periods = 100.0 ** (torch.arange(16) / 16)  # of heads with 64 channels, which all have
    theirs = dfine.to_official(state, num_points=num_points, spatial_shapes=spatial_shapes)
    return renamed_by(theirs, OFFICIAL) | {_PERIODS: periods}


def official_name(decoder: DFineDecoder) -> str:
    """A name for a file in official names.

    Raises:
        ValueError: the official code has no such decoder.
    """
    if decoder.activations != ("silu", "silu"):
        raise ValueError(
            f"the decoder has {' in its layers and '.join(decoder.activations)} in its perceptrons, and official files "
            "of EdgeCrafter are of networks with silu in both; use format=safetensors"
        )
    return "ec.pth"
