"""RF-DETR weights of transformers (`rf_detr`) under the names of RF-DETR's authors."""

from __future__ import annotations

import re

import torch
from torch import Tensor

MARK = "reference_point_embed.weight"  # no other family has it

# Names in transformers, without `model.` in front -> names of the authors. Applied in order.
NAMES = [
    (r"^backbone\.backbone\.", "backbone.0.encoder.encoder."),
    (r"(encoder\.layer\.\d+)\.attention\.q_proj\.", r"\1.attention.attention.query."),
    (r"(encoder\.layer\.\d+)\.attention\.k_proj\.", r"\1.attention.attention.key."),
    (r"(encoder\.layer\.\d+)\.attention\.v_proj\.", r"\1.attention.attention.value."),
    (r"(encoder\.layer\.\d+)\.attention\.o_proj\.", r"\1.attention.output.dense."),
    (r"^backbone\.projector\.projector_layer\.", "backbone.0.projector.stages.0.0."),
    (r"^backbone\.projector\.layer_norm\.", "backbone.0.projector.stages.0.1."),
    (r"^(backbone\.0\.projector\..*?)\.bottlenecks\.(\d+)\.", r"\1.m.\2."),
    (r"^(backbone\.0\.projector\..*)\.conv(\d)\.conv\.", r"\1.cv\2.conv."),
    (r"^(backbone\.0\.projector\..*)\.conv(\d)\.norm\.", r"\1.cv\2.bn."),
    (r"^reference_point_embed\.", "refpoint_embed."),
    (r"^(decoder\.layers\.\d+)\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),
    (r"^(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(decoder\.layers\.\d+)\.cross_attn_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.layers\.\d+)\.layer_norm\.", r"\1.norm3."),
    (r"^(decoder\.layers\.\d+)\.mlp\.fc(\d)\.", r"\1.linear\2."),
    (r"^decoder\.layernorm\.", "decoder.norm."),
    (r"^(decoder\.|enc_out)", r"transformer.\1"),
    (r"^segmentation_bias$", "segmentation_head.bias"),
    (r"^(blocks\.\d+)\.layernorm\.", r"\1.norm."),
    (r"^(blocks\.\d+)\.depthwise_conv\.", r"\1.dwconv."),
    (r"^(blocks\.\d+)\.pointwise_conv\.", r"\1.pwconv1."),
    (r"^query_features_block\.norm\.", "query_features_block.norm_in."),
    (r"^query_features_block\.mlp\.fc1\.", "query_features_block.layers.0."),
    (r"^query_features_block\.mlp\.fc2\.", "query_features_block.layers.2."),
    (r"^(blocks\.|spatial_features_proj\.|query_features_)", r"segmentation_head.\1"),
]
_PART = re.compile(r"^(transformer\.decoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the names of the authors; others stay as they are.

    Args:
        state: name, without `model.` in front -> tensor.
    """
    if MARK not in state:
        return state
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        for theirs, authors in NAMES:
            name = re.sub(theirs, authors, name)
        if part := _PART.match(name):
            parts.setdefault(f"{part[1]}.in_proj_{part[3]}", {})[part[2]] = tensor
        else:
            renamed[name] = tensor
    return renamed | {name: torch.cat([found[letter] for letter in "qkv"]) for name, found in parts.items()}
