"""Published weights, ready for use: the network of a row of the table, with the names of its classes."""

from __future__ import annotations

from typing import cast

from torch import nn

from detr_exp import build, start
from detr_exp.data.classes import KnownLabels
from detr_exp.data.content import Category
from detr_exp.data.keypoints import schema
from detr_exp.inference.detector import Detector
from detr_exp.model.adapter.slim import undetermined_by
from detr_exp.published.classes import POINTS_OF_A_PERSON, classes_of, has_keypoints
from detr_exp.published.fetch import fetch
from detr_exp.published.table import Entry
from detr_exp.trainer.checkpoint_content import DEFAULT_THRESHOLD
from detr_exp.trainer.hardware import Hardware


def load_published(entry: Entry, hardware: Hardware) -> Detector:
    """Open published weights of a detector; they are downloaded if they are not on this machine.

    Args:
        entry: of the table.
        hardware: that of the detector.

    Raises:
        ValueError: the names of its classes are not known, the file cannot be had, or leaves weights random.
    """
    named = classes_of(entry)
    found = fetch(entry.name)
    assert found is not None
    cfg = build.compose([*entry.network.split(), f"model.weights={entry.name}"])
    if "num_denoising" in cfg.model:
        cfg.model.num_denoising = 0  # queries of trainings
    ids, names = list(named), list(named.values())
    points = [str(number) for number in range(POINTS_OF_A_PERSON)] if has_keypoints(entry) else []
    keypoints = schema([Category(number, name, points if name == "person" else []) for number, name in named.items()])
    network = build.network(start.for_checkpoint(cfg), KnownLabels(len(ids), names, ids, keypoints))
    missing, share = undetermined_by(lambda: start.load(network, found, names), cast("nn.Module", network))
    if missing:
        raise ValueError(
            f"{found.path} is to be {entry.title}, but holds {share}; it is another file: move it away, and fetch it "
            f"again, python -m detr_exp.weights fetch {entry.name}"
        )
    return Detector(
        network=hardware.place(network).eval(),
        classes=names,
        category_ids=ids,
        threshold=DEFAULT_THRESHOLD,
        precision=hardware.precision(evaluating=True),
        cfg=cfg,
        path=found.path,
        keypoints=keypoints,
    )
