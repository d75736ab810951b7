"""Kill a training ten times, let it go on each time, and compare it bit by bit with one that was left in peace.

    python scripts/kill_and_resume.py [--kills 10] [--seed 0] [--only NAME]

Moments are sampled: one before the first checkpoint, three while a checkpoint is being written, one in an evaluation,
the others anywhere in a step. Afterwards the tensors of all checkpoints and all metrics but `time/*` and `system/*`
must be equal. Two controls that leave something out on purpose must not be. Exit status 1 where that is not so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WORDS = (
    *("data=shapes", "data.source.size=64", "data.train=48", "data.val=8", "data.test=4"),
    *("model.image_size=[64,64]", "model.num_queries=20", "trainer/hardware=cpu", "trainer.hardware.amp=null"),
    *("trainer.epochs=6", "trainer.batch_size=2", "trainer.grad_accum_steps=2", "trainer.deterministic=true"),
    *("trainer.checkpoint_every_steps=5", "trainer.checkpoint_interval=2", "trainer.log_every_steps=3"),
    *("trainer.num_pictures=0", "trainer.run_test=true", "trainer.resume=auto", "trainer.hardware.threads=1"),
)
RTDETR = (
    *("model.num_denoising=10", "model.num_layers=2", "model.hidden_dim=32", "model.num_heads=4"),
    *("model.dim_feedforward=32", "model.neck.hidden_dim=32", "model.neck.dim_feedforward=32"),
    "model.backbone.widths=[8,16,24,32]",
)
RFDETR = (
    *("model=rfdetr", "loss=ia_bce", "model.backbone.width=32", "model.backbone.num_heads=2"),
    *("model.backbone.patch_size=8", "model.backbone.out_blocks=[1,2]", "model.backbone.drop_path=0.2"),
    *("model.hidden_dim=32", "model.dim_feedforward=32", "model.num_heads=2", "model.num_cross_heads=4"),
    *("model.num_layers=1", "model.num_groups=2"),
)
RUNS = {
    "no workers, multi-scale, MLflow": (*RTDETR, "data.num_workers=0", "data.multi_scale=[64,96]", "tracker=mlflow"),
    "2 workers, multi-scale, gradient checkpointing, both weights": (
        *(*RTDETR, "data.num_workers=2", "data.multi_scale=[64,96]", "trainer.hardware.gradient_checkpointing=true"),
        *("trainer.evaluate_weights=both", "trainer.early_stopping=true", "tracker=none"),
    ),
    "RF-DETR, 2 workers, gradient checkpointing, EMA every 2 steps": (
        *(*RFDETR, "data.num_workers=2", "trainer.hardware.gradient_checkpointing=true"),
        *("trainer.ema_update_interval=2", "trainer.ema_copy_first=true", "tracker=none"),
    ),
}


def start(folder: Path, words: tuple[str, ...], moment: str = "none") -> int:
    """Run the training in a process of its own that kills itself at `moment`; its exit status."""
    call = [sys.executable, __file__, "--child", moment, *words, f"hydra.run.dir={folder}"]
    done = subprocess.run(call, cwd=folder.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{moment}: {done.stderr.decode()[-3000:]}")
    return done.returncode


def child(moment: str, words: list[str]) -> None:
    """The training itself, with something in it that kills it.

    Args:
        moment: `none`; `step:N:S` kills S seconds after the N-th step of this process began; `write:N:F` when a share F
            of the N-th checkpoint is written (1: all of it, but under its temporary name); `evaluation:N` at the N-th
            image that is evaluated; `forget:rng` leaves out the seed of every step.
        words: of the command line.
    """
    from detr_exp import train
    from detr_exp.structures import Detections
    from detr_exp.trainer import checkpoint, evaluation, trainer

    kind, *numbers = moment.split(":")
    left = [int(numbers[0])] if kind in ("step", "write", "evaluation") else [0]

    def now(which: str) -> bool:
        left[0] -= which == kind
        return which == kind and left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    step, write, on_host = trainer.Trainer.train_step, checkpoint.write, evaluation.on_host

    def step_or_die(self: Any, *args: Any) -> Any:
        if now("step"):
            threading.Timer(float(numbers[1]), die).start()
        return step(self, *args)

    def write_or_die(path: Path, content: Any) -> None:
        if now("write"):
            whole = io.BytesIO()
            content(whole)
            part = whole.getvalue()[: int(float(numbers[1]) * len(whole.getvalue()))]
            write(path, lambda file: (file.write(part), file.flush(), os.fsync(file.fileno()), die()))
        write(path, content)

    def on_host_or_die(detections: list[Detections]) -> list[Detections]:
        if sum(now("evaluation") for _ in detections):
            die()
        return on_host(detections)

    trainer.Trainer.train_step = step_or_die  # type: ignore[method-assign]
    checkpoint.write, evaluation.on_host = write_or_die, on_host_or_die
    if moment == "forget:rng":
        trainer.seed_step = lambda *_: None
    sys.argv = ["detr_exp", *words]
    train.main()


def moments(kills: int, rng: random.Random) -> list[str]:
    """When to kill: the first time before there is a checkpoint, then a mixture in random order."""
    writes = [f"write:{rng.randint(1, 3)}:{rng.choice([rng.random(), 1.0]):.3f}" for _ in range(3)]
    others = [f"evaluation:{rng.randint(1, 12)}"]
    others += [f"step:{rng.randint(4, 14)}:{0.05 * rng.random():.4f}" for _ in range(kills - 5)]
    mixed = [*writes, *others]
    rng.shuffle(mixed)
    return [f"step:{rng.randint(1, 4)}:{0.02 * rng.random():.4f}", *mixed]


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Places in which two nests of plain values and tensors are not bit-equal."""
    import torch

    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys(), key=str)
        keys = [key for key in keys if not str(key).startswith(("time/", "system/"))]
        return [found for key in keys for found in differences(one.get(key), two.get(key), f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return [found for i, pair in enumerate(zip(one, two)) for found in differences(*pair, f"{where}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if torch.equal(one, two) else [where]
    return [] if one == two else [f"{where}: {one!r:.60} and {two!r:.60}"]


def compare(one: Path, two: Path) -> list[str]:
    """Where the checkpoints and metrics of two run folders differ."""
    from detr_exp.trainer.checkpoint import load

    found = differences(metrics(one), metrics(two), "metrics")
    names = [{path.name for path in folder.glob("checkpoint*.pth")} for folder in (one, two)]
    found += [f"{name} is in one of the folders only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        found += differences(load(one / name), load(two / name), name)
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def disturb(folder: Path, words: tuple[str, ...], plan: list[str]) -> int:
    """Train with all interruptions of `plan`, then to the end; how many kills there were."""
    kills, identity = 0, None
    for moment in plan:
        kills += start(folder, words, moment) != 0
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        identity = identity or record["id"]
        if record["id"] != identity:
            raise RuntimeError(f"after {moment} the run has another name")
    start(folder, words)
    return kills


def stored_twice(store: Path) -> list[str]:
    """What an MLflow store holds too often: runs of the disturbed training, or a step of a metric."""
    with sqlite3.connect(store) as base:
        runs = base.execute("select count(*) from runs").fetchone()[0]
        twice = base.execute(
            "select key, step, count(*) from metrics where key not like 'system/%' and key not like 'time/%' "
            "group by run_uuid, key, step having count(*) > 1"
        ).fetchall()
    return ([f"{runs} runs instead of 2"] if runs != 2 else []) + [f"{key} at step {step}" for key, step, _ in twice]


def controls(killed: Path, words: tuple[str, ...], undisturbed: Path) -> list[str]:
    """Which of two losses went unnoticed: the position in the epoch, and the seeds of the steps."""
    from detr_exp.trainer import checkpoint

    unnoticed = []
    for name, moment in (("sampler position", "none"), ("RNG", "forget:rng")):
        folder = killed.with_name(f"without {name}".replace(" ", "-"))
        shutil.copytree(killed, folder)
        if moment == "none":
            state = checkpoint.load(folder / checkpoint.NEWEST)
            checkpoint.save(state | {"batch": 0}, folder / checkpoint.NEWEST)
        start(folder, words, moment)
        if not compare(undisturbed, folder):
            unnoticed.append(name)
        shutil.rmtree(folder)
    return unnoticed


def rehearse(name: str, kills: int, seed: int) -> bool:
    """One kind of run, undisturbed and disturbed; whether all is as it should be."""
    begin = time.perf_counter()
    plan = moments(kills, random.Random(f"{seed} {name}"))
    with tempfile.TemporaryDirectory() as base:
        words = (*WORDS, *RUNS[name])
        if "tracker=mlflow" in words:
            words = (*words, f"tracker.tracking_uri=sqlite:///{base}/mlflow.db")
        peace, disturbed, killed = (Path(base) / part for part in ("peace", "disturbed", "killed"))
        start(peace, words)
        done = disturb(disturbed, words, plan)
        wrong = compare(peace, disturbed)
        if "tracker=mlflow" in words:
            wrong += stored_twice(Path(base) / "mlflow.db")
        start(killed, (*words, "tracker=none"), "step:18:0.01")
        unnoticed = controls(killed, (*words, "tracker=none"), peace)
    seconds = time.perf_counter() - begin
    print(f"{name}: {done} kills ({', '.join(plan)}); {len(wrong)} differences, {seconds:.0f} s", flush=True)
    for line in wrong[:20]:
        print(f"  {line}")
    for line in unnoticed:
        print(f"  left out, and not noticed: {line}")
    return not wrong and not unnoticed and done == len(plan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a part of the name of a run")
    arguments = parser.parse_args()
    names = [name for name in RUNS if arguments.only is None or arguments.only in name]
    as_it_should_be = [rehearse(name, arguments.kills, arguments.seed) for name in names]
    return int(not all(as_it_should_be))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
