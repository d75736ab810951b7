"""A trained detector in Python: predict, evaluate and export with the words of the commands."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from detr_exp.config.compose import composition, config_loader, refuse_unready
from detr_exp.config.mistakes import ConfigError
from detr_exp.folder import refuse_run_folder, remove_empty_folders
from detr_exp.values import Values, measured

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from detr_exp.data.classes import KnownLabels
    from detr_exp.inference import detector as inference
    from detr_exp.inference.images import Item
    from detr_exp.inference.members import At
    from detr_exp.inference.results import Result, Results
    from detr_exp.trainer.hardware import Hardware

OF_THE_DETECTOR = (
    "checkpoint",
    "weights",
    "trainer/hardware",
    "allow_targets",
    "at",
)  # words of commands that `load` has


def load(
    checkpoint: str | Path,
    *,
    hardware: Hardware | str | None = None,
    allow_targets: Sequence[str] = (),
    weights: str | None = None,
    compiled: bool = False,
    at: At | None = None,
) -> Detector:
    """Open a checkpoint.

    Args:
        checkpoint: a file, the folder of a run (its best), or the id of a run, ours or MLflow's.
        hardware: `cpu`, `cuda`, `mps` or `auto`, or settings; None: that of the training, where there is such a device.
        allow_targets: user-defined packages that its config may name.
        weights: "ema" or "raw"; None: those of the file; the averaged ones of a training checkpoint.
        compiled: also compile the network if the training did, for exactly its numbers; takes minutes.
        at: a smaller member of the network: `{"layers": 2, "queries": 100, "image_size": [320, 320]}` or some of these,
            or the name of a point that `python -m detr_exp.pareto` has found.

    Raises:
        ValueError: the file is absent, damaged, of another program or version, or names packages that are not allowed;
            or the network has no such member.
    """
    from detr_exp import build
    from detr_exp.inference import detector

    if isinstance(hardware, str):
        hardware = build.hardware(build.compose([f"trainer/hardware={hardware}"]))
    opened = detector.load(
        checkpoint, hardware=hardware, allow_targets=allow_targets, weights=weights, compiled=compiled, at=at
    )
    return Detector(opened)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        folder: with `metrics.json`, `classes.json` and charts.
        metrics: `mAP`, `mAP50`, ... `AP/<class>`; what could not be measured is absent.
        classes: a row per class (objects, AP, best threshold, precision, recall), by kind: `bbox`, `segm`, `keypoints`.
    """

    folder: Path
    metrics: dict[str, float] = field(repr=False)
    classes: dict[str, list[Values]] = field(repr=False)

    def to_pandas(self) -> pd.DataFrame:
        """The rows of all kinds as a frame, with the kind in the column `kind`."""
        import pandas as pd

        return pd.DataFrame([{"kind": kind, **row} for kind, rows in self.classes.items() for row in rows])


@dataclass(frozen=True)
class Detector:
    """A trained detector, with the commands as methods.

    Attributes:
        opened: the network with its classes, threshold and device.
    """

    opened: inference.Detector

    def __repr__(self) -> str:
        return f"Detector({self.opened.title!r}, classes={self.classes!r:.200})"

    @property
    def classes(self) -> list[str]:
        """A name per label."""
        return self.opened.classes

    @property
    def threshold(self) -> float:
        """The lowest score by default: where F1 was best in the evaluation of the checkpoint, as a whole, or of a point
        that has a name."""
        return self.opened.threshold

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.opened.path

    def predict(
        self, source: object, threshold: float | None = None, *, every: int = 1, batch_size: int = 8
    ) -> Results:
        """Find objects, in everything that `python -m detr_exp.predict` takes, and in images in memory.

        Args:
            source: a path or address of what the command takes (an image, a folder, a pattern, a video), the content of
                a file as bytes, a PIL image, an array `[H, W, 3]` RGB or a tensor `[3, H, W]`, uint8 or float in
                0..1; a stack of them `[n, ...]`, or an iterable of any of these.
            threshold: lowest score; None: `threshold` of the detector.
            every: of a video, use every n-th frame.
            batch_size: images at a time.

        Raises:
            ValueError: an image cannot be read. In a folder, a pattern or a video it is skipped with a warning, if
                others can be read.
        """
        from detr_exp.inference.results import Results

        skipped: list[str] = []
        found = list(self._found(source, threshold, every, batch_size, skipped))
        if skipped and not found:
            raise ValueError(f"none of {len(skipped)} images could be read, see the warnings; give other ones")
        return Results(found, self._known(), skipped)

    def stream(
        self, source: object, threshold: float | None = None, *, every: int = 1, batch_size: int = 1
    ) -> Iterator[Result]:
        """As `predict`, one result after another, for sources that are long or never end."""
        return self._found(source, threshold, every, batch_size, [])

    def _found(
        self, source: object, threshold: float | None, every: int, batch_size: int, skipped: list[str]
    ) -> Iterator[Result]:
        from detr_exp.inference.images import items_of, readable
        from detr_exp.inference.results import Result

        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}; a score is in 0..1: threshold=0.5, or None")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be >= 1: batch_size=8")
        items, are_found = items_of(source, every, self.opened.channels)
        known = self._known()

        def results(chunk: list[Item]) -> Iterator[Result]:
            read = list(readable(chunk, skipped) if are_found else ((item, item.read()) for item in chunk))
            found = self.opened.predict([image for _, image in read], threshold)
            for (item, image), detections in zip(read, found):
                yield Result(item.name, (image.shape[0], image.shape[1]), detections, known)

        return (result for chunk in iter(lambda: list(islice(items, batch_size)), []) for result in results(chunk))

    def evaluate(
        self, overrides: Sequence[str] = (), *, folder: str | Path | None = None, config_dir: str | Path | None = None
    ) -> Evaluation:
        """Evaluate with COCO's metrics, as `python -m detr_exp.evaluate` does.

        Args:
            overrides: words of that command: `["data.split=test"]`, `["data=coco", f"data.root={root}"]`.
            folder: for the results; None: a new one in `outputs/evaluate/<day>/`.
            config_dir: see `fit`.

        Raises:
            ValueError: the data cannot be read, or have no class in common with the detector.
        """
        from detr_exp.inference.evaluation import evaluate_in

        words, place = words_of(overrides, folder)
        cfg = self._config("evaluate", words, config_dir)
        with _results_in("evaluate", place) as made:
            metrics = evaluate_in(made, cfg, self.opened)
        table = made / "classes.json"
        kinds = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
        return Evaluation(made, metrics, {kind: list(map(measured, rows)) for kind, rows in kinds.items()})

    def export(
        self, overrides: Sequence[str] = (), *, folder: str | Path | None = None, config_dir: str | Path | None = None
    ) -> Path:
        """Write a file for other programs, as `python -m detr_exp.export` does; the detector does not change.

        Args:
            overrides: words of that command: `["format=onnx", "export.postprocess=true"]`.
            folder: for the file; None: a new one in `outputs/export/<day>/`.
            config_dir: see `fit`.

        Returns:
            the file.

        Raises:
            ValueError: the data or the settings cannot be used.
            GateError: outputs of the file differ from those of the detector.
        """
        from detr_exp.deploy.export import export_in

        words, place = words_of(overrides, folder)
        cfg = self._config("export", words, config_dir)
        with _results_in("export", place) as made:
            return export_in(made, cfg, self.opened)

    def _config(self, command: str, overrides: Sequence[str], config_dir: str | Path | None) -> DictConfig:
        """The config of a command on this detector."""
        for word in overrides:
            if (key := word.partition("=")[0].partition(".")[0]) in OF_THE_DETECTOR:
                name = key.rpartition("/")[2]
                raise ConfigError(f"{word} is settled when a detector is opened: detr_exp.load(..., {name}=...)")
        cfg = composition(config_loader(config_dir), command, overrides).cfg
        cfg.checkpoint = str(self.path)
        refuse_unready(cfg)
        return cfg

    def _known(self) -> KnownLabels:
        from detr_exp.data.classes import KnownLabels

        opened = self.opened
        return KnownLabels(len(opened.classes), opened.classes, opened.category_ids, opened.keypoints)


def words_of(overrides: Sequence[str], folder: str | Path | None) -> tuple[list[str], Path | None]:
    """The words of a command line without those for Hydra, and the folder they name.

    Raises:
        ConfigError: a word has no meaning here.
    """
    if isinstance(overrides, str | Mapping) or not all(isinstance(word, str) for word in overrides):
        raise ConfigError(f'{overrides!r:.200} is no list of overrides; give ["key=value", ...]')
    words = []
    for word in overrides:
        if word.startswith("hydra.run.dir=") and folder is None and "${" not in word:
            folder = word.partition("=")[2].strip("\"'")
        elif word.startswith(("hydra.", "hydra/", "+hydra", "-")):
            raise ConfigError(f"{word} is for the command line; leave it out, and name a folder by folder=...")
        else:
            words.append(word)
    return words, None if folder is None else Path(folder).expanduser().absolute()


def new_folder(root: Path, end: str = "") -> Path:
    """A new folder, named by day and time as those of the commands."""
    from detr_exp.inference.writers import claimed

    return claimed(root.absolute() / f"{datetime.now():%Y-%m-%d/%H-%M-%S}{end}", Path.mkdir)


@contextmanager
def _results_in(command: str, folder: Path | None) -> Iterator[Path]:
    """A folder for the results of a command, which does not stay if they fail."""
    started = time.time()
    made = new_folder(Path("outputs", command)) if folder is None else folder
    try:
        refuse_run_folder(made)
        yield made
    finally:
        remove_empty_folders(made, started)
