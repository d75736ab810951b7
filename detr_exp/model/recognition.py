"""Which network some tensors belong to, as overrides that choose it."""

from __future__ import annotations

from torch import Tensor

from detr_exp.model.backbone import hgnetv2
from detr_exp.model.backbone.presnet import BLOCKS

State = dict[str, Tensor]

# RF-DETR: task, channels and patch size of the backbone, decoder layers -> position grid -> option of `model`.
RFDETR = {
    ("rfdetr", 384, 16, 2): {24: "rfdetr"},
    ("rfdetr", 384, 16, 3): {32: "rfdetr_small"},
    ("rfdetr", 384, 16, 4): {36: "rfdetr_medium", 44: "rfdetr_large"},
    ("rfdetr", 384, 14, 3): {37: "rfdetr_base"},
    ("rfdetr_seg", 384, 12, 4): {26: "rfdetr_seg", 32: "rfdetr_seg_small"},
    ("rfdetr_seg", 384, 12, 5): {36: "rfdetr_seg_medium", 42: "rfdetr_seg_large"},
    ("rfdetr_seg", 384, 12, 6): {52: "rfdetr_seg_xlarge", 64: "rfdetr_seg_2xlarge"},
    ("rfdetr_keypoint", 384, 12, 4): {48: "rfdetr_keypoint"},
}
# LW-DETR: channels and blocks of the backbone, channels of the decoder -> option of `model`.
LWDETR = {
    (192, 6, 256): "lwdetr_tiny",
    (192, 10, 256): "lwdetr_small",
    (384, 10, 256): "lwdetr_medium",
    (384, 10, 384): "lwdetr_large",
    (768, 10, 384): "lwdetr_xlarge",
}
PATCHES = ("backbone.embedding.patches.weight", "backbone.patches.weight")  # every RF-DETR and every LW-DETR has one
# RT-DETR: option of `model` -> its values of what the shapes determine. Shapes do not tell the number of heads.
SIZES = {
    "rtdetrv2": {
        "hidden_dim": 256,
        "num_layers": 3,
        "dim_feedforward": 1024,
        "num_points": "[4,4,4]",
        "neck.hidden_dim": 256,
        "neck.dim_feedforward": 1024,
        "neck.num_encoder_layers": 1,
        "neck.expansion": 0.5,
    }
}
SIZES["rtdetrv2_tiny"] = SIZES["rtdetrv2"] | dict.fromkeys(("hidden_dim", "neck.hidden_dim"), 128)
SIZES["rtdetrv2_tiny"] |= dict.fromkeys(("dim_feedforward", "neck.dim_feedforward"), 512)
HEADS = {"rtdetrv2": 8, "rtdetrv2_tiny": 4}
# D-FINE: option of `model` -> backbone, and values of what the shapes determine; in fusion blocks channels and blocks.
FUSED = ("neck.expansion", "neck.depth_mult")
DFINE_KEYS = ("hidden_dim", "num_layers", "dim_feedforward", "edge_scale", "neck.hidden_dim", "neck.dim_feedforward")
DFINE = {
    name: (backbone, dict(zip((*DFINE_KEYS, *FUSED), values)))
    for name, backbone, *values in (
        ("dfine_n", "hgnetv2_b0", 128, 3, 512, 4, 128, 512, 21, 2),
        ("dfine_s", "hgnetv2_b0", 256, 3, 1024, 4, 256, 1024, 64, 1),
        ("dfine_m", "hgnetv2_b2", 256, 4, 1024, 4, 256, 1024, 128, 2),
        ("dfine_l", "hgnetv2_b4", 256, 6, 1024, 4, 256, 1024, 128, 3),
        ("dfine_x", "hgnetv2_b5", 256, 6, 1024, 8, 384, 2048, 192, 3),
        ("dfine_tiny", "tiny", 96, 3, 256, 4, 96, 256, 24, 1),
    )
}
# DEIMv2: channels, layers and feed-forward channels of the decoder -> option of `model`.
DEIMV2 = {
    (64, 3, 160): "deimv2_atto",
    (96, 3, 256): "deimv2_femto",
    (112, 3, 320): "deimv2_pico",
    (128, 3, 512): "deimv2_n",
    (192, 4, 512): "deimv2_s",
    (256, 4, 512): "deimv2_m",
    (224, 4, 1792): "deimv2_l",
    (256, 6, 2048): "deimv2_x",
}
# EdgeCrafter: channels of the transformer, feed-forward channels of the decoder -> the end of its options of `model`.
EC = {(192, 512): "s", (256, 1024): "m", (256, 512): "m", (384, 1024): "l", (384, 2048): "x"}
# ResNet-vd: option of `model/backbone` -> widths, blocks, and whether the blocks are bottlenecks.
RESNETS = {f"r{depth}vd": ([64, 128, 256, 512], list(BLOCKS[depth]), depth >= 50) for depth in BLOCKS}
RESNETS["tiny"] = ([32, 64, 128, 256], [1, 1, 1, 1], False)


def network_of(state: State) -> str:
    """Overrides that choose the network of these tensors; empty where it is not known.

    Args:
        state: in our names; complete for this network.
    """
    if patches_of(state):
        return _rfdetr(state)
    try:
        if "decoder.layers.0.norm1.scale" in state:
            wide, narrow = state["decoder.layers.0.linear1.weight"].shape
            name = DEIMV2.get((narrow, _count(state, "decoder.layers."), wide))
            return f"model={name}" if name else ""
        if "backbone.body.stem.0.conv.weight" in state:
            size = EC.get((state["backbone.body.cls_token"].shape[-1], len(state["decoder.layers.0.linear1.weight"])))
            kind = "ecseg" if "mask_head.bias" in state else "ecdet"
            kind = "ecpose" if "decoder.point_embed.weight" in state else kind
            return f"model={kind}_{size}" if size else ""
        if "decoder.layers.0.gateway.gate.weight" in state:
            return _dfine(state)
        model = "rtdetrv2_tiny" if len(state["decoder.enc_output.proj.weight"]) == 128 else "rtdetrv2"
        backbone, sizes = _backbone(state), _sizes(state, HEADS[model])
    except KeyError:  # of another family
        return ""
    changed = [f"model.{key}={value}" for key, value in sizes.items() if value != SIZES[model][key]]
    return " ".join([f"model={model}", f"model/backbone={backbone}", *changed]) if backbone else ""


def patches_of(state: State) -> str:
    """The name of the first weights of an RF-DETR or LW-DETR; empty for others."""
    return next((name for name in PATCHES if name in state), "")


def task(state: State) -> str:
    """What an RF-DETR predicts: the option of `model` for the smallest network that does; or that of LW-DETR."""
    if PATCHES[1] in state:
        return "lwdetr_tiny"
    for part, name in (("mask_head.", "rfdetr_seg"), ("keypoint_head.", "rfdetr_keypoint")):
        if any(key.startswith(part) for key in state):
            return name
    return "rfdetr"


def _rfdetr(state: State) -> str:
    width, _, patch_size, _ = state[patches_of(state)].shape
    if PATCHES[1] in state:
        name = LWDETR.get((width, _count(state, "backbone.blocks."), len(state["norm.weight"])), "")
        return name and f"model={name}"
    alike = RFDETR.get((task(state), width, patch_size, _count(state, "layers.")), {})
    grid = state["backbone.embedding.position"].shape[-1]
    return f"model={alike.get(grid, next(iter(alike.values())))}" if alike else ""


def _dfine(state: State) -> str:
    scale, block = state["decoder.reg_scale"], "encoder.pan_blocks.0.cv2.0."
    values = (
        len(state["decoder.enc_output.proj.weight"]),
        _count(state, "decoder.layers."),
        len(state["decoder.layers.0.linear1.weight"]),
        4 if scale.is_meta else round(scale.abs().item(), 4),
        len(state["encoder.lateral_convs.0.conv.weight"]),
        len(state["encoder.encoder.0.layers.0.linear1.weight"]),
        len(state[f"{block}conv1.conv.weight"]),
        _count(state, f"{block}bottlenecks."),
    )
    found, backbone = dict(zip((*DFINE_KEYS, *FUSED), values)), _backbone(state)
    others = {
        name: [f"model/backbone={backbone}"] * (backbone != usual)
        + [f"model.{key}={_of_fused(key, found)}" for key, value in found.items() if value != sizes[key]]
        for name, (usual, sizes) in DFINE.items()
    }
    model = min(others, key=lambda name: len(others[name]))
    return " ".join([f"model={model}", *others[model]]) if backbone else ""


def _of_fused(key: str, found: dict[str, float]) -> float:
    """The value of a key, from the channels and blocks that it makes."""
    if key == FUSED[0]:
        return 2 * found[key] / found["neck.hidden_dim"]
    return round(found[key] / 3, 2) if key == FUSED[1] else found[key]


def _sizes(state: State, num_heads: int) -> dict[str, object]:
    neck = len(state["encoder.lateral_convs.0.conv.weight"])
    offsets = len(state["decoder.layers.0.cross_attn.sampling_offsets.bias"])
    levels = _count(state, "decoder.input_proj.")
    return {
        "hidden_dim": len(state["decoder.enc_output.proj.weight"]),
        "num_layers": _count(state, "decoder.layers."),
        "dim_feedforward": len(state["decoder.layers.0.linear1.weight"]),
        "num_points": str([offsets // (2 * num_heads * levels)] * levels).replace(" ", ""),
        "neck.hidden_dim": neck,
        "neck.dim_feedforward": len(state["encoder.encoder.0.layers.0.linear1.weight"]),
        "neck.num_encoder_layers": _count(state, "encoder.encoder.0.layers."),
        "neck.expansion": len(state["encoder.pan_blocks.0.conv1.conv.weight"]) / neck,
    }


def _backbone(state: State) -> str:
    """The option of `model/backbone`, and its widths and blocks where they are not the published ones."""
    if "backbone.stem.stem4.conv.weight" in state:
        return _hgnet(state)
    if any(name.startswith("backbone.body.") for name in state):
        return "timm"
    stages = [f"backbone.res_layers.{index}.blocks." for index in range(_count(state, "backbone.res_layers."))]
    widths = [len(state[f"{stage}0.branch2a.conv.weight"]) for stage in stages]
    blocks = [_count(state, stage) for stage in stages]
    is_deep = "backbone.res_layers.0.blocks.0.branch2c.conv.weight" in state
    sizes = f"model.backbone.widths={widths} model.backbone.blocks={blocks}".replace(", ", ",")
    other = f"{'r50vd' if is_deep else 'r18vd'} {sizes}" if stages else ""
    return next((name for name, known in RESNETS.items() if known == (widths, blocks, is_deep)), other)


def _hgnet(state: State) -> str:
    places = ("stem.stem4.conv.weight", "stages.0.blocks.0.aggregation_excitation_conv.conv.weight")
    widths = [len(state[f"backbone.{place}"]) for place in places]
    size = next((size for size, ((_, stem), stages, _) in hgnetv2.SIZES.items() if [stem, stages[0][1]] == widths), "")
    if "decoder.layers.0.norm2.weight" in state:  # of RT-DETR
        size = {theirs: ours for ours, theirs in hgnetv2.OF_RTDETR.items()}.get(size, size)
    return size and f"hgnetv2_{size.lower()}"


def _count(state: State, prefix: str) -> int:
    """Number of modules in a list of modules."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})
