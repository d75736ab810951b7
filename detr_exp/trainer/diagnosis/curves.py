"""Figures of a run: its losses and metrics over epochs, and what its training labels are like."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detr_exp.data.content import Split
from detr_exp.data.dataset import DataSet
from detr_exp.data.table import Flattened, flat
from detr_exp.metric.charts import plain_name
from detr_exp.trainer.distributed import on_first_rank
from detr_exp.trainer.results import Results
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import Run
from detr_exp.writing import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, LABELS = "charts/curves.png", "charts/labels.png"
PAUSE = 60.0  # seconds between two drawings of the curves
MOST_CURVES = 8  # loss terms beside the total
MOST_CLASSES = 30
MOST_RENDERED = 200  # images of a split without annotation files, whose objects are made when they are read
MAIN = ("mAP", "mAP50", "mAP75")
OF_OTHER_LAYERS = re.compile(r"_(aux|dn)_\d+$|_enc$")  # than the last one
CELLS = 40  # of the map of places, in each direction


class Curves:
    """Draws `charts/curves.png`, once a minute at most and at the end; not without `num_pictures`."""

    def __init__(self, settings: Settings) -> None:
        self.is_enabled, self.drawn_at = settings.num_pictures > 0, time.monotonic()

    def draw(self, run: Run, results: Results, step: int, is_last: bool) -> None:
        is_due = is_last or time.monotonic() - self.drawn_at >= PAUSE
        if not (self.is_enabled and is_due and len(results.rows) > 1):
            return
        path = run.output_dir / CURVES
        path.parent.mkdir(exist_ok=True)
        draw_curves(path, results)
        run.tracker.image(path, path.stem, step)
        self.drawn_at = time.monotonic()


def draw_curves(path: Path, results: Results) -> None:
    """Total loss, loss terms and metrics over epochs."""
    curves = results.curves()
    train = [name for name in curves if name.startswith("train/loss_") and not OF_OTHER_LAYERS.search(name)]
    totals = [name for name in curves if name in ("train/loss", "val/loss")]
    metrics = [name for name in curves if name[:4] == "val/" and name[4:].rpartition("_")[2] in MAIN]
    figure, axes = _figure(13, 4, 1, 3)
    panels = {"loss": totals, "loss terms": train[:MOST_CURVES], "metrics": metrics}
    for (title, names), part in zip(panels.items(), axes.flat):
        for name in names:
            epochs, values = zip(*curves[name])
            marker = "o" if len(epochs) == 1 else None
            part.plot(
                epochs, values, label=name.removeprefix("train/") if part is axes.flat[1] else name, marker=marker
            )
        part.set_title(title)
        part.set_xlabel("epoch")
        part.xaxis.get_major_locator().set_params(integer=True)
        part.grid(color="0.92")
        if names:
            part.legend(frameon=False, fontsize=8)
    write(path, lambda file: figure.savefig(file, dpi=100))


def save_label_statistics(settings: Settings, run: Run) -> None:
    """Draw `charts/labels.png` for the training split, at the start of a run."""
    path = run.output_dir / LABELS
    if settings.num_pictures and not path.exists():
        on_first_rank(draw_labels, path, run.data)
        run.tracker.image(path, path.stem, 0)


def draw_labels(path: Path, data: DataSet) -> None:
    """Objects per class, their sizes, their places, and objects per image, of the training split."""
    path.parent.mkdir(exist_ok=True)
    split = data.split("train")
    read = flat(split, None if isinstance(split, Flattened) else _spread(split))
    sizes = read.sizes[read.owner][:, [1, 0, 1, 0]]
    boxes = np.clip(read.boxes_xyxy / sizes, 0, 1)
    counts = [int((read.categories == number).sum()) for number in data.category_ids]
    figure, axes = _figure(11, 8, 2, 2)
    _draw_classes(axes[0, 0], data.classes, counts)
    sides = 100 * (boxes[:, 2:] - boxes[:, :2])
    axes[0, 1].plot(sides[:, 0], sides[:, 1], ".", markersize=3, alpha=0.4)
    axes[0, 1].set(xlim=(0, 100), ylim=(0, 100), xlabel="width, % of the image", ylabel="height, % of the image")
    axes[0, 1].set_title("sizes of objects")
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    places, _, _ = np.histogram2d(middles[:, 1], middles[:, 0], CELLS, [[0, 1], [0, 1]])
    axes[1, 0].imshow(places, extent=(0, 100, 100, 0), cmap="magma")
    axes[1, 0].set(xlabel="x, % of the image", ylabel="y, % of the image")
    axes[1, 0].set_title("centres of objects")
    most = int(read.counts.max(initial=0))
    axes[1, 1].hist(read.counts, bins=np.linspace(-0.5, most + 0.5, min(most, 40) + 2).tolist())
    axes[1, 1].set(xlabel="objects in an image", ylabel="images")
    axes[1, 1].set_title(
        f"{len(read.categories)} objects in {len(read.counts)} images, {(read.counts == 0).sum()} empty"
    )
    write(path, lambda file: figure.savefig(file, dpi=90))


def _draw_classes(axes: Axes, classes: Sequence[str], counts: Sequence[int]) -> None:
    order = sorted(range(len(classes)), key=lambda label: -counts[label])
    shown = order[:MOST_CLASSES]
    axes.barh(range(len(shown)), [counts[label] for label in shown])
    size = 8 if len(shown) > 12 else 10
    axes.set_yticks(range(len(shown)), [plain_name(classes[label]) for label in shown], fontsize=size)
    axes.invert_yaxis()
    axes.set_xlabel("objects")
    more = f", the {len(shown)} most frequent" if len(order) > len(shown) else ""
    axes.set_title(f"{len(classes)} classes{more}")


def _spread(split: Split) -> range:
    """Images spread over a split."""
    return range(0, len(split), max(1, len(split) // MOST_RENDERED))


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure  # takes long to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
