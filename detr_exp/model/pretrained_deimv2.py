"""DEIMv2 weights in the names of their authors, and back: those of D-FINE but for some parts.

As in `pretrained_rtdetr`, tensors are renamed, never changed. transformers' DEIMv2 is another network (it normalises
the cells from which queries are selected, has other activations, and recomputes positions), so nothing is written for
it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from detr_exp.model import pretrained_dfine as dfine
from detr_exp.model.decoder.dfine import DFineDecoder, Traits
from detr_exp.model.pretrained_rtdetr import renamed_by, swapped

State = dict[str, Tensor]

_OFFICIAL = [
    ("encoder.down1.cv.conv", "encoder.down_sample1.1"),
    ("encoder.down1.cv.norm", "encoder.down_sample1.2"),
    ("encoder.down2.cv.conv", "encoder.down_sample2.1"),
    ("encoder.down2.cv.norm", "encoder.down_sample2.2"),
    ("encoder.bi_fusion", "encoder.bi_fusion.cv"),
    ("decoder.layers.{}.linear1", "decoder.decoder.layers.{}.swish_ffn.w12"),
    ("decoder.layers.{}.linear2", "decoder.decoder.layers.{}.swish_ffn.w3"),
]
_BOX_HEAD = re.compile(r"decoder\.dec_bbox_head\.(\d+)\.(.*)")


def is_deimv2(state: State) -> bool:
    """Whether these are weights of DEIMv2 in the names of its authors."""
    return any(".swish_ffn.w12." in name for name in state)


def from_official(state: State) -> State:
    """Official names -> ours; a box head that all layers share is in their files once for each."""
    ours = renamed_by(dfine.without_derived(state), swapped([*_OFFICIAL, *dfine.OFFICIAL]))
    copies = {name: match for name in ours if (match := _BOX_HEAD.match(name)) and match[1] != "0"}
    firsts = {name: ours[f"decoder.dec_bbox_head.0.{match[2]}"] for name, match in copies.items()}
    is_shared = all(torch.equal(ours[name], first) for name, first in firsts.items())
    return {name: tensor for name, tensor in ours.items() if not (is_shared and name in copies)}


def to_official(state: State, *, num_points: list[int], spatial_shapes: list[tuple[int, int]]) -> State:
    """Our names -> official ones; arguments as in `official_constants`."""
    renamed = renamed_by(state, _OFFICIAL)
    theirs = dfine.to_official(renamed, num_points=num_points, spatial_shapes=spatial_shapes)
    layers = {name.split(".")[2] for name in state if name.startswith("decoder.layers.")}
    for name in [name for name in state if _BOX_HEAD.match(name)]:
        for layer in layers:
            theirs.setdefault(name.replace(".0.", f".{layer}.", 1), state[name].clone())
    return theirs


def official_name(decoder: DFineDecoder) -> str:
    """A name for a file in official names.

    Raises:
        ValueError: the official code has no such decoder.
    """
    own = Traits("rms", 3, True, False, decoder.traits.gated, decoder.traits.share_box_head)
    if decoder.activations != ("swiglu", "silu") or decoder.traits != own:
        raise ValueError(
            "the decoder has swiglu but not all else of DEIMv2 (rms norms, silu in perceptrons, positions of the first "
            "boxes, no projection of the cells), so that there is no official file of it; use format=safetensors"
        )
    return "deimv2.pth"
