"""The cells of the proof suite, set x contender x seed: what was done is read, what is missing is trained.

A cell is one JSON file of numbers. It holds the conditions it was made under; cells that were made under different ones
are refused and not compared.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

from detr_exp.contest import scores
from detr_exp.contest.job import DETECTIONS, FACTS, Facts, Job
from detr_exp.contest.sets import Fold, ImageSet, write_fold
from detr_exp.published.fetch import fetch
from detr_exp.published.places import digests
from detr_exp.terminal import say
from detr_exp.tracker.provenance import environment
from detr_exp.values import Values
from detr_exp.writing import write

OF_ALL = (
    "set",
    "held_out",
    "draws",
    "budget",
    "epochs",
    "resolution",
    "batch_size",
    "cpu",
)  # the same in all cells of a set
OF_CONTENDER = ("program", "options", "weights", "versions")  # the same in all its cells
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
VERSIONS = "import sys, json, platform; from importlib.metadata import version; \
print(json.dumps({'python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"


@dataclass(frozen=True)
class Contender:
    """A program that trains detectors.

    Attributes:
        name: of the config.
        program: its command; the path of a `job.Job` is appended. `python` is this interpreter.
        options: for the program.
        weights: of the backbone: a file or a name of the table; None: random.
        packages: whose versions matter.
        about: one sentence for the page.
        start: what the training starts from, for the page.
        tuning: how its settings were chosen, for the page.
    """

    name: str
    program: str
    options: Values = field(default_factory=dict)
    weights: str | None = None
    packages: Sequence[str] = ()
    about: str = ""
    start: str = ""
    tuning: str = ""

    @cached_property
    def file(self) -> Path | None:
        """The file of the backbone's weights.

        Raises:
            ValueError: it cannot be had.
        """
        if self.weights is None:
            return None
        path = Path(self.weights).expanduser()
        if not path.is_file() and (found := fetch(self.weights, "backbone")) is not None:
            path = found.path
        if not path.is_file():
            raise ValueError(f"contenders.{self.name}.weights is {self.weights}, which is neither a file nor a name")
        return path.resolve()

    @cached_property
    def command(self) -> list[str]:
        words = shlex.split(self.program)
        return [sys.executable, *words[1:]] if words[0] == "python" else words

    @cached_property
    def conditions(self) -> Values:
        """What all its cells must share.

        Raises:
            ValueError: a package is not installed.
        """
        done = subprocess.run([self.command[0], "-c", VERSIONS, *self.packages], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            raise ValueError(
                f"contenders.{self.name} needs {', '.join(self.packages)} ({reason}): pip install -e '.[proof]', or "
                f"leave it out, only=..."
            )
        weights = None if self.file is None else digests(self.file)["sha256"]
        known = {"program": self.program, "options": self.options, "weights": weights}
        return {**known, "versions": json.loads(done.stdout)}


@dataclass(frozen=True)
class Cell:
    """One result to be had.

    Attributes:
        data: the set.
        contender: trains.
        seed: of the training.
        budget: seconds of CPU time of the training; each fold has its share.
        given_epochs: length of the training in place of the budget; None: as many epochs as fit it.
        resolution: of the network's input.
        batch_size: images per step.
        resamples: of the images.
    """

    data: ImageSet
    contender: Contender
    seed: int
    budget: float
    given_epochs: int | None
    resolution: int
    batch_size: int
    resamples: int

    @property
    def name(self) -> str:
        return f"{self.data.name}-{self.contender.name}-{self.seed}"

    @cached_property
    def conditions(self) -> Values:
        images = len(self.data.truth["images"])
        known = {"set": self.data.fingerprint, "held_out": images, "draws": scores.draws_mark(images, self.resamples)}
        length = {"budget": self.budget} if self.given_epochs is None else {"epochs": self.given_epochs}
        known |= {**length, "resolution": self.resolution, "batch_size": self.batch_size, "cpu": cpu()}
        return known | self.contender.conditions


def cpu() -> str:
    """The processor, as far as the system tells, with its family and model."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")]
    words = [one[1].strip() for one in found if one]
    return f"{words[0]} (family {words[1]}, model {words[2]})" if len(words) == 3 else platform.processor()


def finished(folder: Path) -> list[Values]:
    """All cells in a folder.

    Raises:
        ValueError: a file is damaged.
    """
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cells.append(json.loads(path.read_text("utf-8")) | {"file": str(path)})
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and its cell is made again") from error
    return cells


def refuse_mixed(cells: Sequence[Values], may_differ: Sequence[str] = ()) -> None:
    """Refuse cells that were not made under the same conditions.

    Args:
        cells: with `set`, `contender`, `conditions` and `file`.
        may_differ: conditions that may.

    Raises:
        ValueError: names two of them and what differs.
    """
    first: dict[tuple[str, str], Values] = {}
    for cell in cells:
        for kind, keys in (("set", OF_ALL), ("contender", OF_CONTENDER)):
            other = first.setdefault((kind, cell[kind]), cell)
            for key in keys:
                here, there = cell["conditions"].get(key), other["conditions"].get(key)
                if here != there and key not in may_differ:
                    raise ValueError(
                        f"{cell['file']} has {key} {here}, but {other['file']} has {there}: they cannot be compared; "
                        f"remove one, use another folder, results=FOLDER, or accept it: may_differ=[{key}]"
                    )


def make(cell: Cell, known: Sequence[Values], work: Path) -> Values:
    """Train, score and return one cell.

    Args:
        cell: not finished.
        known: the finished cells; those of the same set and contender say how many epochs fit the budget.
        work: folder for what need not be kept.

    Raises:
        ValueError: the program failed, or its results cannot be used.
    """
    same = next((one["epochs"] for one in known if _alike(one, cell)), None)
    epochs = cell.given_epochs or same or _rehearsed(cell, work)
    detections: list[Values] = []
    facts = []
    for place, fold in enumerate(cell.data.folds):
        given = work / cell.data.name / f"fold-{place}"
        found, told = _trained(cell, fold, epochs, given, work / cell.name / str(place))
        detections += found
        facts.append(told)
    made = environment()
    return {
        "set": cell.data.name,
        "contender": cell.contender.name,
        "seed": cell.seed,
        "epochs": epochs,
        "cpu_seconds": round(sum(one.cpu_seconds for one in facts), 1),
        "steps": sum(one.steps for one in facts),
        "parameters": facts[0].parameters,
        **scores.scored(cell.data.truth, detections, cell.resamples),
        "conditions": cell.conditions,
        "commit": made.get("git.commit", "unknown") + (" with changes" if made.get("git.dirty") == "true" else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def _alike(one: Values, cell: Cell) -> bool:
    return (one["set"], one["contender"]) == (cell.data.name, cell.contender.name)


def _rehearsed(cell: Cell, work: Path) -> int:
    """The epochs that fit the budget, from the CPU time of one epoch and of two."""
    spent = []
    for epochs in (1, 2):
        folder = work / f"{cell.data.name}-{cell.contender.name}-rehearsal" / str(epochs)
        given = work / cell.data.name / "fold-0"
        spent.append(_trained(replace(cell, seed=0), cell.data.folds[0], epochs, given, folder)[1].cpu_seconds)
    once, twice = spent
    epoch = max(twice - once, twice / 4)  # a first epoch has to warm up
    epochs = max(1, int((cell.budget / len(cell.data.folds) - max(0.0, once - epoch)) / epoch))
    say(f"{cell.data.name}, {cell.contender.name}: an epoch costs {epoch:.1f} s, {epochs} epochs fit the budget")
    return epochs


def _trained(cell: Cell, fold: Fold, epochs: int, given: Path, folder: Path) -> tuple[list[Values], Facts]:
    """What a program makes of one job; a job that was done before is not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = None if cell.contender.file is None else str(cell.contender.file)
    places = str(given.resolve()), str(folder.resolve())
    job = Job(*places, cell.seed, epochs, cell.resolution, cell.batch_size, weights, cell.contender.options)
    mark = folder / "conditions.json"
    conditions = json.dumps(cell.conditions | {"epochs": epochs, "seed": cell.seed})
    if not ((folder / FACTS).exists() and mark.exists() and mark.read_text("utf-8") == conditions):
        shutil.rmtree(folder)
        folder.mkdir()
        write_fold(cell.data.content, fold, given)
        _start(cell, [*cell.contender.command, str(job.save())], folder / "log.txt")
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        write(mark, conditions)
    facts = Facts(**json.loads((folder / FACTS).read_text("utf-8")))
    return json.loads((folder / DETECTIONS).read_text("utf-8")), facts


def _start(cell: Cell, command: Sequence[str], log: Path) -> None:
    alone = {**os.environ, **dict.fromkeys(THREADS, "1"), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=alone)
    if done.returncode:
        last = "\n".join(log.read_text("utf-8", "replace").strip().splitlines()[-5:])
        raise ValueError(f"{cell.name}: {' '.join(command)} ended with {done.returncode}; see {log}:\n{last}")


def in_order(
    sets: Sequence[ImageSet], contenders: Sequence[Contender], seeds: Sequence[int], settings: Values
) -> Iterator[Cell]:
    """All cells: every set and contender with one seed before the next seed.

    Args:
        sets: of the config.
        contenders: of the config.
        seeds: of the config.
        settings: `budget`, `epochs`, `resolution`, `resamples`, and `batch_size` by name of a set.
    """
    for seed in seeds:
        for contender in contenders:
            for data in sets:
                length = settings["budget"], settings["epochs"]
                shape = settings["resolution"], settings["batch_size"][data.name]
                yield Cell(data, contender, seed, *length, *shape, settings["resamples"])
