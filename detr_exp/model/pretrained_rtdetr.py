"""RT-DETR and RT-DETRv2 weights in the names of their authors and of Hugging Face, and back.

All functions are renamings of state dicts: tensors are passed on, split or joined, never changed. "Official" is the
PyTorch code of RT-DETRv2 and, with a few older spellings, of RT-DETR; both differ from our names in little. The Hugging
Face names are those of transformers 5 (`RTDetrV2ForObjectDetection`), and those of files, spelt as in version 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from detr_exp.model.backbone import hgnetv2
from detr_exp.model.backbone.presnet import BLOCKS, STRIDES
from detr_exp.model.layer.query_selection import anchor_logits
from detr_exp.tensor_files import Stored

State = dict[str, Tensor]

# Constants that the official code saves in its files; they follow from the configuration.
_DERIVED = re.compile(r"(^decoder\.(anchors|valid_mask)|\.(n|num)_points_scale|^encoder\.pos_embed\d+)$")

_HGNET = ("backbone.stem.", "backbone.stages.")

# Ours and theirs; {} is a number, and what follows a name stays as it is.
_OFFICIAL = [("decoder.layers.{}", "decoder.decoder.layers.{}")]
_OFFICIAL_V1 = [
    ("encoder.input_proj.{}.conv", "encoder.input_proj.{}.0"),
    ("encoder.input_proj.{}.norm", "encoder.input_proj.{}.1"),
    ("decoder.enc_output.proj", "decoder.enc_output.0"),
    ("decoder.enc_output.norm", "decoder.enc_output.1"),
]
_STEM = "model.backbone.model.embedder.embedder"
_STAGES = "model.backbone.model.encoder.stages"
_HUGGING_FACE = [
    *(
        (f"backbone.conv1.conv1_{n + 1}.{ours}", f"{_STEM}.{n}.{theirs}")
        for n in range(3)
        for ours, theirs in (("conv", "convolution"), ("norm", "normalization"))
    ),
    *(
        (
            f"backbone.res_layers.{{}}.blocks.{{}}.branch2{letter}.{ours}",
            f"{_STAGES}.{{}}.layers.{{}}.layer.{n}.{theirs}",
        )
        for n, letter in enumerate("abc")
        for ours, theirs in (("conv", "convolution"), ("norm", "normalization"))
    ),
    ("backbone.res_layers.{}.blocks.0.short.conv.conv", _STAGES + ".{}.layers.0.shortcut.1.convolution"),
    ("backbone.res_layers.{}.blocks.0.short.conv.norm", _STAGES + ".{}.layers.0.shortcut.1.normalization"),
    ("backbone.res_layers.{}.blocks.0.short.conv", _STAGES + ".{}.layers.0.shortcut.convolution"),
    ("backbone.res_layers.{}.blocks.0.short.norm", _STAGES + ".{}.layers.0.shortcut.normalization"),
    ("encoder.input_proj.{}.conv", "model.encoder_input_proj.{}.0"),
    ("encoder.input_proj.{}.norm", "model.encoder_input_proj.{}.1"),
    *(
        (f"encoder.encoder.{{}}.layers.{{}}.{ours}", f"model.encoder.aifi.{{}}.layers.{{}}.{theirs}")
        for ours, theirs in (
            ("self_attn.out_proj", "self_attn.o_proj"),
            ("self_attn", "self_attn"),
            ("linear1", "mlp.fc1"),
            ("linear2", "mlp.fc2"),
            ("norm1", "self_attn_layer_norm"),
            ("norm2", "final_layer_norm"),
        )
    ),
    *(
        (f"encoder.{part}", f"model.encoder.{part}")
        for part in ("lateral_convs", "fpn_blocks", "downsample_convs", "pan_blocks")
    ),
    ("decoder.input_proj.{}.conv", "model.decoder_input_proj.{}.0"),
    ("decoder.input_proj.{}.norm", "model.decoder_input_proj.{}.1"),
    *(
        (f"decoder.layers.{{}}.{ours}", f"model.decoder.layers.{{}}.{theirs}")
        for ours, theirs in (
            ("self_attn.out_proj", "self_attn.o_proj"),
            ("self_attn", "self_attn"),
            ("cross_attn", "encoder_attn"),
            ("linear1", "mlp.fc1"),
            ("linear2", "mlp.fc2"),
            ("norm1", "self_attn_layer_norm"),
            ("norm2", "encoder_attn_layer_norm"),
            ("norm3", "final_layer_norm"),
        )
    ),
    ("decoder.enc_output.proj", "model.enc_output.0"),
    ("decoder.enc_output.norm", "model.enc_output.1"),
    ("decoder.denoising_class_embed", "model.denoising_class_embed"),
    ("decoder.enc_score_head", "model.enc_score_head"),
    ("decoder.enc_bbox_head", "model.enc_bbox_head"),
    ("decoder.tgt_embed", "model.weight_embedding"),
    ("decoder.query_pos_head", "model.decoder.query_pos_head"),
    ("decoder.dec_score_head", "model.decoder.class_embed"),
    ("decoder.dec_bbox_head", "model.decoder.bbox_embed"),
]
# The spelling of transformers 4, which files have; (new, old).
SPELT_AS_V4 = [
    ("model.encoder.aifi.{}.layers.{}.mlp.fc1", "model.encoder.encoder.{}.layers.{}.fc1"),
    ("model.encoder.aifi.{}.layers.{}.mlp.fc2", "model.encoder.encoder.{}.layers.{}.fc2"),
    ("model.encoder.aifi.{}.layers.{}.self_attn.o_proj", "model.encoder.encoder.{}.layers.{}.self_attn.out_proj"),
    ("model.encoder.aifi.{}", "model.encoder.encoder.{}"),
    ("model.decoder.layers.{}.mlp.fc1", "model.decoder.layers.{}.fc1"),
    ("model.decoder.layers.{}.mlp.fc2", "model.decoder.layers.{}.fc2"),
    ("model.decoder.layers.{}.self_attn.o_proj", "model.decoder.layers.{}.self_attn.out_proj"),
]


def is_official(state: State) -> bool:
    """Whether these are weights in the names of the official code, of either version."""
    return any(name.startswith("decoder.decoder.layers.") for name in state)


def from_official(state: State) -> State:
    """Official names -> ours."""
    parameters = {name: tensor for name, tensor in state.items() if not _DERIVED.search(name)}
    parameters = {hgnetv2.to_our_names(n) if n.startswith(_HGNET) else n: t for n, t in parameters.items()}
    return renamed_by(renamed_by(parameters, swapped(_OFFICIAL_V1)), swapped(_OFFICIAL))


def to_official(
    state: State, *, num_points: list[int], spatial_shapes: list[tuple[int, int]], version: int = 2
) -> State:
    """Our names -> official ones, with the constants that such files contain.

    Args:
        num_points, spatial_shapes: as in `official_constants`.
        version: 1 for RT-DETR, whose files contain no constants.
    """
    renamed = renamed_by(state, _OFFICIAL)
    renamed = {hgnetv2.to_official_names(n) if n.startswith(_HGNET) else n: tensor for n, tensor in renamed.items()}
    if version == 1:
        return renamed_by(renamed, _OFFICIAL_V1)
    return renamed | official_constants(state, num_points, spatial_shapes)


def official_constants(state: State, num_points: list[int], spatial_shapes: list[tuple[int, int]]) -> State:
    """The constants in the files of RT-DETRv2 and D-FINE.

    Args:
        num_points: of each level.
        spatial_shapes: of each level, at the size the network is evaluated with.
    """
    anchors, valid = anchor_logits(spatial_shapes, torch.float32, torch.device("cpu"))
    constants = {
        "decoder.anchors": torch.where(valid, anchors, torch.inf)[None],
        "decoder.valid_mask": valid[None],
    }
    return constants | points_scales(state, num_points, "decoder.decoder.layers.{}.cross_attn.num_points_scale")


def is_huggingface(state: State) -> bool:
    """Whether these are weights in the names of transformers."""
    return any(name.startswith("model.decoder.layers.") for name in state)


def from_huggingface(state: State) -> State:
    """Names of transformers, in either spelling -> ours."""
    current = renamed_by(state, swapped(SPELT_AS_V4))
    plain = {}
    for name, tensor in current.items():
        if _DERIVED.search(name):
            continue
        # Heads appear under a second name at the top; it is the only one where a file has no duplicates.
        name = re.sub(r"^(class_embed|bbox_embed)\.", r"model.decoder.\1.", name)
        plain[name] = tensor
    return joined(renamed_by(plain, swapped(_HUGGING_FACE)))


def to_huggingface(state: State, *, num_points: list[int]) -> State:
    """Our names -> those of the modules of transformers 5."""
    renamed = renamed_by(split(state), _HUGGING_FACE)
    return renamed | points_scales(state, num_points, "model.decoder.layers.{}.encoder_attn.n_points_scale")


def to_huggingface_file(state: State, *, num_points: list[int]) -> State:
    """Our names -> those in files: the spelling of version 4, which version 5 also writes and reads."""
    return renamed_by(to_huggingface(state, num_points=num_points), SPELT_AS_V4)


def without_layers_beyond(state: State, last: int) -> State:
    """Without the decoder layers and heads after layer `last`, for code that cannot stop early."""

    def beyond(name: str) -> bool:
        match = re.match(r"decoder\.(?:layers|lqe_layers|dec_score_head|dec_bbox_head)\.(\d+)\.", name)
        return match is not None and int(match[1]) > last

    return {name: tensor for name, tensor in state.items() if not beyond(name)}


def points_scales(state: State, num_points: list[int], name: str) -> State:
    scale = torch.tensor([1 / count for count in num_points for _ in range(count)])
    layers = {int(match[1]) for key in state if (match := re.match(r"decoder\.layers\.(\d+)\.", key))}
    return {name.format(layer): scale.clone() for layer in sorted(layers)}


def swapped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs for the other direction."""
    return [(theirs, ours) for ours, theirs in pairs]


def renamed_by(state: Stored, pairs: Iterable[tuple[str, str]]) -> Stored:
    """Replace the beginning of each name by the first pair whose left side it is; other names stay."""
    rules = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)"), new) for old, new in pairs]

    def rename(name: str) -> str:
        for pattern, new in rules:
            if match := pattern.match(name):
                return new.format(*match.groups()) + name[match.end() :]
        return name

    return {rename(name): tensor for name, tensor in state.items()}


_PACKED = re.compile(r"(.*\.self_attn)\.in_proj_(weight|bias)$")
_UNPACKED = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def split(state: State) -> State:
    """Packed input projections -> query, key and value projections."""
    parts = {}
    for name, tensor in state.items():
        if match := _PACKED.match(name):
            for letter, part in zip("qkv", tensor.chunk(3)):
                parts[f"{match[1]}.{letter}_proj.{match[2]}"] = part.clone()
        else:
            parts[name] = tensor
    return parts


def joined(state: State) -> State:
    """Query, key and value projections -> packed input projections."""
    packed = {}
    for name, tensor in state.items():
        match = _UNPACKED.match(name)
        if match is None:
            packed[name] = tensor
        elif match[2] == "q":
            parts = [state[f"{match[1]}.{letter}_proj.{match[3]}"] for letter in "qkv"]
            packed[f"{match[1]}.in_proj_{match[3]}"] = torch.cat(parts)
    return packed


def huggingface_sizes(model: Stored, classes: list[str]) -> Stored:
    """The keys of `config.json` that transformers' RT-DETRv2 and D-FINE have in common; arguments as below."""
    backbone, neck = model["backbone"], model["neck"]
    return {
        "feat_strides": list(backbone["out_strides"]),
        "encoder_hidden_dim": neck["hidden_dim"],
        "encoder_ffn_dim": neck["dim_feedforward"],
        "encoder_attention_heads": neck["num_heads"],
        "encoder_layers": neck["num_encoder_layers"],
        "encode_proj_layers": list(neck["use_encoder_idx"]),
        "encoder_activation_function": neck["enc_act"],
        "activation_function": neck["act"],
        "positional_encoding_temperature": neck["pe_temperature"],
        "hidden_expansion": neck["expansion"],
        "d_model": model["hidden_dim"],
        "num_queries": model["num_queries"],
        "decoder_ffn_dim": model["dim_feedforward"],
        "num_feature_levels": len(model["num_points"]),
        "decoder_attention_heads": model["num_heads"],
        "decoder_activation_function": model["ffn_activation"],
        "decoder_method": "discrete" if model["cross_attn_method"] == "discrete" else "default",
        "decoder_offset_scale": model["offset_scale"],
        "dropout": model["dropout"],
        "attention_dropout": model["attention_dropout"],
        "activation_dropout": model["activation_dropout"],
        "num_denoising": model["num_denoising"],
        "label_noise_ratio": model["label_noise_ratio"],
        "box_noise_scale": model["box_noise_scale"],
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
        "freeze_backbone_batch_norms": backbone["freeze_norm"],
        "decoder_layers": model["eval_idx"] % model["num_layers"] + 1,
    }


def huggingface_config(model: Stored, classes: list[str]) -> Stored:
    """The `config.json` with which transformers builds the same network.

    Args:
        model: the resolved `model` node of a configuration.
        classes: class names in the order of the logits.

    Raises:
        ValueError: for what transformers has no words for.
    """
    backbone, neck, points = model["backbone"], model["neck"], model["num_points"]
    _refuse_unknown_to_huggingface(model)
    expansion = 1 if backbone["depth"] < 50 else 4
    widths = [width * expansion for width in backbone["widths"]]
    stages = [STRIDES.index(stride) for stride in backbone["out_strides"]]
    return {
        **huggingface_sizes(model, classes),
        "architectures": ["RTDetrV2ForObjectDetection"],
        "model_type": "rt_detr_v2",
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "embedding_size": backbone["widths"][0],
            "hidden_sizes": widths,
            "depths": list(backbone["blocks"] or BLOCKS[backbone["depth"]]),
            "layer_type": "basic" if expansion == 1 else "bottleneck",
            "out_features": [f"stage{stage + 1}" for stage in stages],
        },
        "encoder_in_channels": [widths[stage] for stage in stages],
        "decoder_in_channels": [neck["hidden_dim"]] * len(stages),
        "decoder_n_levels": len(points),
        "decoder_n_points": points[0],
        "learn_initial_query": model["learn_query_content"],
    }


def _refuse_unknown_to_huggingface(model: Stored) -> None:
    known = {
        "model.neck": str(model["neck"].get("_target_")).endswith(".HybridEncoder"),
        "model.backbone": str(model["backbone"].get("_target_")).endswith(".PResNet"),
        "model.num_points": len(set(model["num_points"])) == 1,
        "model.neck.depth_mult": model["neck"].get("depth_mult", 1) == 1,
        "model.query_select_method": model["query_select_method"] == "default",
    }
    if unknown := [key for key, value in known.items() if not value]:
        raise ValueError(
            f"transformers cannot express this {' and '.join(unknown)}; it supports ResNet-vd, one number of points, "
            "three blocks in a fusion and queries by best class. Use format=official"
        )
