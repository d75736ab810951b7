"""Trainings whose CPU time is counted, in several sittings, and what they are worth on held-out images.

Shared by `elastic_beside_separate.py` and `teacher_gain.py`. A training is one folder; the CPU times of its processes,
start and interrupted ones included, are one JSON file, and what it is worth, a cell, another one. With these files a
training is not repeated where its folder is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

from detr_exp.contest.scores import scored
from detr_exp.contest.sets import ImageSet, read_set, write_fold
from detr_exp.inference.detector import Detector
from detr_exp.metric.verdict import Difference, difference, interval
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.values import Values
from detr_exp.writing import write

FOLDS = {"bccd_coco": None, "cards_voc": 3}  # of a set without enough images to hold out; the first one is trained
RESAMPLES = 1000
INTERRUPTED = (143, signal.SIGTERM)  # saved, and before there was anything to save
BACKBONE = ("model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0")
OVERRIDES = (
    *("data=coco", "data/augment=flip", "data.augment.photometric=0.5", "data.num_workers=0", "data.cache=ram"),
    *("model.class_prior=0.1", "optim.lr=4e-4", "optim/scheduler=cosine", "trainer.batch_size=8"),
    *("trainer/hardware=cpu", "trainer.hardware.threads=1", "trainer.hardware.amp=bf16", "trainer.num_pictures=0"),
    *("trainer.progress_bar=none", "tracker=none", "trainer.checkpoint_every_steps=100"),
)


@dataclass
class Sitting:
    """How much CPU time may be used now.

    Attributes:
        seconds: in all.
        spent: so far.
    """

    seconds: float
    spent: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.spent >= self.seconds


@dataclass(frozen=True)
class Place:
    """Where the trainings and results of some sets are.

    Attributes:
        data: folder of the sets.
        work: folder of sets and trainings, which is used again.
        results: folder of CPU times and cells.
        backbone: file with weights of tf_efficientnet_lite0.
        sitting: for all trainings together.
    """

    data: Path
    work: Path
    results: Path
    backbone: str
    sitting: Sitting
    sets: dict[str, ImageSet] = field(default_factory=dict)

    def set(self, name: str) -> ImageSet:
        """A set; the images of its first fold are written for trainings."""
        if name not in self.sets:
            self.sets[name] = read_set(name, str(self.data / name), FOLDS.get(name))
            if not (self.root(name) / "held_out").exists():
                write_fold(self.sets[name].content, self.sets[name].folds[0], self.root(name))
        return self.sets[name]

    def root(self, name: str) -> Path:
        return self.work / "sets" / name

    def path(self, cell: str) -> Path:
        return self.results / "cells" / f"{cell}.json"

    def train(self, name: str, of_set: str, words: Sequence[str], cells: Sequence[str]) -> float | None:
        """Train, or go on, as long as the sitting allows.

        Args:
            name: of the training.
            of_set: the set.
            words: overrides.
            cells: which are made of it; it is trained again where its folder is gone and one of them is missing.

        Returns:
            seconds of CPU time of all its processes; None: it is not finished.

        Raises:
            RuntimeError: it failed.
        """
        self.set(of_set)
        folder = self.work / "runs" / name
        times = self.results / "cpu" / f"{name}.json"
        known: Values = json.loads(times.read_text("utf-8")) if times.exists() else {"seconds": [], "is_done": False}
        if known["is_done"] and (folder.exists() or all(self.path(cell).exists() for cell in cells)):
            return float(sum(known["seconds"]))
        if not folder.exists():
            known = {"seconds": [], "is_done": False}
        if self.sitting.is_over:
            return None
        overrides = [*OVERRIDES, f"model.backbone.pretrained={self.backbone}", *words, f"data.root={self.root(of_set)}"]
        command = [sys.executable, "-m", "detr_exp.train", *overrides, "trainer.resume=auto", f"hydra.run.dir={folder}"]
        for parent in (folder.parent, times.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".log"), "ab") as log:
            status, seconds = self._watched(subprocess.Popen(command, stdout=log, stderr=log))
        known["seconds"].append(round(seconds, 2))
        known["is_done"] = status == 0
        write(times, json.dumps(known))
        if status not in (0, *INTERRUPTED):
            raise RuntimeError(f"{name} ended with {status}; see {folder.with_suffix('.log')}")
        return float(sum(known["seconds"])) if known["is_done"] else None

    def _watched(self, process: subprocess.Popen[bytes]) -> tuple[int, float]:
        """Wait for a process, which is asked to save and end where the sitting is over: exit status and CPU seconds."""
        asked = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)  # waited for here
                seconds = usage.ru_utime + usage.ru_stime
                self.sitting.spent += seconds
                return abs(process.returncode), seconds
            times = psutil.Process(process.pid).cpu_times()
            if not asked and self.sitting.spent + times.user + times.system > self.sitting.seconds:
                process.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(0.5)

    def cell(self, name: str, of_set: str, run: str, make: Callable[[Path], Detector], known: Values) -> Values:
        """What a trained detector is worth on the held-out images; computed once.

        Args:
            name: of the cell.
            of_set: the set.
            run: name of the training.
            make: checkpoint -> detector.
            known: further values of the cell.
        """
        path = self.path(name)
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        detector, found = make(self.work / "runs" / run / NEWEST), []
        truth = self.held_out(of_set)
        for image in truth["images"]:
            (one,) = detector.predict(image["file_name"], threshold=0.0)
            sizes = one.boxes[:, 2:] - one.boxes[:, :2]
            rows = zip(one.scores.tolist(), one.labels.tolist(), one.boxes.tolist(), sizes.tolist())
            found += [
                {
                    "image_id": image["id"],
                    "category_id": detector.category_ids[label],
                    "bbox": [*box[:2], *size],
                    "score": score,
                }
                for score, label, box, size in rows
            ]
        values = {"set": of_set, **known, **scored(truth, found, RESAMPLES)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(values))
        return values

    @cache  # noqa: B019 - one place lives as long as the program
    def held_out(self, name: str) -> Values:
        """The held-out images of the first fold with their objects."""
        from detr_exp.data.part import restricted

        made = self.set(name)
        return restricted(made.content, made.folds[0].held_out)

    def __hash__(self) -> int:
        return id(self)


def compared(ours: Sequence[Sequence[Values]], others: Sequence[Sequence[Values]]) -> Difference:
    """The difference of mean mAP of two arms, each a cell for every seed and part (a member), paired by seed.

    Args:
        ours: for each seed its cells.
        others: likewise, of the same seeds.
    """
    first, second = (
        (
            np.array([np.mean([cell["mAP"] for cell in seed]) for seed in arm]),
            np.array([np.mean([cell["drawn"] for cell in seed], axis=0) for seed in arm]),
        )
        for arm in (others, ours)
    )
    images = ours[0][0]["images"]
    return difference(first[0], second[0], first[1], second[1], images=images, paired=True)


def row(title: str, ours: Sequence[Sequence[Values]], others: Sequence[Sequence[Values]], cpu: str) -> str:
    """A row of the table: both means, their difference with its 95 % interval, and the CPU time."""
    found = compared(ours, others)
    low, high = interval(found)
    means = [np.mean([[cell["mAP"] for cell in seed] for seed in arm]) for arm in (others, ours)]
    return (
        f"| {title} | {len(ours)} | {means[0]:.4f} | {means[1]:.4f} | {found.value:+.4f} ({low:+.4f} to {high:+.4f}) "
        f"| {cpu} |"
    )


def parser(about: str | None) -> argparse.ArgumentParser:
    """The arguments that both scripts have."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, type=Path, help="folder of the sets")
    made.add_argument("--work", required=True, type=Path, help="folder for sets and trainings, which is used again")
    made.add_argument("--results", type=Path, help="folder for CPU times and cells; --work, if not given")
    made.add_argument("--backbone", required=True, help="file with weights of tf_efficientnet_lite0")
    made.add_argument("--sets", nargs="+", default=list(FOLDS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--epochs", type=int, default=40, help="of a training that learns alone")
    made.add_argument("--minutes", type=float, default=150, help="of CPU time of this sitting, at most")
    return made


def place_of(given: argparse.Namespace) -> Place:
    results = (given.results or given.work).resolve()
    return Place(given.data, given.work.resolve(), results, given.backbone, Sitting(60 * given.minutes))
