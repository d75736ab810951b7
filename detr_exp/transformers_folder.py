"""A network as a folder for transformers: weights, configuration and image processor, and that it gives our numbers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omegaconf import OmegaConf

from detr_exp.terminal import say
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from torch import Tensor

    from detr_exp.inference.detector import Detector
    from detr_exp.protocols import Network

FILES = WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
# Resizes with antialiasing, as in training, which RfDetrImageProcessor does not; but only that makes masks of outputs.
PROCESSOR_OF = {"RfDetrForInstanceSegmentation": "RfDetrImageProcessor"}
USUAL_PROCESSOR = "RTDetrImageProcessor"
CLOSE = 1e-4  # scores and box sides in 0..1; float32 alone makes differences of about 1e-6


def write_in(folder: Path, detector: Detector) -> Values:
    """Write `model.safetensors`, `config.json` and `preprocessor_config.json`, as `save_pretrained` lays them out.

    Where transformers is installed, it loads them, and its outputs are compared with ours.

    Args:
        folder: without these files.
        detector: on the CPU.

    Returns:
        the content of `config.json`.

    Raises:
        ValueError: transformers has no such network, or gives other numbers; nothing is written.
    """
    from safetensors.torch import save

    if detector.fit.pads:
        raise ValueError(
            f"{detector.path} was trained with data.fit={detector.fit.name}, but the processors of transformers "
            "stretch images, and its networks attend to padding: use format=safetensors, or detr_exp.export "
            "export.preprocess=true"
        )
    detector.refuse_several_sizes("a folder for transformers")
    config, state = _for_transformers(detector)
    network = detector.network
    height, width = network.image_size
    mean, std = network.pixel_mean.flatten().tolist(), network.pixel_std.flatten().tolist()
    processor = {
        "image_processor_type": PROCESSOR_OF.get(config["architectures"][0], USUAL_PROCESSOR),
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": any(mean) or any(side != 1 for side in std),
        "image_mean": mean,
        "image_std": std,
        "do_pad": False,
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    write(folder / PROCESSOR, json.dumps(processor, indent=2) + "\n")
    try:
        _refuse_other_numbers(folder, network)
    except ValueError:
        for name in FILES:
            (folder / name).unlink()
        raise
    return config


def _for_transformers(detector: Detector) -> tuple[Values, dict[str, Tensor]]:
    """Configuration and weights in the words of transformers.

    Raises:
        ValueError: it has no such network.
    """
    from detr_exp.model import pretrained_dfine as dfine
    from detr_exp.model import pretrained_lwdetr as lwdetr
    from detr_exp.model import pretrained_rfdetr_transformers as rfdetr
    from detr_exp.model import pretrained_rtdetr as rtdetr
    from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2
    from detr_exp.model.backbone.vit_windowed import WindowedViT
    from detr_exp.model.decoder.dfine import DFineDecoder
    from detr_exp.model.decoder.rtdetr import RTDETRDecoder
    from detr_exp.model.pretrained_rfdetr import to_rfdetr
    from detr_exp.model.rfdetr import RFDETR
    from detr_exp.model.rtdetrv2 import RTDETRv2

    network, path = detector.network, detector.path
    model = cast(Values, OmegaConf.to_container(detector.cfg.model, resolve=True))
    if network.activation != "sigmoid":
        raise ValueError(
            f"{path} was trained with a background class (softmax), and transformers' detectors use sigmoids; train "
            "with loss=vfl, focal, bce, mal or ia_bce, or use format=safetensors"
        )
    layers = 0
    if isinstance(network, RFDETR | RTDETRv2):
        layers, queries, size = network.member.of(network.own)
        model |= {"num_queries": queries, "image_size": list(size)}
    if isinstance(network, RFDETR):
        model["num_layers"] = layers
        if isinstance(network.backbone, WindowedDinov2):  # positions are those of the weights, whatever the images
            model["backbone"]["position_grid"] = network.backbone.embedding.grid[0]
        state = network.state_dict()
        kept = {name: tensor for name, tensor in state.items() if not _is_beyond(name, layers)}
        if isinstance(network.backbone, WindowedViT):
            config = lwdetr.transformers_config(model, detector.classes)
            return config, lwdetr.to_huggingface(to_rfdetr(kept, config["num_queries"]))
        config = rfdetr.transformers_config(model, detector.classes)
        return config, to_rfdetr(kept, config["num_queries"])  # which transformers also writes
    if isinstance(network, RTDETRv2) and isinstance(network.decoder, (RTDETRDecoder, DFineDecoder)):
        names = dfine if isinstance(network.decoder, DFineDecoder) else rtdetr
        config = names.huggingface_config(model | {"eval_idx": layers - 1}, detector.classes)
        state = rtdetr.without_layers_beyond(network.state_dict(), layers - 1)
        return config, names.to_huggingface_file(state, num_points=model["num_points"])
    part = network.decoder if isinstance(network, RTDETRv2) else network
    raise ValueError(
        f"{path} holds {type(part).__name__}, and format=hf is for what transformers has: RT-DETR, RT-DETRv2 and "
        "D-FINE with their own decoders, LW-DETR, RF-DETR for boxes and masks; use format=safetensors"
    )


def _is_beyond(name: str, layers: int) -> bool:
    """Whether a tensor of an RF-DETR is of a layer after the first few."""
    match = re.match(r"(?:layers|mask_head\.blocks)\.(\d+)\.", name)
    return match is not None and int(match[1]) >= layers


def _refuse_other_numbers(folder: Path, network: Network) -> None:
    """Compare the outputs of transformers and ours on an image of noise.

    Raises:
        ValueError: they differ, or transformers misses weights.
    """
    import torch

    if importlib.util.find_spec("transformers") is None:
        say("transformers is not installed, so the folder was not compared with the checkpoint")
        return
    import transformers

    transformers.utils.logging.disable_progress_bar()
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architectures"][0]
    if (kind := getattr(transformers, named, None)) is None:
        say(f"transformers {transformers.__version__} has no {named}, so the folder was not compared")
        return
    try:
        peer, report = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # whatever it raises for values that it does not know
        raise ValueError(_of_transformers(" ".join(str(error).split())[:300])) from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := sorted(str(name) for kind_ in kinds for name in report[kind_]):
        raise ValueError(_of_transformers(f"{len(wrong)} tensors do not fit, such as {wrong[0]}"))
    images = torch.rand(1, 3, *network.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = peer.float().eval()(pixel_values=(images - network.pixel_mean) / network.pixel_std)
        ours = network(images).pred
    for wanted, found in ((ours.logits.sigmoid(), theirs.logits.sigmoid()), (ours.boxes, theirs.pred_boxes)):
        # in order of size, without the largest: queries that score alike may change places, or be others
        apart = (wanted.flatten().sort().values - found.flatten().sort().values).abs().quantile(0.9).item()
        if not apart < CLOSE:
            raise ValueError(_of_transformers(f"its outputs differ by {apart:.2g}"))


def _of_transformers(problem: str) -> str:
    return f"transformers does not build the same network ({problem}); use format=safetensors"
