"""TensorBoard event files as a view of the run folder."""

from __future__ import annotations

from pathlib import Path

from detr_exp.tracker.base import IMPORT_LOCK, RunRecord, metrics_of, number_in
from detr_exp.values import Values


class TensorBoardView:
    """Writes event files into `<run folder>/tensorboard`.

    When a run resumes they are written again from the journal, so that they contain no step twice.
    """

    def open(self, folder: Path, record: RunRecord) -> None:
        with IMPORT_LOCK:
            from torch.utils.tensorboard import SummaryWriter

        for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.params, self.measured = record.params, set[str]()
        self.writer.add_text("params", "\n".join(f"- {key}: {value}" for key, value in record.params.items()))

    def metrics(self, lines: list[Values]) -> None:
        for line in lines:
            for name, value in metrics_of(line).items():
                if value is not None:
                    self.measured.add(name)
                    self.writer.add_scalar(name, value, line["step"], walltime=line["time/unix"])
        self.writer.flush()

    def artifact(self, path: Path) -> None:
        """TensorBoard stores no files; the file is in the run folder."""

    def image(self, path: Path, name: str, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def model(self, path: Path, name: str) -> None:
        """TensorBoard has no model registry."""

    def close(self, record: RunRecord) -> None:
        """With the parameters for the page HPARAMS, beside the best values, or the last ones where there are none."""
        from torch.utils.tensorboard.summary import hparams

        best = {name for name in self.measured if name.startswith("best/")} - {"best/epoch"}
        metrics = dict.fromkeys(sorted(best or self.measured & {"val/mAP", "train/loss"}), 0.0)
        for summary in hparams({key: number_in(text) for key, text in self.params.items()}, metrics):
            self.writer._get_file_writer().add_summary(summary)
        self.writer.close()
