"""RF-DETR and transformers' `rf_detr`: its names of weights to those of RF-DETR's authors, and our networks to it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from detr_exp.model.pretrained_rtdetr import renamed_by
from detr_exp.tensor_files import Stored

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
VIT, PROJECTOR = "backbone.0.encoder.encoder", "backbone.0.projector.stages.{}"
# Our names -> names of the authors, which transformers also writes. `{}` is a number.
OURS = [
    ("backbone.embedding.class_token", f"{VIT}.embeddings.cls_token"),
    ("backbone.embedding.patches", f"{VIT}.embeddings.patch_embeddings.projection"),
    ("backbone.blocks.{}.out", f"{VIT}.encoder.layer.{{}}.attention.output.dense"),
    ("backbone.blocks.{}.scale{}", f"{VIT}.encoder.layer.{{}}.layer_scale{{}}.lambda1"),
    ("backbone.blocks.{}.fc{}", f"{VIT}.encoder.layer.{{}}.mlp.fc{{}}"),
    ("backbone.blocks.{}.norm{}", f"{VIT}.encoder.layer.{{}}.norm{{}}"),
    ("backbone.norm", f"{VIT}.layernorm"),
    *(
        (f"neck.levels.{{}}.mix.{ours}.{n}", f"{PROJECTOR}.0.{theirs}.{part}")
        for ours, theirs in (
            ("enter", "cv1"),
            ("leave", "cv2"),
            ("bottlenecks.{}.0", "m.{}.cv1"),
            ("bottlenecks.{}.1", "m.{}.cv2"),
        )
        for n, part in enumerate(("conv", "bn"))
    ),
    ("neck.levels.{}.norm", f"{PROJECTOR}.1"),
    ("queries.position_mlp", "transformer.decoder.ref_point_head"),
    ("layers", "transformer.decoder.layers"),
    ("norm", "transformer.decoder.norm"),
    ("head.classes", "class_embed"),
    ("head.box", "bbox_embed"),
    ("mask_head.blocks.{}.conv", "segmentation_head.blocks.{}.dwconv"),
    ("mask_head.blocks.{}.linear", "segmentation_head.blocks.{}.pwconv1"),
    ("mask_head.feature_proj", "segmentation_head.spatial_features_proj"),
    ("mask_head.query_mlp.0", "segmentation_head.query_features_block.norm_in"),
    ("mask_head.query_mlp.1", "segmentation_head.query_features_block.layers.0"),
    ("mask_head.query_mlp.3", "segmentation_head.query_features_block.layers.2"),
    ("mask_head.query_proj", "segmentation_head.query_features_proj"),
    ("mask_head", "segmentation_head"),
]
# Tensors with an axis of query groups, which are one tensor a group there.
GROUPS = {
    "queries.project": "transformer.enc_output",
    "queries.norm": "transformer.enc_output_norm",
    "queries.class_head": "transformer.enc_out_class_embed",
    "queries.box_head": "transformer.enc_out_bbox_embed",
}
_QKV = re.compile(r"backbone\.blocks\.(\d+)\.qkv\.(weight|bias)")
_GROUP = re.compile(rf"({'|'.join(map(re.escape, GROUPS))})\.(.+)")
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


def to_transformers(state: dict[str, Tensor], num_queries: int) -> dict[str, Tensor]:
    """Our names -> those that transformers writes, for boxes or boxes and masks.

    Args:
        state: of an `RFDETR`.
        num_queries: of each group; the queries after them are left out.
    """
    rest = dict(state)
    positions = [rest.pop("backbone.embedding.class_position"), rest.pop("backbone.embedding.position").flatten(2).mT]
    written = {
        f"{VIT}.embeddings.position_embeddings": torch.cat(positions, dim=1),
        "refpoint_embed.weight": rest.pop("queries.delta")[:, :num_queries].flatten(0, 1),
        "query_feat.weight": rest.pop("queries.content")[:, :num_queries].flatten(0, 1),
    }
    for name in list(rest):
        if match := _QKV.fullmatch(name):
            for part, piece in zip(("query", "key", "value"), rest.pop(name).chunk(3)):
                written[f"{VIT}.encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = piece
        elif match := _GROUP.fullmatch(name):
            for group, piece in enumerate(rest.pop(name)):
                written[f"{GROUPS[match[1]]}.{group}.{match[2]}"] = piece
    return written | renamed_by(rest, OURS)


def transformers_config(model: Stored, classes: list[str]) -> Stored:
    """The `config.json` with which transformers builds the same network.

    Args:
        model: the resolved `model` node of a configuration.
        classes: class names in the order of the logits.

    Raises:
        ValueError: for what transformers has no words for.
    """
    backbone, neck, masks = model["backbone"], model["neck"], model.get("mask_head")
    _refuse_unknown(model)
    grid = backbone["position_grid"] or model["image_size"][0] // backbone["patch_size"]
    return {
        "architectures": ["RfDetrForObjectDetection" if masks is None else "RfDetrForInstanceSegmentation"],
        "model_type": "rf_detr",
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            "image_size": grid * backbone["patch_size"],
            "patch_size": backbone["patch_size"],
            "hidden_size": backbone["width"],
            "num_attention_heads": backbone["num_heads"],
            "num_hidden_layers": backbone["out_blocks"][-1],
            "num_windows": backbone["num_windows"],
            "out_features": [f"stage{depth}" for depth in backbone["out_blocks"]],
            "drop_path_rate": backbone["drop_path"],
            "use_mask_token": False,
        },
        "c2f_num_blocks": neck["num_bottlenecks"],
        "d_model": model["hidden_dim"],
        "decoder_layers": model["num_layers"],
        "decoder_self_attention_heads": model["num_heads"],
        "decoder_cross_attention_heads": model["num_cross_heads"],
        "decoder_n_points": model["num_points"],
        "decoder_ffn_dim": model["dim_feedforward"],
        "dropout": 0.0,
        "num_queries": queries_in_use(model),
        "group_detr": model["num_groups"],
        "intermediate_size": 4 * model["hidden_dim"],
        **({} if masks is None else {"mask_downsample_ratio": masks["downsample"]}),
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def queries_in_use(model: Stored) -> int:
    """Queries of a group at the size of the configuration: no more than there are cells, as transformers needs."""
    height, width = (side // model["backbone"]["patch_size"] for side in model["image_size"])
    return min(model["num_queries"], height * width)


def _refuse_unknown(model: Stored) -> None:
    parts = {"backbone": "WindowedDinov2", "neck": "Projector", "decoder": "GroupDecoder", "mask_head": "MaskHead"}
    for name, known in parts.items():
        part = model.get(name)
        if part is not None and not str(part.get("_target_")).endswith(f".{known}"):
            raise ValueError(f"transformers cannot express model.{name}={part.get('_target_')}; use format=safetensors")
    height, width = model["image_size"]
    fits = {"model.neck.levels": list(model["neck"]["levels"]) == ["P4"], "model.image_size": height == width}
    if unknown := [key for key, value in fits.items() if not value]:
        raise ValueError(
            f"transformers cannot express this {' and '.join(unknown)}; its RF-DETR supports square images and one "
            "feature map. Use format=safetensors"
        )
