"""Make a file for other programs: `python -m detr_exp.export checkpoint=... format=onnx`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.deploy.export import export_in
from detr_exp.terminal import say

USAGE = """\
Write a file that runs without this project, and compare its outputs with those of the checkpoint.

  python -m detr_exp.export checkpoint=RUN_FOLDER                              ONNX, any batch size
  python -m detr_exp.export checkpoint=weights.pth format=openvino export.half=true
  python -m detr_exp.export checkpoint=RUN_FOLDER export.preprocess=true export.postprocess=true   uint8 in, boxes out

  checkpoint              a file, a run folder (its best checkpoint) or a run id
  at                      at.layers=2 at.queries=100 at.image_size=[320,320]: a smaller member of the network, without
                          training; or at.name=..., of a point that detr_exp.pareto has found
  format                  onnx, torchscript, openvino, tensorrt
  export.batch_size       null: any batch size; a number: exactly this batch size
  export.half             true: float16
  export.sampling         discrete: for engines without grid_sample
  export.preprocess       true: the input is a uint8 image of any size, resized in the file
  export.postprocess      true: the output is scores, labels and boxes in pixels, highest score first
  export.images           number of images, of the split or of the folder export.source, on which outputs are compared
  export.max_difference   largest difference of scores and boxes in 0..1, in 99 % of the queries; null: only shown
  export.max_map_drop     largest allowed loss of mAP on the split; null: not measured, the data are not needed
  data.split              val, train or test; also data, data.root, data.num_workers
  trainer/hardware        device for tracing: auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets           custom packages that the checkpoint's config may name

Norms are always folded into convolutions, and parts used only in training are removed. The file contains the names of
the classes and a description of inputs and outputs, as JSON under "detr_exp" (TensorRT: in a file beside it). A file
that fails the check is saved as model_rejected.*, and the exit status is 1.
"""


def export(cfg: DictConfig) -> None:
    """Export into Hydra's output folder."""
    path = export_in(Path(HydraConfig.get().runtime.output_dir), cfg)
    say(f"written to {path}")


def main() -> None:
    cli.main(export, "export", USAGE)


if __name__ == "__main__":
    main()
