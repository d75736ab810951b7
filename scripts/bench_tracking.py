"""What a training step costs beyond its arithmetic: logging, timers, checks, the tracker.

python scripts/bench_tracking.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from measure import Row, Section, interleaved, run
from training_step import batch_of

from detr_exp import build
from detr_exp.signals import Interrupt
from detr_exp.structures import Batch
from detr_exp.trainer.hardware import cpu_has_bf16

SIDE, IMAGES, STEPS = 320, 2, 2000
AMP = "bf16" if cpu_has_bf16() else "null"
TEXT = f"""
The trainer's loop over {STEPS:,} steps whose arithmetic is left out, divided by what RT-DETRv2-R18's step at {SIDE} px
takes with it (batch {IMAGES}, {"bf16" if AMP == "bf16" else "float32"}). Every step is counted and checked, every 50th
read from the device, averaged, written as a line of JSON and, by another thread, into an MLflow store on disk, whose
import and first connection are left out.
"""


class Same:
    """A loader that repeats one batch."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times
        self.batch_sampler = SimpleNamespace(set_epoch=lambda epoch: None, set_start=lambda batch: None)

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.times)

    def __len__(self) -> int:
        return self.times


def wait_for_other_threads() -> None:
    """Until they have been idle for half a second."""
    while True:
        start = time.process_time()
        time.sleep(0.5)
        if time.process_time() - start < 0.02:
            return


def bench(rounds: int) -> Section:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        words = ["model=rtdetrv2", f"model.image_size=[{SIDE},{SIDE}]", "data=shapes", "data.num_workers=0"]
        quiet = ["trainer.num_pictures=0", "trainer.progress_bar=none", f"trainer.batch_size={IMAGES}"]
        store = [
            f"tracker.tracking_uri=sqlite:///{name}/mlflow.db",
            "trainer/hardware=cpu",
            f"trainer.hardware.amp={AMP}",
        ]
        cfg = build.compose([*words, *quiet, *store])
        folder = Path(name) / "run"
        folder.mkdir()
        job, trainer = build.run(cfg, folder), build.trainer(cfg)
        job.tracker.start(run_dir=folder, config=job.config)
        state = trainer.start(job)
        batch = batch_of(IMAGES, SIDE)
        batch.targets.labels %= job.data.num_classes
        state.loader = Same(batch, STEPS)
        step = median(interleaved({"step": lambda: trainer.train_step(job, state, [batch])}, rounds)["step"])
        result = trainer.train_step(job, state, [batch])
        trainer.train_step = lambda *_: result  # type: ignore[method-assign]
        with Interrupt() as interrupt:
            trainer.train_one_epoch(job, state, interrupt)  # opens the store
            wait_for_other_threads()
            start, of_thread = time.process_time(), time.thread_time()
            trainer.train_one_epoch(job, state, interrupt)
            own = (time.thread_time() - of_thread) / STEPS
            job.tracker.finish()  # waits until the store has everything
            whole = (time.process_time() - start) / STEPS
    detail = "{:.3f} of " + f"{step * 1e3:.0f} ms"
    rows = [
        Row("in the training thread", own / step, "the step", 0.02, detail.format(own * 1e3)),
        Row("with the thread that writes to MLflow", whole / step, "the step", 0.02, detail.format(whole * 1e3)),
    ]
    return Section("Logging, checks and tracking", rows, TEXT, packages=("torch", "mlflow"))


if __name__ == "__main__":
    sys.exit(run("tracking", bench, __doc__, rounds=5))
