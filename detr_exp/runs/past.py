"""Finished runs: finding their folders and reading what they recorded."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import yaml

from detr_exp.config.stored import as_first_version, upgraded
from detr_exp.data.splits import HELD_OUT
from detr_exp.metric.honest import Choice
from detr_exp.runs.swept import folder_of
from detr_exp.tracker.base import FINISHED, RECORD, RunRecord
from detr_exp.tracker.follower import METRICS
from detr_exp.tracker.jsonl import JsonLines
from detr_exp.tracker.mlflow import LINK
from detr_exp.tracker.tracker import CLOCK, CONFIG
from detr_exp.values import Values, flat, measured

SHORTEST_ID = 6
MONITORS = ("val/keypoint_mAP", "val/segm_mAP", "val/mAP")
CLASSES = "classes.json"
LEDGER = "sweep.jsonl"  # in a sweep's folder: how each of its runs ended

logger = logging.getLogger("detr_exp.tracker")


Kinds = dict[str, type | tuple[type, ...]]  # name -> what stands there


@dataclass(frozen=True)
class PastRun:
    """What a run folder says.

    Attributes:
        folder: where it is.
        record: who and what it was.
        config: everything that was set, resolved, without secrets; in today's words, whatever version has written it.
        lines: of `metrics.jsonl`, without metrics that could not be measured, which earlier versions wrote as -1.
        tables: a row per class of the best evaluation, by kind of evaluation, boxes first.
    """

    folder: Path
    record: RunRecord
    config: Values
    lines: list[Values]
    tables: dict[str, list[Values]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> PastRun:
        """Raises: ValueError when `folder` is no run's, or one of its files is damaged."""
        record = RunRecord.load(folder)
        config = upgraded(mapping(folder / CONFIG, yaml.safe_load))
        lines, tables = list(map(measured, JsonLines.read(folder / METRICS))), mapping(folder / CLASSES, json.loads)
        if not all(map(_is_measured, lines)):
            raise ValueError(f"{folder / METRICS} is damaged (a line has no step, or no numbers); restore or remove it")
        if not all(isinstance(rows, list) and all(map(_is_row, rows)) for rows in tables.values()):
            raise ValueError(f"{folder / CLASSES} is damaged (a row is none of a class); restore or remove it")
        return cls(folder, record, config, lines, tables)

    @cached_property
    def overridable(self) -> Values:
        """The values by dotted key, without nodes that only repeat other keys, such as `loss.terms`."""
        return {sys.intern(key): value for key, value in flat(as_first_version(self.config)).items()}

    @cached_property
    def monitor(self) -> str:
        """The metric the run was judged by."""
        trainer = self.config.get("trainer")
        told = trainer.get("monitor") if isinstance(trainer, dict) else None
        if told:
            return f"val/{str(told).removeprefix('val/')}"
        return next((name for name in MONITORS if any(name in line for line in self.lines)), MONITORS[-1])

    @cached_property
    def best(self) -> Values:
        """The evaluation with the best monitored value; empty where there was none."""
        evaluated = [line for line in self.lines if line.get(self.monitor) is not None]
        return max(evaluated, key=lambda line: self._gain(line[self.monitor]), default={})

    @property
    def reached(self) -> float | None:
        """The best monitored value so far: more is better, a loss is negated; None of a diverged run."""
        value = self.best.get(self.monitor)
        return None if value is None or self.status == "nan" else self._gain(value)

    @property
    def score(self) -> float | None:
        """The result as a sweep ranks it; None of a run that goes on or has failed: a part of a training is none."""
        return self.reached if self.record.status in FINISHED else None

    @cached_property
    def raced(self) -> bool:
        """Whether it is of a sweep that gave no further seeds to points that fell behind."""
        path = self.folder / ".hydra" / "hydra.yaml"
        hydra = mapping(path, yaml.safe_load).get("hydra") if path.exists() else None
        sweeper = hydra.get("sweeper") if isinstance(hydra, dict) else None
        return isinstance(sweeper, dict) and sweeper.get("race") is True

    @cached_property
    def choices(self) -> tuple[Choice, Choice] | None:
        """The best epochs by the half of the validation images that chooses and by the other; None where all chose."""
        names = (self.monitor, f"{HELD_OUT}/{self.monitor.removeprefix('val/')}")
        measured = [line for line in self.lines if all(line.get(name) is not None for name in names)]
        if not measured or self.score is None:
            return None
        here, there = ([self._gain(line[name]) for line in measured] for name in names)
        a, b = here.index(max(here)), there.index(max(there))
        return Choice(here[a], there[a]), Choice(there[b], here[b])

    def _gain(self, value: float) -> float:
        return -value if self.monitor.startswith("val/loss") else value

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(epoch or step, value) of a metric."""
        axis = f"{name.partition('/')[0]}/epoch"
        measured = [line for line in self.lines if line.get(name) is not None]
        return [(line[axis if axis in line else "step"], line[name]) for line in measured]

    @property
    def hours(self) -> float:
        """Time spent; of a process that was killed outright, that between its first and last line."""
        lines = [line[CLOCK] for line in self.lines if CLOCK in line]
        return (self.record.seconds or (lines[-1] - lines[0] if lines else 0.0)) / 3600

    @property
    def status(self) -> str:
        """How it ended; a run that did not say so is going on, or was killed outright."""
        return "unfinished" if self.record.status == "running" else self.record.status

    @property
    def class_table(self) -> list[Values]:
        """A row per class of the best evaluation, boxes first; empty where there is none."""
        return next(iter(self.tables.values()), [])


def find(words: str | Sequence[str], root: str | Path = "outputs") -> list[Path]:
    """The run folders meant by folders of runs or sweeps, and by ids.

    Args:
        words: each a run folder, a folder with runs in it, or the beginning of an id: a run's own, its MLflow run's,
            or that of a sweep in MLflow.
        root: where the folders with these ids are.

    Returns:
        each folder once, those of a sweep by number.

    Raises:
        ValueError: a word that means none.
    """
    found: dict[Path, None] = {}
    for word in words if isinstance(words, Sequence) and not isinstance(words, str) else [words]:
        folder = Path(str(word)).expanduser()
        matching = _below(folder) if folder.is_dir() else _with_id(str(word), Path(root).expanduser())
        if not matching:
            problem = "holds no runs" if folder.is_dir() else f"is no folder, and no run in {root} has such an id"
            raise ValueError(f"{word} {problem}; give a run folder, a sweep's folder, or an id: outputs/<day>/<run>")
        found |= dict.fromkeys(matching)
    return list(found)


def load_all(folders: Sequence[Path], words: str | Sequence[str] = ()) -> list[PastRun]:
    """Read runs, and what the ledgers of sweeps know besides: runs that could not start, and how killed ones ended.

    Args:
        folders: of the runs.
        words: what was asked for; the folders of sweeps among them are looked at.

    Returns:
        the runs, without those whose files are damaged, which are named.

    Raises:
        ValueError: the files of all of them are.
    """
    runs: dict[Path, PastRun] = {}
    damaged: list[ValueError] = []
    for folder in folders:
        try:
            runs[folder.resolve()] = PastRun.load(folder)
        except ValueError as error:
            damaged.append(error)
    if damaged and not runs:
        raise damaged[0]
    for reason in damaged:
        logger.warning("left out: %s", reason)
    for word in words if isinstance(words, Sequence) and not isinstance(words, str) else [words]:
        sweep = Path(str(word)).expanduser()
        latest = {entry["hash"]: entry for entry in JsonLines.read(sweep / LEDGER) if _is_entry(entry)}
        for entry in latest.values():
            folder = folder_of(sweep, entry["hash"], entry["overrides"]).resolve()
            facts = {"status": entry["status"], "message": entry["reason"]}
            if folder not in runs:
                record = RunRecord(id=entry["hash"], project="", name=entry["hash"], words=entry["overrides"], **facts)
                runs[folder] = PastRun(folder, replace(record, seconds=entry["seconds"]), {}, [])
            elif runs[folder].record.status == "running":
                runs[folder] = replace(runs[folder], record=replace(runs[folder].record, **facts))
    return list(runs.values())


def find_one(word: str, root: str | Path = "outputs") -> Path:
    """The one run folder meant.

    Raises:
        ValueError: none, or several.
    """
    folders = find(word, root)
    if len(folders) > 1:
        shown = ", ".join(map(str, folders[:4]))
        raise ValueError(f"{word} means {len(folders)} runs ({shown}, ...); give the folder of one: run={folders[0]}")
    return folders[0]


def _below(folder: Path) -> list[Path]:
    if (folder / RECORD).exists():
        return [folder]
    return sorted({path.parent for path in folder.rglob(RECORD)}, key=_natural)


def _with_id(word: str, root: Path) -> list[Path]:
    if len(word) < SHORTEST_ID:
        return []
    return [folder for folder in _below(root) if any(known.startswith(word) for known in _ids(folder))]


def _ids(folder: Path) -> list[str]:
    """What a run is known by; a file that is damaged is named, and says nothing."""
    found: list[object] = []
    try:
        found.append(mapping(folder / LINK, json.loads).get("run_id"))
        record = RunRecord.load(folder)
        found += [record.id, record.parent]
    except ValueError as error:
        logger.warning("not looked at: %s", error)
    return [known for known in found if known and isinstance(known, str)]


def mapping(path: Path, parse: Callable[[str], object]) -> Values:
    """What a file of a run holds; nothing if it is not there.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); restore or remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds {found!r:.40}); restore or remove it")
    return found


def _is_measured(line: Values) -> bool:
    """Whether a line of `metrics.jsonl` says when, and holds what is written there."""
    return isinstance(line.get("step"), int) and all(
        value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in line.values()
    )


def _is_row(row: object) -> bool:
    """Whether this is of a table of classes."""
    kinds: Kinds = {"class": str, "objects": int, "AP": (int, float)}
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def _is_entry(line: Values) -> bool:
    """Whether this is a line of a ledger, of a version that says as much as this one reads."""
    kinds: Kinds = {"hash": str, "status": str, "overrides": list, "seconds": (int, float), "reason": (str, type(None))}
    return all(name in line and isinstance(line[name], kind) for name, kind in kinds.items())


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]
