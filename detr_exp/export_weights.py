"""Weights for other code: `python -m detr_exp.export_weights checkpoint=... format=official|huggingface`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.terminal import say
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from detr_exp.inference.detector import Detector
    from detr_exp.model.decoder.rtdetr import RTDETRDecoder
    from detr_exp.model.rtdetrv2 import RTDETRv2

USAGE = """\
Write the weights of a checkpoint in another format.

  python -m detr_exp.export_weights checkpoint=RUN_FOLDER format=safetensors     the checkpoint, without pickle
  python -m detr_exp.export_weights checkpoint=RUN_FOLDER format=huggingface     for transformers' from_pretrained
  python -m detr_exp.export_weights checkpoint=weights.pth format=official       for the authors' code

  checkpoint          a file, a run folder (its best checkpoint) or a run id
  format              safetensors: any network, read by all commands | huggingface, official: RT-DETR and RT-DETRv2
  allow_targets       custom packages that the checkpoint's config may name
"""
FORMATS = ("safetensors", "huggingface", "official")


def export_weights(cfg: DictConfig) -> None:
    """Export into Hydra's output folder."""
    path = export_weights_in(Path(HydraConfig.get().runtime.output_dir), cfg)
    say(f"written to {path}")


def export_weights_in(folder: Path, cfg: DictConfig) -> Path:
    """Write the weights into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/export_weights.yaml`.

    Returns:
        the folder for transformers, or the file in it.

    Raises:
        ValueError: the checkpoint cannot be read, or the format cannot express its network.
    """
    from detr_exp.inference.detector import find, load
    from detr_exp.model.decoder.rtdetr import RTDETRDecoder
    from detr_exp.model.rtdetrv2 import RTDETRv2

    if cfg.format not in FORMATS:
        raise ValueError(f"format is {cfg.format!r}; use one of {', '.join(FORMATS)}")
    if cfg.format == "safetensors":
        return write_safetensors(folder, find(cfg.checkpoint), cfg.allow_targets)
    detector = load(cfg.checkpoint, allow_targets=cfg.allow_targets)
    network = detector.network
    if not isinstance(network, RTDETRv2) or not isinstance(network.decoder, RTDETRDecoder):
        part = network.decoder if isinstance(network, RTDETRv2) else network
        raise ValueError(
            f"{detector.path} holds {type(part).__name__}, and format={cfg.format} is only for RT-DETR with its own "
            "decoder; give a checkpoint of model=rtdetrv2, or use format=safetensors"
        )
    network.cpu()
    write = {"huggingface": write_huggingface, "official": write_official}[cfg.format]
    return write(folder, detector, network)


def write_safetensors(folder: Path, checkpoint: Path, allow_targets: Sequence[str] = ()) -> Path:
    """`<name>.safetensors`: what inference needs of a checkpoint, tensors and JSON only; adapters are merged."""
    from detr_exp.inference.detector import load
    from detr_exp.trainer import checkpoint as files

    state = files.load(checkpoint, needs=("kind",))
    if state["kind"] != "inference":
        raise ValueError(f"{checkpoint} is a training checkpoint; give the folder of its run, or {files.BEST_TOTAL}")
    if state.pop("base", None) is not None:
        state["model"] = load(checkpoint, allow_targets=allow_targets).network.cpu().state_dict()
        state["config"]["model"].pop("adapter", None)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / checkpoint.with_suffix(files.SAFE).name
    files.save_safetensors(state, path)
    return path


def write_huggingface(folder: Path, detector: Detector, network: RTDETRv2) -> Path:
    """`model.safetensors`, `config.json` and `preprocessor_config.json`, as `save_pretrained` lays them out."""
    from safetensors.torch import save as serialised

    from detr_exp.model.pretrained_rtdetr import huggingface_config, to_huggingface, without_layers_beyond

    model = cast(Values, OmegaConf.to_container(detector.cfg.model, resolve=True))
    config = huggingface_config(model, detector.classes)
    state = without_layers_beyond(network.state_dict(), cast("RTDETRDecoder", network.decoder).eval_idx)
    state = to_huggingface(state, num_points=model["num_points"])
    height, width = network.image_size
    preprocessor = {
        "image_processor_type": "RTDetrImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "do_pad": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write(folder / "model.safetensors", serialised(tensors, {"format": "pt"}))
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=2) + "\n")
    return folder


def write_official(folder: Path, detector: Detector, network: RTDETRv2) -> Path:
    """`rtdetrv2.pth` with the key `model`, as the official code's tuning and export read it."""
    import torch

    from detr_exp.model.pretrained_rtdetr import to_official

    state = to_official(
        network.state_dict(), num_points=list(detector.cfg.model.num_points), spatial_shapes=network.spatial_shapes()
    )
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "rtdetrv2.pth", lambda file: torch.save({"model": state}, file))
    return folder / "rtdetrv2.pth"


def main() -> None:
    cli.main(export_weights, "export_weights", USAGE)


if __name__ == "__main__":
    main()
