"""Names of ResNet-vd and HGNetV2 in timm, whose networks are the same."""

from detr_exp.model.backbone.hgnetv2 import to_our_names


def timm_name(name: str) -> str:
    """A parameter of ours in timm's ResNet-d."""
    stem = {"1": ("0", "1"), "2": ("3", "4")}
    parts = name.split(".")
    if parts[0] == "conv1":
        number, kind = parts[1][-1], parts[2] == "norm"
        place = ("bn1" if kind else "conv1.6") if number == "3" else f"conv1.{stem[number][kind]}"
        return f"{place}.{parts[-1]}"
    where = f"layer{int(parts[1]) + 1}.{parts[3]}"
    kind = parts[-2] == "norm"
    if parts[4] == "short":
        return f"{where}.downsample.{1 + kind}.{parts[-1]}"
    return f"{where}.{'bn' if kind else 'conv'}{'abc'.index(parts[4][-1]) + 1}.{parts[-1]}"


def hgnet_name(name: str) -> str:
    """A parameter of timm's HGNetV2 in ours."""
    name = name.replace("stages_", "stages.").replace("aggregation.0", "aggregation_squeeze_conv")
    return to_our_names(name.replace("aggregation.1", "aggregation_excitation_conv"))
