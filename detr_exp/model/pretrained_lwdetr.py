"""LW-DETR: the names of its authors where they differ from RF-DETR's, and those of transformers (`lw_detr`).

What is not here (groups, queries, heads, decoder) is as in `pretrained_rfdetr`, which reads the files.
"""

from __future__ import annotations

from torch import Tensor

from detr_exp.model.backbone.vit_windowed import GRID, PATCH
from detr_exp.model.neck.projector import SCALES
from detr_exp.model.pretrained_rfdetr_transformers import KNOWN, decoder_config, refuse_unknown
from detr_exp.model.pretrained_rtdetr import joined, renamed_by, split, swapped
from detr_exp.tensor_files import Stored

State = dict[str, Tensor]

POSITION = "backbone.position"  # ours; no RF-DETR has it
_VIT, _PROJECTOR = "backbone.0.encoder", "backbone.0.projector"
MARK = f"{_VIT}.pos_embed"  # the authors'; likewise
# Ours and the authors' ({} is a number, and what follows a name stays as it is; for @ see `pretrained_rfdetr`).
# Parts of their `attn.qkv`, which only transformers has, are called as there.
NAMES = [
    (POSITION, MARK),
    ("backbone.patches", f"{_VIT}.patch_embed.proj"),
    *(
        (f"backbone.blocks.{{}}.{ours}", f"{_VIT}.blocks.{{}}.{theirs}")
        for ours, theirs in (
            ("qkv", "attn.qkv"),
            *((f"qkv@{index}", f"attn.{part}_proj") for index, part in enumerate("qkv")),
            ("q_bias", "attn.q_bias"),
            ("v_bias", "attn.v_bias"),
            ("out", "attn.proj"),
            ("scale1", "gamma_1"),
            ("scale2", "gamma_2"),
            ("fc1", "mlp.fc1"),
            ("fc2", "mlp.fc2"),
            ("norm1", "norm1"),
            ("norm2", "norm2"),
        )
    ),
    *(
        (f"neck.levels.{{}}.{ours}.{our_part}", f"{_PROJECTOR}.{theirs}.{part}")
        for ours, theirs in (
            ("mix.enter", "stages.{}.0.cv1"),
            ("mix.leave", "stages.{}.0.cv2"),
            ("mix.bottlenecks.{}.0", "stages.{}.0.m.{}.cv1"),
            ("mix.bottlenecks.{}.1", "stages.{}.0.m.{}.cv2"),
            ("resample.{}.0", "stages_sampling.{}.{}.0"),
        )
        for our_part, part in (("conv", "conv"), ("norm", "bn"))
    ),
    ("neck.levels.{}.resample.{}.1", f"{_PROJECTOR}.stages_sampling.{{}}.{{}}.1"),
    ("neck.levels.{}.resample.{}", f"{_PROJECTOR}.stages_sampling.{{}}.{{}}.0"),
    ("neck.levels.{}.norm", f"{_PROJECTOR}.stages.{{}}.1"),
]
# The authors' and those of transformers, without `model.` in front.
_LAYER, _SCALE = "backbone.backbone.encoder.layer.{}", "backbone.projector.scale_layers.{}"
_HUGGING_FACE = [
    (MARK, "backbone.backbone.embeddings.position_embeddings"),
    (f"{_VIT}.patch_embed.proj", "backbone.backbone.embeddings.projection"),
    *(
        (f"{_VIT}.blocks.{{}}.{theirs}", f"{_LAYER}.{other}")
        for theirs, other in (
            *((f"attn.{part}_bias", f"attention.{part}_proj.bias") for part in "qv"),
            *((f"attn.{part}_proj", f"attention.{part}_proj") for part in "qkv"),
            ("attn.proj", "attention.o_proj"),
            ("mlp", "intermediate"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("gamma_1", "gamma_1"),
            ("gamma_2", "gamma_2"),
        )
    ),
    *(
        (f"{_PROJECTOR}.{theirs}.{part}", f"{_SCALE}.{other}.{other_part}")
        for theirs, other in (
            *((f"stages.{{}}.0.cv{n}", f"projector_layer.conv{n}") for n in (1, 2)),
            *((f"stages.{{}}.0.m.{{}}.cv{n}", f"projector_layer.bottlenecks.{{}}.conv{n}") for n in (1, 2)),
            ("stages_sampling.{}.{}.{}", "sampling_layers.{}.layers.{}"),
        )
        for part, other_part in (("conv", "conv"), ("bn", "norm"))
    ),
    (f"{_PROJECTOR}.stages_sampling.{{}}.{{}}", f"{_SCALE}.sampling_layers.{{}}.layers"),
    (f"{_PROJECTOR}.stages.{{}}.1", f"{_SCALE}.layer_norm"),
    ("refpoint_embed", "reference_point_embed"),
    *(
        (f"transformer.decoder.layers.{{}}.{theirs}", f"decoder.layers.{{}}.{other}")
        for theirs, other in (
            ("self_attn.out_proj", "self_attn.o_proj"),
            ("norm1", "self_attn_layer_norm"),
            ("norm2", "cross_attn_layer_norm"),
            ("norm3", "layer_norm"),
            ("linear1", "mlp.fc1"),
            ("linear2", "mlp.fc2"),
        )
    ),
    ("transformer.decoder.norm", "decoder.layernorm"),
    ("transformer.decoder", "decoder"),
    *((f"transformer.{name}", name) for name in ("enc_output", "enc_output_norm")),
    *((f"transformer.enc_out_{kind}_embed", f"enc_out_{kind}_embed") for kind in ("class", "bbox")),
]
_BEFORE = [  # names in files of transformers' first LW-DETR, and now
    *(
        (f"{_LAYER}.attention.attention.{one}", f"{_LAYER}.attention.{one[0]}_proj")
        for one in ("query", "key", "value")
    ),
    (f"{_LAYER}.attention.output", f"{_LAYER}.attention.o_proj"),
]
_OUTSIDE = ("class_embed.", "bbox_embed.")  # what has no `model.` in front


def is_huggingface(state: State) -> bool:
    """Whether these are weights in the names of transformers, without `model.` in front."""
    return "backbone.backbone.encoder.layer.0.gamma_1" in state


def from_huggingface(state: State) -> State:
    """Names of transformers, without `model.` in front -> names of the authors."""
    return joined(renamed_by(renamed_by(state, _BEFORE), swapped(_HUGGING_FACE)))


def to_huggingface(state: State) -> State:
    """Names of the authors -> names of transformers."""
    renamed = renamed_by(split(state), _HUGGING_FACE)
    return {name if name.startswith(_OUTSIDE) else f"model.{name}": tensor for name, tensor in renamed.items()}


def transformers_config(model: Stored, classes: list[str]) -> Stored:
    """The `config.json` with which transformers builds the same network; see `pretrained_rfdetr_transformers`."""
    backbone, neck, size = model["backbone"], model["neck"], model["image_size"]
    refuse_unknown(model, KNOWN)
    if model.get("mask_head") is not None or neck["norm"] != "batch" or neck["squeeze"] != (backbone["width"] > 512):
        raise ValueError(
            "transformers cannot express this model: its LW-DETR predicts boxes only and has model.neck.norm=batch, "
            "and model.neck.squeeze=true only for a backbone of more than 512 channels. Use format=safetensors"
        )
    scales = [SCALES[level] for level in neck["levels"]]
    cells = sum(int(scale * (size[0] // PATCH)) * int(scale * (size[1] // PATCH)) for scale in scales)
    return {
        "architectures": ["LwDetrForObjectDetection"],
        "model_type": "lw_detr",
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "image_size": max(size),
            "pretrain_image_size": GRID[0] * PATCH,
            "patch_size": PATCH,
            "hidden_size": backbone["width"],
            "num_attention_heads": backbone["num_heads"],
            "num_hidden_layers": backbone["depth"],
            "num_windows": backbone["num_windows"] ** 2,
            "window_block_indices": list(backbone["windowed"]),
            "out_indices": [tap + 1 for tap in backbone["taps"]],  # states, of which the first is before all blocks
        },
        "projector_scale_factors": scales,
        "c2f_num_blocks": neck["num_bottlenecks"],
        **decoder_config(model, classes, min(model["num_queries"], cells)),
    }
