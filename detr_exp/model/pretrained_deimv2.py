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
_PYRAMID = [  # the convolutions beside a transformer
    *(
        (f"backbone.{ours}", f"backbone.sta.{theirs}")
        for ours, theirs in (
            ("stem.conv", "stem.0"),
            ("stem.norm", "stem.1"),
            ("conv2.conv", "conv2.0"),
            ("conv2.norm", "conv2.1"),
            ("conv3.conv", "conv3.1"),
            ("conv3.norm", "conv3.2"),
            ("conv4.conv", "conv4.1"),
            ("conv4.norm", "conv4.2"),
        )
    ),
    ("backbone.fusion.{}.conv", "backbone.convs.{}"),
    ("backbone.fusion.{}.norm", "backbone.norms.{}"),
]
_SMALL_VIT = [
    *(
        (f"backbone.body.blocks.{{}}.{ours}", f"backbone.dinov3._model.blocks.{{}}.{theirs}")
        for ours, theirs in (("qkv", "attn.qkv"), ("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"))
    ),
    ("backbone.body.patches", "backbone.dinov3._model.patch_embed.proj"),
    ("backbone.body", "backbone.dinov3._model"),
]
_DINOV3 = [  # of timm
    *(
        (f"backbone.body.model.blocks.{{}}.{ours}", f"backbone.dinov3.blocks.{{}}.{theirs}")
        for ours, theirs in (
            ("gamma_1", "ls1.gamma"),
            ("gamma_2", "ls2.gamma"),
            ("mlp.fc1_g", "mlp.w1"),
            ("mlp.fc1_x", "mlp.w2"),
            ("mlp.fc2", "mlp.w3"),
        )
    ),
    ("backbone.body.model.reg_token", "backbone.dinov3.storage_tokens"),
    ("backbone.body.model", "backbone.dinov3"),
]
_UNUSED = re.compile(r"^backbone\.dinov3\..*(rope_embed\.periods|mask_token|bias_mask)$")
_BIAS = re.compile(r"(backbone\.dinov3\.blocks\.\d+\.attn\.)qkv\.bias$")
_BOX_HEAD = re.compile(r"decoder\.dec_bbox_head\.(\d+)\.(.*)")


def is_deimv2(state: State) -> bool:
    """Whether these are weights of DEIMv2 in the names of its authors."""
    return any(".swish_ffn.w12." in name for name in state)


def from_official(state: State) -> State:
    """Official names -> ours; a box head that all layers share is in their files once for each."""
    kept = {name: tensor for name, tensor in state.items() if not _UNUSED.match(name)}
    has_plain = any(name.endswith(".mlp.fc1.weight") for name in kept)
    dinov3 = [pair for pair in _DINOV3 if not (has_plain and "mlp" in pair[0])]
    of_backbone = [*_PYRAMID, *_SMALL_VIT, *dinov3] if any("backbone.dinov3." in name for name in kept) else []
    for name in [name for name in kept if _BIAS.match(name)]:  # keys have no bias in DINOv3, which sets it to zero
        query, _, value = kept.pop(name).chunk(3)
        kept |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    rules = [*of_backbone, *_OFFICIAL, *dfine.OFFICIAL]
    ours = renamed_by(dfine.without_derived(kept), swapped(rules))
    copies = {name: match for name in ours if (match := _BOX_HEAD.match(name)) and match[1] != "0"}
    firsts = {name: ours[f"decoder.dec_bbox_head.0.{match[2]}"] for name, match in copies.items()}
    is_shared = all(torch.equal(ours[name], first) for name, first in firsts.items())
    return {name: tensor for name, tensor in ours.items() if not (is_shared and name in copies)}


def to_official(state: State, *, num_points: list[int], spatial_shapes: list[tuple[int, int]]) -> State:
    """Our names -> official ones; arguments as in `official_constants`."""
    of_backbone = [*_PYRAMID, *_DINOV3, *_SMALL_VIT] if any(name.startswith("backbone.body.") for name in state) else []
    is_plain = any(name.startswith("backbone.body.model.") and name.endswith("fc1.weight") for name in state)
    rules = [pair for pair in of_backbone if not (is_plain and ".mlp." in pair[0])]
    renamed = renamed_by(state, [*rules, *_OFFICIAL])
    for name in [name for name in renamed if name.startswith("backbone.dinov3.") and name.endswith(".q_bias")]:
        query, value = renamed.pop(name), renamed.pop(name.replace("q_bias", "v_bias"))
        zeros, ones = torch.zeros_like(query), torch.ones_like(query)
        renamed[name.replace("q_bias", "qkv.bias")] = torch.cat([query, zeros, value])
        renamed[name.replace("q_bias", "qkv.bias_mask")] = torch.cat([ones, zeros, ones])
    for name in [name for name in renamed if name.startswith("backbone.dinov3.") and name.endswith("cls_token")]:
        like = renamed[name]
        periods = 100.0 ** (torch.arange(16, dtype=like.dtype) / 16)  # of heads with 64 channels, which all have
        renamed[name.replace("cls_token", "rope_embed.periods")] = periods
        if "_model" not in name:
            renamed[name.replace("cls_token", "mask_token")] = torch.zeros_like(like[0])
    theirs = dfine.to_official(renamed, num_points=num_points, spatial_shapes=spatial_shapes)
    layers = {name.split(".")[2] for name in state if name.startswith("decoder.layers.")}
    for name in [name for name in state if name.startswith("decoder.dec_bbox_head.0.")]:
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
