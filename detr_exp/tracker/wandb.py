"""Weights & Biases as a view of the run folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from detr_exp.tracker.base import IMPORT_LOCK, RunRecord, metrics_of, number_in
from detr_exp.values import Values


class WandbView:
    """Sends a run to Weights & Biases, or writes it to `<run folder>/wandb` if `WANDB_MODE=offline` or no key."""

    def open(self, folder: Path, record: RunRecord) -> None:
        with IMPORT_LOCK:
            import wandb

        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
        if offline:  # otherwise it prompts for a key on the terminal
            logging.getLogger("detr_exp.tracker").warning(
                "Weights & Biases has no key (wandb login); the run is written to %s, for `wandb sync`",
                folder / "wandb",
            )
        self.run = wandb.init(
            project=record.project,
            name=record.name,
            id=record.id,
            dir=str(folder),
            config={key: number_in(text) for key, text in record.params.items()},
            tags=[f"{key}={value}"[:64] for key, value in record.tags.items() if key in ("model", "loss", "data")],
            resume="allow",
            mode="offline" if offline else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.held = self.step = self.run.step  # it refuses steps before its last one

    def metrics(self, lines: list[Values]) -> None:
        for line in lines:
            if line["step"] >= self.held:
                values = {name: value for name, value in metrics_of(line).items() if value is not None}
                self.step = line["step"]
                self.run.log(values, step=self.step)

    def artifact(self, path: Path) -> None:
        self.run.save(str(path), base_path=str(path.parent), policy="now")

    def image(self, path: Path, name: str, step: int) -> None:
        import wandb

        # images arrive after metrics of later steps, when their step would be refused, so it is in the caption; without
        # any step the run would go to the next one, and refuse metrics that are still to come for this one
        self.run.log({name: wandb.Image(str(path), caption=f"step {step}")}, step=self.step)

    def model(self, path: Path, name: str) -> None:
        self.run.log_model(str(path), name=name)

    def close(self, record: RunRecord) -> None:
        self.run.summary["status"] = record.status
        self.run.finish(exit_code=0 if record.status in ("ok", "pruned") else 1)
