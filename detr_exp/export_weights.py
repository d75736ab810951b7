"""Weights for other code: `python -m detr_exp.export_weights checkpoint=... format=safetensors|hf|official`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli, transformers_folder
from detr_exp.model_card import model_card, refuse_licence
from detr_exp.published.push import CARD, push, refuse_push, signed
from detr_exp.terminal import say
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from detr_exp.inference.detector import Detector

USAGE = """\
Write the weights of a checkpoint in another format.

  python -m detr_exp.export_weights checkpoint=RUN_FOLDER format=safetensors     the checkpoint, without pickle
  python -m detr_exp.export_weights checkpoint=RUN_FOLDER format=hf              for transformers' from_pretrained
  python -m detr_exp.export_weights checkpoint=RUN_FOLDER format=hf push=owner/name   and to the Hugging Face hub
  python -m detr_exp.export_weights checkpoint=weights.pth format=official       for the authors' code

  checkpoint          a file, a run folder (its best checkpoint) or a run id
  format              safetensors: any network, read by all commands | hf: RT-DETR, RT-DETRv2, D-FINE, LW-DETR and
                      RF-DETR with a model card | official: RT-DETR, RT-DETRv2, D-FINE, DEIMv2, EdgeCrafter
  at                  at.layers=2 at.queries=100 at.image_size=[320,320], or at.name=...: with format=hf a smaller
                      member of the network
  licence             of these weights, for the model card, such as apache-2.0; null: the card says that it is unknown
  push                repository owner/name on the hub, created if it is not there; needs HF_TOKEN
  private             who sees a repository that push creates: true: you alone
  replace             true: push also into a repository that has such files; its history keeps the earlier ones
  allow_targets       custom packages that the checkpoint's config may name
"""
FORMATS = ("safetensors", "hf", "official")
IN_FOLDER = (*transformers_folder.FILES, CARD)  # of format=hf
FORMER = {"huggingface": "hf"}  # names of formats in earlier versions


def export_weights(cfg: DictConfig) -> None:
    """Export into Hydra's output folder, and to the hub if `push` names a repository there."""
    _refuse_settings(cfg)
    if cfg.push is not None:
        refuse_push(cfg.push, IN_FOLDER, replace=cfg.replace)
    path = export_weights_in(Path(HydraConfig.get().runtime.output_dir), cfg)
    say(f"written to {path}")
    if cfg.push is not None:
        say(f"pushed to {push(path, cfg.push, IN_FOLDER, private=cfg.private)}")


def export_weights_in(folder: Path, cfg: DictConfig) -> Path:
    """Write the weights into a folder.

    Args:
        folder: made if absent; no file in it is overwritten.
        cfg: see `conf/export_weights.yaml`.

    Returns:
        the folder for transformers, or the file in it.

    Raises:
        ValueError: the checkpoint cannot be read, the format cannot express its network, or a file is in the way.
    """
    from detr_exp.inference.detector import find, load

    _refuse_settings(cfg)
    if cfg.format == "safetensors":
        return write_safetensors(folder, find(cfg.checkpoint), cfg.allow_targets)
    detector = load(cfg.checkpoint, allow_targets=cfg.allow_targets, at=cfg.get("at"))
    if detector.channels != 3:
        raise ValueError(
            f"{detector.path} sees {detector.channels} channels of an image, but networks of format={cfg.format} see "
            "three; use format=safetensors, or detr_exp.export"
        )
    detector.network.cpu()
    if cfg.format == "official":
        return write_official(folder, detector)
    return write_hf(folder, detector, cfg.get("licence"), cfg.get("push"))


def _refuse_settings(cfg: DictConfig) -> None:
    """Refuse what can be refused before the checkpoint is opened; names of formats in earlier versions are replaced."""
    cfg.format = FORMER.get(cfg.format, cfg.format)
    if cfg.format not in FORMATS:
        raise ValueError(f"format is {cfg.format!r}; use one of {', '.join(FORMATS)}")
    if cfg.format != "hf" and any(value is not None for value in (cfg.get("at") or {}).values()):
        raise ValueError(
            f"at is for format=hf, and format={cfg.format} holds the whole network: format=hf, or leave at out"
        )
    for key in ("push", "licence"):
        if cfg.get(key) is not None and cfg.format != "hf":
            raise ValueError(f"{key}={cfg[key]} is for format=hf, and the format is {cfg.format}; use format=hf")
    refuse_licence(cfg.get("licence"))


def _refuse_present(folder: Path, *names: str) -> None:
    """Raises: ValueError: one of the files that are about to be written is there."""
    if there := [name for name in names if os.path.lexists(folder / name)]:
        raise ValueError(
            f"{folder} has {', '.join(there)} already, and no file is overwritten; use another folder: "
            "hydra.run.dir=FOLDER"
        )


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
    name = checkpoint.with_suffix(files.SAFE).name
    _refuse_present(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    files.save_safetensors(state, folder / name)
    return folder / name


def write_hf(folder: Path, detector: Detector, licence: str | None, repo: str | None) -> Path:
    """What transformers and the hub read: weights, `config.json`, `preprocessor_config.json` and the model card."""
    from detr_exp.trainer import checkpoint as files

    _refuse_present(folder, *IN_FOLDER)
    config = transformers_folder.write_in(folder, detector)
    card = model_card(files.load(detector.path, needs=()), detector, config, licence, repo)
    write(folder / CARD, signed(card))
    return folder


def write_official(folder: Path, detector: Detector) -> Path:
    """A file with the key `model`, as the code of RT-DETRv2, D-FINE, DEIM, DEIMv2 and EdgeCrafter reads it.

    Its name says with which activation the network was trained, as those of published files do.

    Raises:
        ValueError: the network is not RT-DETR, RT-DETRv2 or D-FINE with its own decoder.
    """
    import torch

    from detr_exp.model import pretrained_deimv2, pretrained_dfine, pretrained_ec, pretrained_rtdetr
    from detr_exp.model.decoder.dfine import DFineDecoder
    from detr_exp.model.decoder.pose import PoseDecoder
    from detr_exp.model.decoder.rtdetr import RTDETRDecoder
    from detr_exp.model.rtdetrv2 import RTDETRv2

    network = detector.network
    known = (RTDETRDecoder, DFineDecoder, PoseDecoder)
    if not isinstance(network, RTDETRv2) or not isinstance(network.decoder, known):
        part = network.decoder if isinstance(network, RTDETRv2) else network
        raise ValueError(
            f"{detector.path} holds {type(part).__name__}, and format=official is only for RT-DETR, D-FINE, DEIMv2 "
            "and EdgeCrafter with their own decoders; give a checkpoint of model=rtdetrv2 or model=dfine, or use "
            "format=safetensors"
        )
    state = network.state_dict()
    constants: Values = {"num_points": list(detector.cfg.model.num_points), "spatial_shapes": network.spatial_shapes()}
    if isinstance(network.decoder, DFineDecoder):
        names = pretrained_ec if network.decoder.traits == pretrained_ec.TRAITS else pretrained_dfine
        names = pretrained_deimv2 if network.decoder.activations[0] == "swiglu" else names
        name, state = names.official_name(network.decoder), names.to_official(state, **constants)
    elif isinstance(network.decoder, PoseDecoder):
        name, state = pretrained_ec.official_name(network.decoder), pretrained_ec.to_official(state, **constants)
    else:
        name, state = "rtdetrv2.pth", pretrained_rtdetr.to_official(state, **constants)
    _refuse_present(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / name, lambda file: torch.save({"model": state}, file))
    return folder / name


def main() -> None:
    cli.main(export_weights, "export_weights", USAGE)


if __name__ == "__main__":
    main()
