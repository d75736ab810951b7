"""RF-DETR in transformers, `rf_detr`: the names of its modules as those of RF-DETR's authors, and its configuration."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from detr_exp.tensor_files import Stored

KNOWN = {"neck": "Projector", "decoder": "GroupDecoder", "mask_head": "MaskHead"}  # parts and their classes
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


def transformers_config(model: Stored, classes: list[str]) -> Stored:
    """The `config.json` with which transformers builds the same network.

    Args:
        model: the resolved `model` node of a configuration.
        classes: class names in the order of the logits.

    Raises:
        ValueError: for what transformers has no words for.
    """
    backbone, neck, masks = model["backbone"], model["neck"], model.get("mask_head")
    refuse_unknown(model, {"backbone": "WindowedDinov2"} | KNOWN)
    height, width = model["image_size"]
    fits = {"model.neck.levels": list(neck["levels"]) == ["P4"], "model.image_size": height == width}
    fits["model.neck.norm"] = neck.get("norm", "layer") == "layer"
    if unknown := [key for key, value in fits.items() if not value]:
        raise ValueError(
            f"transformers cannot express this {' and '.join(unknown)}; its RF-DETR supports square images, one "
            "feature map and norms of layers. Use format=safetensors"
        )
    patch = backbone["patch_size"]
    grid = backbone["position_grid"] or height // patch
    return {
        "architectures": ["RfDetrForObjectDetection" if masks is None else "RfDetrForInstanceSegmentation"],
        "model_type": "rf_detr",
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            "image_size": grid * patch,
            "patch_size": patch,
            "hidden_size": backbone["width"],
            "num_attention_heads": backbone["num_heads"],
            "num_hidden_layers": backbone["out_blocks"][-1],
            "num_windows": backbone["num_windows"],
            "out_features": [f"stage{depth}" for depth in backbone["out_blocks"]],
            "drop_path_rate": backbone["drop_path"],
            "use_mask_token": False,
        },
        "intermediate_size": 4 * model["hidden_dim"],
        **({} if masks is None else {"mask_downsample_ratio": masks["downsample"]}),
        **decoder_config(model, classes, min(model["num_queries"], (height // patch) * (width // patch))),
    }


def decoder_config(model: Stored, classes: list[str], num_queries: int) -> Stored:
    """The keys of `config.json` that transformers' LW-DETR and RF-DETR have in common.

    Args:
        num_queries: of a group at the size of the configuration: transformers needs as many cells.
    """
    return {
        "c2f_num_blocks": model["neck"]["num_bottlenecks"],
        "d_model": model["hidden_dim"],
        "decoder_layers": model["num_layers"],
        "decoder_self_attention_heads": model["num_heads"],
        "decoder_cross_attention_heads": model["num_cross_heads"],
        "decoder_n_points": model["num_points"],
        "decoder_ffn_dim": model["dim_feedforward"],
        "dropout": 0.0,
        "num_queries": num_queries,
        "group_detr": model["num_groups"],
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def refuse_unknown(model: Stored, known: dict[str, str]) -> None:
    """Refuse parts of a model that transformers does not have.

    Args:
        model: the resolved `model` node of a configuration.
        known: part -> the class that it knows.
    """
    for name, kind in known.items():
        part = model.get(name)
        if part is not None and not str(part.get("_target_")).endswith(f".{kind}"):
            raise ValueError(f"transformers cannot express model.{name}={part.get('_target_')}; use format=safetensors")
