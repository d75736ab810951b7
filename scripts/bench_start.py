"""How long a user waits before anything happens: help, a mistake, a sweep's plan, the start of a training.

python scripts/bench_start.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile

from measure import Section, beside, run

TRAIN = ["-m", "detr_exp.train"]
BUILD = """
from detr_exp import build
from detr_exp.trainer.garbage_collection import off_until_training
cfg = build.compose(["model=rtdetrv2_tiny", "data=shapes"])
with off_until_training():
    from detr_exp.tracker.tracker import Tracker
    trainer, data = build.trainer(cfg), build.data(cfg)
    network, criterion = build.network(cfg, data), build.criterion(cfg, data)
    optimizer = build.optimizer(cfg)(network)
"""
COMMAND = """
from detr_exp import cli, train
from detr_exp.trainer.garbage_collection import off_until_training

def started(cfg):
    with off_until_training():
        from detr_exp.trainer.trainer import Trainer

        Trainer.fit = lambda trainer, run: run.make_optimizer(run.network) and None
        train.train(cfg)

cli.main(started, "config", train.USAGE)
"""
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import rfdetr": ["-c", "import rfdetr"],
    "--help": [*TRAIN, "--help"],
    "a mistyped key": [*TRAIN, "loss.focal_gama=2"],
    "a mistyped option": [*TRAIN, "model=rtdetrv3"],
    "planning a sweep, refused": [*TRAIN, "--multirun", "loss=focal,vfl", "optim.lr=1e-4,2e-4", "data=shapes,coco"],
    "start of a training": ["-c", BUILD],
    "start of a training, the whole command": ["-c", COMMAND, "model=rtdetrv2_tiny", "data=shapes", "tracker=none"],
}
TEXT = """
CPU time of whole processes, Python's own start included. A training starts when network, data, criterion, optimiser and
trainer are there. They are made by `detr_exp.build`, with the garbage collector off until then as the command has it;
the row below is the command itself, which Hydra composes twice more and gives a folder, ended when its optimiser is
there. Nothing but Hydra is imported before a run really starts.
"""


def cpu_seconds(words: list[str], folder: str) -> float:
    """CPU time of one process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def bench(rounds: int) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        for words in COMMANDS.values():  # files into memory, byte code onto the disk
            cpu_seconds(words, folder)
        measured = [{name: cpu_seconds(words, folder) for name, words in COMMANDS.items()} for _ in range(rounds)]
    times = {name: [each[name] for each in measured] for name in COMMANDS}
    *quick, start, command = [name for name in COMMANDS if not name.startswith("import")]
    rows = [beside(name, times, name, "import torch", gate=0.25) for name in quick]
    rows.append(beside(start, times, start, "import rfdetr", gate=0.70))
    rows.append(beside(command, times, command, "import rfdetr"))
    return Section("Start", rows, TEXT, packages=("torch", "hydra-core", "rfdetr"))


if __name__ == "__main__":
    sys.exit(run("start", bench, __doc__, rounds=5))
