"""D-FINE weights in the names of their authors, which DEIM and RT-DETRv4 share, and of Hugging Face, and back.

As in `pretrained_rtdetr`, tensors are renamed, split or joined, never changed.
"""

from __future__ import annotations

import logging
import re
from itertools import product
from pathlib import Path

from torch import Tensor

from detr_exp.model.backbone import hgnetv2
from detr_exp.model.decoder.dfine import DFineDecoder, Traits
from detr_exp.model.pretrained_rtdetr import (
    SPELT_AS_V4,
    huggingface_sizes,
    joined,
    official_constants,
    points_scales,
    renamed_by,
    split,
    swapped,
)
from detr_exp.model.rtdetrv2 import RTDETRv2
from detr_exp.protocols import Network
from detr_exp.tensor_files import Stored

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# Constants that files contain, the same constants a second time, and what RT-DETRv4 only trains with.
_DERIVED = re.compile(
    r"^decoder\.(anchors|valid_mask)$|^decoder\.decoder\.(up|reg_scale)$|\.num_points_scale$|^encoder\.feature_projector\."
)


def _backbone(stem: str, stages: str, conv: str, norm: str) -> list[tuple[str, str]]:
    """Ours and theirs for HGNetV2; {} is a number."""
    block = "stages.{}.blocks.{}"
    places = [(f"stem.{name}", f"{stem}.{name}") for name in ("stem1", "stem2a", "stem2b", "stem3", "stem4")]
    places += [("stages.{}.downsample", f"{stages}.{{}}.downsample")]
    places += [
        (f"{block}.{ours}", f"{stages}.{{}}.blocks.{{}}.{theirs}")
        for ours, theirs in (
            ("aggregation_squeeze_conv", "aggregation.0"),
            ("aggregation_excitation_conv", "aggregation.1"),
            ("layers.{}.conv1", "layers.{}.conv1"),
            ("layers.{}.conv2", "layers.{}.conv2"),
            ("layers.{}", "layers.{}"),
        )
    ]
    kinds = (("conv", conv), ("norm", norm), ("act", "lab"))
    # a light layer is `conv1.conv`, a plain one only `conv`
    return [(f"backbone.{ours}.{a}", f"{theirs}.{b}") for (ours, theirs), (a, b) in product(places, kinds)]


OFFICIAL = [
    *_backbone("backbone.stem", "backbone.stages", "conv", "bn"),
    ("encoder.downsample_convs.{}.cv1", "encoder.downsample_convs.{}.0.cv1"),
    ("encoder.downsample_convs.{}.cv2", "encoder.downsample_convs.{}.0.cv2"),
    ("decoder.layers.{}", "decoder.decoder.layers.{}"),
    ("decoder.lqe_layers", "decoder.decoder.lqe_layers"),
]
_HUGGING_FACE = [
    *_backbone("model.backbone.model.embedder", "model.backbone.model.encoder.stages", "convolution", "normalization"),
    ("encoder.input_proj.{}.conv", "model.encoder_input_proj.{}.0"),
    ("encoder.input_proj.{}.norm", "model.encoder_input_proj.{}.1"),
    *(
        (f"encoder.encoder.{{}}.layers.{{}}.{ours}", f"model.encoder.aifi.{{}}.layers.{{}}.{theirs}")
        for ours, theirs in (
            ("self_attn.out_proj", "self_attn.o_proj"),
            ("self_attn", "self_attn"),
            ("linear1", "mlp.layers.0"),
            ("linear2", "mlp.layers.1"),
            ("norm1", "self_attn_layer_norm"),
            ("norm2", "final_layer_norm"),
        )
    ),
    ("encoder.lateral_convs", "model.encoder.lateral_convs"),
    ("encoder.downsample_convs.{}.cv1", "model.encoder.downsample_convs.{}.conv1"),
    ("encoder.downsample_convs.{}.cv2", "model.encoder.downsample_convs.{}.conv2"),
    *(
        (f"encoder.{blocks}.{{}}.{ours}", f"model.encoder.{blocks}.{{}}.{theirs}")
        for blocks in ("fpn_blocks", "pan_blocks")
        for ours, theirs in (
            ("cv1", "conv1"),
            ("cv2.0", "csp_rep1"),
            ("cv2.1", "conv2"),
            ("cv3.0", "csp_rep2"),
            ("cv3.1", "conv3"),
            ("cv4", "conv4"),
        )
    ),
    ("decoder.input_proj.{}.conv", "model.decoder_input_proj.{}.0"),
    ("decoder.input_proj.{}.norm", "model.decoder_input_proj.{}.1"),
    *(
        (f"decoder.layers.{{}}.{ours}", f"model.decoder.layers.{{}}.{theirs}")
        for ours, theirs in (
            ("self_attn.out_proj", "self_attn.o_proj"),
            ("self_attn", "self_attn"),
            ("cross_attn", "encoder_attn"),
            ("gateway", "gateway"),
            ("linear1", "mlp.layers.0"),
            ("linear2", "mlp.layers.1"),
            ("norm1", "self_attn_layer_norm"),
            ("norm3", "final_layer_norm"),
        )
    ),
    ("decoder.enc_output.proj", "model.enc_output.0"),
    ("decoder.enc_output.norm", "model.enc_output.1"),
    *((f"decoder.{part}", f"model.{part}") for part in ("denoising_class_embed", "enc_score_head", "enc_bbox_head")),
    ("decoder.dec_score_head", "model.decoder.class_embed"),
    ("decoder.dec_bbox_head", "model.decoder.bbox_embed"),
    *(
        (f"decoder.{part}", f"model.decoder.{part}")
        for part in ("query_pos_head", "pre_bbox_head", "lqe_layers", "up", "reg_scale")
    ),
]
# The spelling of transformers 4, which files have; (new, old).
_HUGGING_FACE_V4 = [
    (new.replace("mlp.fc1", "mlp.layers.0").replace("mlp.fc2", "mlp.layers.1"), old) for new, old in SPELT_AS_V4
]


def is_dfine(state: State) -> bool:
    """Whether these are weights of the kind of D-FINE, in anyone's names."""
    return any(".gateway.gate." in name for name in state)


def from_official(state: State) -> State:
    """Official names -> ours."""
    return renamed_by(without_derived(state), swapped(OFFICIAL))


def to_official(state: State, *, num_points: list[int], spatial_shapes: list[tuple[int, int]]) -> State:
    """Our names -> official ones, with the constants that such files contain; arguments as in `official_constants`."""
    twice = {f"decoder.decoder.{name}": state[f"decoder.{name}"] for name in ("up", "reg_scale")}
    return renamed_by(state, OFFICIAL) | twice | official_constants(state, num_points, spatial_shapes)


def from_huggingface(state: State) -> State:
    """Names of transformers, in either spelling -> ours."""
    current = renamed_by(without_derived(state), swapped(_HUGGING_FACE_V4))
    # Heads appear under a second name at the top.
    plain = {re.sub(r"^(class_embed|bbox_embed)\.", r"model.decoder.\1.", name): t for name, t in current.items()}
    return joined(renamed_by(plain, swapped(_HUGGING_FACE)))


def to_huggingface(state: State, *, num_points: list[int]) -> State:
    """Our names -> those of the modules of transformers 5, with the constants that its files contain."""
    scales = points_scales(state, num_points, "model.decoder.layers.{}.encoder_attn.num_points_scale")
    return renamed_by(split(state), _HUGGING_FACE) | scales


def to_huggingface_file(state: State, *, num_points: list[int]) -> State:
    """Our names -> those in files: the spelling of version 4, which version 5 also writes and reads."""
    return renamed_by(to_huggingface(state, num_points=num_points), _HUGGING_FACE_V4)


def refuse_other_activations(path: Path, origin: str, network: Network) -> None:
    """The files of D-FINE (relu) and of DEIM and RT-DETRv4 (silu) differ in nothing but their names.

    Args:
        path: of the file.
        origin: the code that wrote it.
        network: that is about to get its weights.

    Raises:
        ValueError: the network has another activation than the file's name says.
    """
    if not origin.endswith("D-FINE") or not isinstance(network, RTDETRv2):
        return
    if not isinstance(network.decoder, DFineDecoder) or network.decoder.traits != Traits():
        return
    chosen, name = network.decoder.activations, path.name.lower()
    known = "relu" if origin.startswith("Hugging Face") or re.search(r"d-?fine", name) else None
    known = "silu" if re.search(r"deim|rt-?(detr)?v4", name) else known
    if known is None:
        logger.warning("%s does not say with which activation it was trained; taken to be %s", path, chosen[0])
    elif chosen != (known, known):
        raise ValueError(
            f"model.weights={path} was trained with {known}, as its name says, but the network has "
            f"{' and '.join(dict.fromkeys(chosen))}; set model.ffn_activation={known} model.head_activation={known}"
        )


def official_name(decoder: DFineDecoder) -> str:
    """A name for a file in official names, which says what only names say; see `refuse_other_activations`.

    Raises:
        ValueError: the official code has one activation for layers and perceptrons.
    """
    names = {("relu", "relu"): "dfine.pth", ("silu", "silu"): "deim_dfine.pth"}
    if decoder.activations not in names or decoder.traits != Traits():
        raise ValueError(
            f"the decoder has {' in its layers and '.join(decoder.activations)} in its perceptrons, and official files "
            "are of networks with relu (D-FINE) or silu (DEIM) in both, and model/decoder=dfine; use format=safetensors"
        )
    return names[decoder.activations]


def without_derived(state: State) -> State:
    """Without constants, and without what only training uses in the code of others."""
    return {name: tensor for name, tensor in state.items() if not _DERIVED.search(name)}


def huggingface_config(model: Stored, classes: list[str]) -> Stored:
    """The `config.json` with which transformers builds the same network.

    Args:
        model: the resolved `model` node of a configuration.
        classes: class names in the order of the logits.

    Raises:
        ValueError: for what transformers has no words for.
    """
    backbone, neck, points = model["backbone"], model["neck"], list(model["num_points"])
    _refuse_unknown_to_huggingface(model)
    (middle, width), stages, num_layers = hgnetv2.SIZES[hgnetv2.OF_RTDETR.get(backbone["size"], backbone["size"])]
    outputs = [hgnetv2.STRIDES.index(stride) for stride in backbone["out_strides"]]
    used = stages[: outputs[-1] + 1]
    inside, out, blocks, light, kernels = (list(column) for column in zip(*used))
    return {
        **huggingface_sizes(model, classes),
        "architectures": ["DFineForObjectDetection"],
        "model_type": "d_fine",
        "backbone_config": {
            "model_type": "hgnet_v2",
            "stem_channels": [3, middle, width],
            "stage_in_channels": [width, *out[:-1]],
            "stage_mid_channels": inside,
            "stage_out_channels": out,
            "stage_num_blocks": blocks,
            "stage_downsample": [index > 0 for index in range(len(used))],
            "stage_downsample_strides": [2] * len(used),
            "stage_light_block": light,
            "stage_kernel_size": kernels,
            "stage_numb_of_layers": [num_layers] * len(used),
            "hidden_sizes": out,
            "depths": blocks,
            "use_learnable_affine_block": backbone.get("affine", False),
            "out_indices": [index + 1 for index in outputs],
        },
        "encoder_in_channels": [out[index] for index in outputs],
        "depth_mult": neck["depth_mult"],
        "decoder_in_channels": [neck["hidden_dim"]] * len(outputs),
        "decoder_n_points": points,
        "max_num_bins": model["num_bins"],
        "up": float(model["edge_bound"]),
        "reg_scale": float(model["edge_scale"]),
    }


def _refuse_unknown_to_huggingface(model: Stored) -> None:
    backbone, neck = model["backbone"], model["neck"]
    known = {
        "model.decoder": all(model.get(key, value) == value for key, value in Traits()._asdict().items()),
        "model.neck": (neck.get("fusion"), neck.get("lateral_act"), neck.get("down")) == ("elan", False, "separable"),
        "model.backbone": str(backbone.get("_target_")).endswith(".HGNetv2"),
        "model.num_points": len(model["num_points"]) == len(backbone.get("out_strides", ())),
        "model.ffn_activation": model["ffn_activation"] == "relu",
        "model.head_activation": model["head_activation"] == "relu",
        "model.query_select_method": model["query_select_method"] == "default",
    }
    if unknown := [key for key, value in known.items() if not value]:
        raise ValueError(
            f"transformers cannot express this {' and '.join(unknown)}; its D-FINE has HGNetV2, D-FINE's encoder, "
            "perceptrons with relu (those of DEIM have silu), and queries by best class. Use format=safetensors"
        )
