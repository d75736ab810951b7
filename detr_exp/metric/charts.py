"""Charts of an evaluation: precision over recall, and the confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detr_exp.metric.backend import CocoEvaluation
from detr_exp.metric.coco import OFFICIAL, PREFIX
from detr_exp.metric.confusion import confusion
from detr_exp.writing import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from detr_exp.values import Values


MOST_LABELLED = 12  # curves with a legend entry each; with more classes the curves are grey, with their mean
MOST_COUNTED = 25  # classes up to which the matrix shows its numbers


def save_charts(metric: CocoEvaluation, folder: Path) -> list[Path]:
    """Write `confusion.png` and, per task, `pr_curves.png` (`segm_...`, `keypoint_...`); valid after `compute`.

    Args:
        metric: after `compute`.
        folder: created if it does not exist.

    Returns:
        the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{PREFIX[iou_type]}pr_curves.png" for iou_type in metric.iou_types]
    for iou_type, path in zip(metric.iou_types, paths):
        pr_figure(metric, path, iou_type)
    confusion_figure(metric, folder / "confusion.png")
    return [*paths, folder / "confusion.png"]


def pr_figure(metric: CocoEvaluation, path: Path, iou_type: str = "bbox") -> None:
    """Precision over recall of every class that has objects, at IoU (or OKS) 0.5; a dot marks the best F1."""
    curves = metric.curves[iou_type]
    limit = 0 if iou_type == "keypoints" else metric.limits.index(OFFICIAL)
    recall = np.linspace(0, 1, curves.precision.shape[1])
    rows = [row for row in metric.table(iou_type) if row["objects"]]
    order = sorted(metric.category_ids)
    of_class = {name: order.index(category) for name, category in zip(metric.classes, metric.category_ids)}
    figure, axes = _figure(7.5, 5.5)
    shown = []
    for row in sorted(rows, key=lambda row: -row["AP50"]):
        precision = curves.precision[0, :, of_class[row["class"]], 0, limit]
        shown.append(precision)
        words: Values = (
            {"label": f"{plain_name(row['class'])}  {row['AP50']:.3f}"} if len(rows) <= MOST_LABELLED else {}
        )
        (line,) = axes.plot(recall, precision, linewidth=1.2, color=None if words else "0.75", **words)
        if words and row["f1"] > 0:
            axes.plot(row["recall"], row["precision"], "o", markersize=5, color=line.get_color())
    if shown:
        mean = np.mean(shown, axis=0)
        axes.plot(recall, mean, color="black", linewidth=2.4, label=f"mean  {mean.mean():.3f}")
        axes.legend(title="AP50", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title({"bbox": "boxes, IoU 0.5", "segm": "masks, IoU 0.5"}.get(iou_type, "keypoints, OKS 0.5"))
    axes.grid(color="0.92")
    write(path, lambda file: figure.savefig(file, dpi=110))


def confusion_figure(metric: CocoEvaluation, path: Path) -> None:
    """The matrix of `confusion`: colours are parts of a row, numbers are objects."""
    matrix = confusion(metric)
    present = np.flatnonzero(
        (matrix.sum(0) + matrix.sum(1))[:-1]
    )  # without classes that are neither annotated nor detected
    matrix = matrix[np.ix_([*present, -1], [*present, -1])]
    names = [plain_name(metric.classes[k]) for k in present]
    parts = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(4 + 0.32 * len(matrix), 22)
    figure, axes = _figure(side + 1, side)
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(names) <= MOST_COUNTED else 6
    axes.set_xticks(range(len(matrix)), [*names, "not found"], rotation=60, ha="right", fontsize=size)
    axes.set_yticks(range(len(matrix)), [*names, "no object"], fontsize=size)
    axes.set(xlabel="taken for", ylabel="is")
    axes.set_title("boxes at IoU 0.5, above each class's best threshold", fontsize=10)
    if len(names) <= MOST_COUNTED:
        for i, j in np.argwhere(matrix):
            ink = "white" if parts[i, j] > 0.55 else "black"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=8, color=ink)
    write(path, lambda file: figure.savefig(file, dpi=110))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without pyplot, whose figures stay in memory and need a display on some machines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def plain_name(name: str) -> str:
    """A class name as a label: shortened, and without dollar signs, which start a formula."""
    return (name[:24] + "..." if len(name) > 27 else name).replace("$", r"\$")
