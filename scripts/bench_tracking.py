"""What tracking costs: `python scripts/bench_tracking.py`.

Prints the time of one `log` of 20 values in the training thread (median and worst, without and with an MLflow store
written behind it), and the time from `finish` until the store holds everything.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from detr_exp.tracker.tracker import Tracker

STEPS, PAUSE = 1000, 0.005  # a step of 5 ms, faster than any real one
VALUES = {f"train/loss_{i}": 0.123456789 * i for i in range(20)}


def measure(folder: Path, tracking_uri: str | None) -> None:
    folder.mkdir()
    tracker = Tracker(tracking_uri=tracking_uri, project="bench", run=None, tensorboard=False, wandb=False)
    begin = time.perf_counter()
    tracker.start(run_dir=folder, config={"seed": 0})
    started = time.perf_counter() - begin
    costs = []
    for step in range(STEPS):
        begin = time.perf_counter()
        tracker.log(step, VALUES)
        costs.append(time.perf_counter() - begin)
        time.sleep(PAUSE)
    begin = time.perf_counter()
    tracker.finish()
    finished = time.perf_counter() - begin
    median, worst = statistics.median(costs) * 1e6, max(costs) * 1e3
    print(
        f"{folder.name:<10} start {started * 1e3:6.1f} ms   log {median:6.1f} us (worst {worst:.1f} ms)   "
        f"finish {finished:.2f} s"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(folder / "none", None)
        measure(folder / "new-store", f"sqlite:///{name}/mlflow.db")
        measure(folder / "old-store", f"sqlite:///{name}/mlflow.db")


if __name__ == "__main__":
    main()
