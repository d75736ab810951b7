"""What a program of the proof suite is given, and what it must return; the only part that such a program imports.

A program is started with the path of a JSON file (`Job`). It trains on `<root>/train`, predicts on `<root>/held_out`
and writes two files into the folder of the job: `detections.json`, COCO results (image_id, category_id, bbox as x, y,
width, height in pixels, score; all of them, without a threshold), and `facts.json`. Each folder of images has a
`_annotations.coco.json`; that of `held_out` has no objects. `<root>/valid` has a few images of `train`, for programs
that do not train without it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from detr_exp.values import Values

ANNOTATIONS = "_annotations.coco.json"
DETECTIONS, FACTS, FILE = "detections.json", "facts.json", "job.json"


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        root: folder with `train` and `held_out`.
        folder: for the results, and for whatever the program needs.
        seed: of all random numbers.
        epochs: length of the training; the learning rate has its last value at its end.
        resolution: height and width of the network's input.
        batch_size: images per step.
        weights: file of the backbone's initial weights; None: random.
        options: of the contender, from the config.
    """

    root: str
    folder: str
    seed: int
    epochs: int
    resolution: int
    batch_size: int
    weights: str | None
    options: Values = field(default_factory=dict)

    def content(self, split: str) -> Values:
        """The COCO file of `train` or `held_out`."""
        return json.loads((Path(self.root) / split / ANNOTATIONS).read_text("utf-8"))

    def images(self, split: str) -> list[tuple[Values, Path]]:
        """Entries and paths of the images of `train` or `held_out`."""
        return [(image, Path(self.root) / split / image["file_name"]) for image in self.content(split)["images"]]

    def save(self) -> Path:
        path = Path(self.folder) / FILE
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        return path


@dataclass(frozen=True)
class Facts:
    """What a program tells of a training.

    Attributes:
        cpu_seconds: of the training alone: without imports, without predictions.
        steps: of the optimiser.
        parameters: that were trained.
    """

    cpu_seconds: float
    steps: int
    parameters: int


def cpu_seconds() -> float:
    """CPU time of this process so far, and of its processes that have ended."""
    return sum(os.times()[:4])


def run(contend: Callable[[Job], tuple[list[Values], Facts]]) -> None:
    """Do the job that the command line names."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    detections, facts = contend(job)
    folder = Path(job.folder)
    (folder / DETECTIONS).write_text(json.dumps(detections), "utf-8")
    (folder / FACTS).write_text(json.dumps(asdict(facts)), "utf-8")
