"""Look at a data set before training on it: `python -m detr_exp.check_data data.root=... [data=coco]`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.data.problems import listed
from detr_exp.terminal import say
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from torch import Tensor

    from detr_exp.data.dataset import DataSet
    from detr_exp.data.inspection import Finding, Inspection

USAGE = """\
Read a whole data set without training; list its contents and its errors.

  python -m detr_exp.check_data data.root=FOLDER                        any known layout
  python -m detr_exp.check_data data=coco data.root=FOLDER data.train.annotations=a.json data.train.images=photos
  python -m detr_exp.check_data data.root=FOLDER data/augment=rfdetr    draws images with this augmentation
  python -m detr_exp.check_data data.root=FOLDER json=found.json        for programs

  data, data.*      as in training
  image_size        [height,width] of the network's input
  num_queries       of the network
  images            number of training images drawn after augmentation; 0: none
  json              file for the results
  seed              of the augmentation

The exit status is 0 if training could start, else 2.
"""


def check_data(cfg: DictConfig) -> None:
    """Check into Hydra's output folder."""
    check_data_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def check_data_in(folder: Path, cfg: DictConfig) -> Inspection:
    """Inspect a data set, print the findings, and draw augmented images into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/check_data.yaml`.

    Raises:
        ValueError: the data cannot be trained on; all findings have been printed.
    """
    from detr_exp import build
    from detr_exp.data.inspection import inspect

    height, width = cfg.image_size
    inspection, data = inspect(partial(build.data, cfg), image_size=(height, width), num_queries=cfg.num_queries)
    say(*report(inspection))
    if cfg.json is not None:
        write(Path(cfg.json), json.dumps(asdict(inspection), indent=1, ensure_ascii=False) + "\n")
        say(f"all findings: {cfg.json}")
    if cfg.images and data is not None and "train" in inspection.splits:
        say(f"augmented training images: {draw(folder, cfg, data)}")
    if errors := inspection.count("error"):
        raise ValueError(f"{errors} {'problem' if errors == 1 else 'problems'} that training refuses, listed above")
    say(f"training can start; {inspection.count('warning')} warnings")
    return inspection


def report(inspection: Inspection) -> Iterator[str]:
    """Lines to print: the content of the data set, then its problems."""
    if inspection.splits:
        yield ""
        yield from table(
            ["split", "images", "empty", "objects", "an image", "most", "small", "medium", "large", "sizes"],
            [split_row(name, facts) for name, facts in inspection.splits.items()],
        )
        yield ""
        head = [f"{name} {what}" for name in inspection.splits for what in ("objects", "images", "side")]
        yield from table(
            ["class", "id", *head], [class_row(row, list(inspection.splits)) for row in inspection.classes]
        )
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in inspection.findings:
        kinds.setdefault((finding.level, finding.kind), []).append(finding)
    for (level, kind), findings in kinds.items():
        yield f"\n{level}: {kind} ({sum(len(finding.cases) for finding in findings)})"
        for finding in findings:
            yield f"  {finding.source}\n    " + listed(finding.cases, "\n    ")
    yield ""


def split_row(name: str, facts: Values) -> list[str]:
    heights, widths, many = facts["height"], facts["width"], facts["per_image"]
    sizes = f"{widths['min']:g}x{heights['min']:g}"
    if (widths["max"], heights["max"]) != (widths["min"], heights["min"]):
        sizes += f" to {widths['max']:g}x{heights['max']:g}"
    counts = [str(facts[key]) for key in ("images", "empty", "objects")]
    areas = [str(facts[key]) for key in ("small", "medium", "large")]
    return [name, *counts, f"{many['mean']:.1f}", f"{many['max']:g}", *areas, sizes]


def class_row(row: Values, splits: Sequence[str]) -> list[str]:
    numbers = [row[name][key] for name in splits for key in ("objects", "images", "median_side")]
    return [row["name"], str(row["id"]), *("-" if number is None else str(number) for number in numbers)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        cells = [f"{cell:<{w}}" if k == 0 else f"{cell:>{w}}" for k, (cell, w) in enumerate(zip(row, widths))]
        yield "  ".join(cells)


@dataclass
class Canvas:
    """The members of a network on which its batches depend; see `data.dataset.Network`."""

    image_size: tuple[int, int]
    tasks: tuple[str, ...]
    pixel_mean: Tensor
    stride: int = 1


def draw(folder: Path, cfg: DictConfig, data: DataSet) -> Path:
    """Training images after augmentation, as a network of this size receives them."""
    import torch

    from detr_exp.trainer.diagnosis.sanity import save_sample_sheet

    height, width = cfg.image_size
    tasks = ("boxes", *["masks"] * data.has_masks, *["keypoints"] * (data.keypoints is not None))
    canvas = Canvas((height, width), tasks, pixel_mean=torch.zeros(data.channels))
    loader = data.loader("train", network=canvas, batch_size=1, seed=cfg.seed, training=True)
    folder.mkdir(parents=True, exist_ok=True)
    return save_sample_sheet(folder / "training_samples.png", data, loader, cfg.images)


def main() -> None:
    cli.main(check_data, "check_data", USAGE)


if __name__ == "__main__":
    main()
