"""Images that a run had to skip: listed in a file, and counted in a metric."""

from __future__ import annotations

from collections.abc import Sequence

from detr_exp.structures import Batch
from detr_exp.terminal import say
from detr_exp.trainer.state import Run
from detr_exp.writing import write

FILE = "skipped_images.txt"


def record_skipped(run: Run, step: int, batches: Sequence[Batch]) -> None:
    """Add the images of some batches that could not be read to `skipped_images.txt`, and log their number.

    Args:
        run: its folder has the file.
        step: of the training.
        batches: as loaded.
    """
    found = {" ".join(sentence.split()) for batch in batches for sentence in batch.skipped}
    if not found:
        return
    path = run.output_dir / FILE
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if new := sorted(found.difference(known)):
        write(path, "".join(f"{sentence}\n" for sentence in (*known, *new)))
        run.tracker.log(step, {"data/skipped_images": len(known) + len(new)})
        for sentence in new:
            say(f"skipped: {sentence}")
