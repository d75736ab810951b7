"""What a sweep costs for each run beyond the run itself.

python scripts/bench_sweep.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import sys
import tempfile
from statistics import median

from bench_start import cpu_seconds
from measure import Row, Section, run

MORE = 8
GATE = 0.15
TEXT = f"""
CPU time of a serial sweep of {MORE + 1} runs (`hydra/launcher=basic`, MLflow in a new sqlite store) less that of one
run, divided by {MORE}. A run composes its config, is created in the store under the sweep's with parameters, tags and
its config, logs one line and is ended; it neither builds nor trains anything. The second row does without MLflow.
"""
SWEEP = """
import sys
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from detr_exp import cli
from detr_exp.tracker.tracker import Tracker

def task(cfg):
    folder, job = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get()
    config = OmegaConf.to_container(cfg, resolve=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    tracker = Tracker(**{key: value for key, value in config["tracker"].items() if key != "_target_"})
    tracker.start(run_dir=folder, config=config, choices=job.runtime.choices, overrides=job.overrides.task)
    tracker.log(1, {"val/mAP": 0.5})
    tracker.finish()
    return 0.5

cli.main(task, "config", "")
"""


def bench(rounds: int) -> Section:
    several = ",".join(f"{number}e-4" for number in range(1, MORE + 2))
    words = {
        "torch": ["-c", "import torch"],
        **{f"{tracker} {count}": ["-c", SWEEP, "--multirun", f"tracker={tracker}", f"optim.lr={rates}"]
           for tracker in ("mlflow", "none") for count, rates in (("one", "1e-4"), ("all", several))},
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in words}
    for measured in [False] + [True] * rounds:  # files into memory, byte code onto the disk
        for name, command in words.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds = cpu_seconds(command, folder)
            if measured:
                times[name].append(seconds)
    rows = []
    for tracker, gate in (("mlflow", GATE), ("none", None)):
        pairs = zip(times[f"{tracker} all"], times[f"{tracker} one"], times["torch"])
        each = [((all_runs - one) / MORE, torch) for all_runs, one, torch in pairs]
        detail = f"{median(run for run, _ in each) * 1e3:.0f} / {median(torch for _, torch in each) * 1e3:.0f} ms"
        value = median(run / torch for run, torch in each)
        rows.append(Row(f"a run of a sweep, tracker={tracker}", value, "import torch", gate, detail))
    return Section("Sweep", rows, TEXT, packages=("torch", "hydra-core", "mlflow"))


if __name__ == "__main__":
    sys.exit(run("sweep", bench, __doc__, rounds=5))
