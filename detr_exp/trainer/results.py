"""`results.csv`: one row per epoch, and per evaluation within an epoch, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

from detr_exp.trainer.console import ABSENT
from detr_exp.writing import write

FILE = "results.csv"
HIDDEN = ("time/", "val/epoch", "val/nonfinite")


class Results:
    """The rows of a run, oldest first; the file is complete at any time.

    Args:
        folder: of the run.
        closed: step of the last completed epoch; later rows are of epochs that a resumed run repeats.
    """

    def __init__(self, folder: Path, closed: int = 0) -> None:
        self.path = path = folder / FILE
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if _step(row) <= closed]

    @property
    def seconds(self) -> float:
        """Duration of the run up to the last row."""
        return float(self.rows[-1].get("seconds") or 0) if self.rows else 0.0

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row and write the file; values that do not exist become empty cells.

        Args:
            row: column -> value; with `epoch` and `step`. Another row of this epoch is replaced.
        """
        cells = {name: "" if value == ABSENT else repr(value) for name, value in row.items() if _is_shown(name)}
        self.rows = [known for known in self.rows if known.get("epoch") != cells["epoch"]] + [cells]
        names = dict.fromkeys(name for known in self.rows for name in known)
        text = io.StringIO()
        table = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write(self.path, text.getvalue())

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Column -> (epoch, finite value)."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            for name, cell in row.items():
                if cell and math.isfinite(float(cell)):
                    found.setdefault(name, []).append((float(row["epoch"]), float(cell)))
        return found


def _is_shown(name: str) -> bool:
    return not name.startswith(HIDDEN)


def _step(row: Mapping[str, str]) -> float:
    """The step of a row; infinite for a line that somebody else has written."""
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf
