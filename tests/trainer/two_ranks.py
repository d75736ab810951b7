"""What one of two ranks does for `test_distributed.py`, which does the same alone and compares.

`python two_ranks.py FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment; everything found is
saved in FOLDER. All checks share the two processes: starting them costs more than the checks.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detr_exp import build
from detr_exp.cli import status_of
from detr_exp.signals import Interrupted
from detr_exp.structures import Batch, Targets
from detr_exp.trainer import distributed
from detr_exp.trainer.sharding import full_tensor
from detr_exp.trainer.trainer import Trainer
from detr_exp.trainer.validation import evaluate_split
from detr_exp.training import train_in

SHAPES = (
    "data=shapes",
    "data.source.size=64",
    "data.train=8",
    "data.val=5",
    "data.test=0",
    "data.num_workers=0",
    "data/augment=none",
    "tracker=none",
    "trainer/hardware=cpu",
    "trainer.hardware.amp=null",
    "trainer.hardware.products=torch",
    "trainer.hardware.threads=1",
    "trainer.batch_size=2",
    "trainer.eval_batch_size=1",
    "trainer.progress_bar=none",
    "trainer.num_pictures=0",
    "trainer.clip_max_norm=null",
    "model.image_size=[64,64]",
)
RTDETR = (
    "model.num_queries=20",
    "model.num_denoising=0",
    "model.num_layers=2",
    "model.hidden_dim=32",
    "model.num_heads=4",
    "model.dim_feedforward=32",
    "model.neck.hidden_dim=32",
    "model.neck.dim_feedforward=32",
    "model.backbone.widths=[8,16,24,32]",
)
RFDETR = (
    "loss=ia_bce",
    "model.backbone.width=32",
    "model.backbone.num_heads=2",
    "model.backbone.patch_size=8",
    "model.backbone.out_blocks=[1,2]",
    "model.hidden_dim=32",
    "model.dim_feedforward=32",
    "model.num_heads=2",
    "model.num_cross_heads=4",
    "model.num_layers=1",
    "model.num_queries=10",
    "model.num_groups=2",
)
NETWORKS = {
    "boxes": ("model=rtdetrv2_tiny", *RTDETR),
    "edges": ("model=dfine_tiny", "loss=dfine", *RTDETR),
    "poses": ("model=ecpose_s", "loss=pose", "matcher=pose", "model/backbone=tiny", *RTDETR),
    "rfdetr": ("model=rfdetr", *RFDETR),
    "masks": ("model=rfdetr_seg", *RFDETR),
    "keypoints": ("model=rfdetr_keypoint", *RFDETR),
}
ELASTIC = (*NETWORKS["boxes"], "trainer/elastic=full", "trainer.elastic.layers=[0.5]", "trainer.elastic.queries=[0.5]")
DISTILLED = (
    *(*NETWORKS["boxes"], "trainer/elastic=full", "trainer.elastic.sandwich=true", "trainer.elastic.num_random=2"),
    *("teacher=largest", "teacher.threshold=0.01"),
)
TEACHER = "teacher"  # folder of the run that teaches, in the folder of all
TAUGHT = (
    *("teacher=run", "loss/teacher=detr", "teacher.threshold=0.01"),
    *("model.hidden_dim=48", "model.neck.hidden_dim=48"),
)
# Their loss divides by a number that is known after the matching only. Ranks exchange it, micro-batches do not: two
# ranks take the step of one large batch, and norms, which see a batch each, stay as they are.
COUNTED = {"edges", "poses"}
RUN = (
    *(word for word in SHAPES if not word.startswith(("data.train", "data/augment"))),
    "data.train=16",
    *(word for word in RTDETR if "num_denoising" not in word),
    "model=rtdetrv2_tiny",
    "model.num_denoising=10",
    "data/augment=rtdetr",
    "data.multi_scale=[64,96]",
    "trainer.grad_accum_steps=2",
    "trainer.epochs=2",
    "trainer.log_every_steps=1",
    "trainer.deterministic=true",
    "optim.lr=1e-3",
)


def taught_words(folder: Path) -> tuple[str, ...]:
    """Overrides of the network of boxes with a teacher, and a projection to its maps."""
    return (*NETWORKS["boxes"], *TAUGHT, f"teacher.checkpoint={folder / TEACHER}")


def make_teacher(folder: Path) -> None:
    """The same one, wherever it is made."""
    train_in(folder / TEACHER, build.compose([*SHAPES, *NETWORKS["boxes"], "trainer.max_steps=1", "seed=1"]))


def empty(batch: Batch, first: int = 0) -> Batch:
    """The same pictures without objects, from the `first` one."""
    counts = batch.targets.counts
    kept = sum(counts[:first])
    rest = {
        name: value[:kept]
        for name in ("labels", "boxes", "masks", "keypoints")
        if (value := getattr(batch.targets, name)) is not None
    }
    return replace(batch, targets=Targets(**rest, counts=(*counts[:first], *[0] * len(counts[first:]))))


def one_step(
    *words: str, folder: Path, emptied: int | None = None, poisoned: int | None = None, frozen_norms: bool = False
) -> dict[str, Any]:
    """One step of SGD with rate 1, so that the change of the weights is the gradient.

    Args:
        words: of the command line.
        folder: of the run.
        emptied: part of the step (a micro-batch of one process, half of its only one, or a rank) whose pictures have
            no objects.
        poisoned: part of the step whose loss is not a number.
        frozen_norms: leave batch norms as they are.
    """
    cfg = build.compose([*SHAPES, *words])
    torch.manual_seed(0)
    trainer = build.trainer(cfg)
    run = build.run(cfg, folder)
    state = trainer.start(run)
    state.optimizer = torch.optim.SGD(state.parameters, lr=1.0)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 1.0
    state.schedule = lambda step: 1.0
    state.loader.batch_sampler.set_epoch(0)
    window = [batch for batch, _ in zip(state.loader, range(state.grad_accum_steps))]
    part = {distributed.rank(): 0} if distributed.world_size() > 1 else {i: i for i in range(len(window))}
    if emptied in part:
        window[part[emptied]] = empty(window[part[emptied]])
    elif emptied is not None and len(part) == 1 == distributed.world_size():
        window[0] = empty(window[0], len(window[0].images) // 2)
    if poisoned in part:
        window[part[poisoned]].images = window[part[poisoned]].images.float() * float("nan")
    evaluation = evaluate_split(trainer.settings, trainer.console, run, state, "val", "raw", True)
    images = run.make_metric("val").images
    detections = {number: torch.from_numpy(np.c_[found.boxes, found.scores]) for number, found in images.items()}
    state.network.train()
    for module in state.network.modules():
        if frozen_norms and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    trained = dict(state.network.named_parameters())
    if state.projection is not None:
        trained |= {f"projection.{name}": p for name, p in state.projection.named_parameters()}
    before = {name: full_tensor(p).detach().clone() for name, p in trained.items()}
    terms, skipped = trainer.train_step(run, state, window)
    after = {name: full_tensor(p).detach() for name, p in trained.items()}
    return {
        "gradient": {name: before[name] - after[name] for name in before},
        "terms": dict(zip(state.term_names, terms.tolist())),
        "skipped": float(skipped),
        "evaluation": {name: value for name, value in evaluation.items() if not name.startswith("time/")},
        "detections": detections,
    }


def run_in(folder: Path, *words: str, ends_at: int | None = None) -> None:
    """A training; with `ends_at` the last rank gets a signal in that step."""
    step = Trainer.train_step

    def step_then_signal(self: Trainer, run: Any, state: Any, window: Any) -> Any:
        if state.step + 1 == ends_at and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, run, state, window)

    Trainer.train_step = step_then_signal  # type: ignore[method-assign]
    try:
        train_in(folder, build.compose([*RUN, *words]))
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with distributed.process_group(torch.device("cpu"), 60, status_of):
        for name, words in NETWORKS.items():
            norms = {"frozen_norms": name in COUNTED}
            found[name] = one_step(*words, folder=folder, **norms)
            found[f"{name}, one rank without objects"] = one_step(*words, folder=folder, emptied=1, **norms)
        found["taught"] = one_step(*taught_words(folder), folder=folder)
        found["elastic"] = one_step(*ELASTIC, folder=folder)
        found["fsdp, elastic"] = one_step(*ELASTIC, "trainer.hardware.strategy=fsdp", folder=folder)
        found["distilled"] = one_step(*DISTILLED, folder=folder)
        found["fsdp, distilled"] = one_step(*DISTILLED, "trainer.hardware.strategy=fsdp", folder=folder)
        found["frozen"] = one_step(*NETWORKS["boxes"], folder=folder, frozen_norms=True)
        found["bad"] = one_step(*NETWORKS["boxes"], folder=folder, poisoned=1)
        fsdp = ("trainer.hardware.strategy=fsdp",)
        found["fsdp"] = one_step(*NETWORKS["boxes"], *fsdp, folder=folder)
        found["fsdp, taught"] = one_step(*taught_words(folder), *fsdp, folder=folder)
        found["fsdp, masks"] = one_step(*NETWORKS["masks"], *fsdp, folder=folder)
        found["fsdp, edges"] = one_step(*NETWORKS["edges"], *fsdp, folder=folder, frozen_norms=True)
        run_in(folder / "undisturbed")
        try:
            run_in(folder / "resumed", ends_at=3)
        except Interrupted as ending:
            found["ended by"] = ending.number
        run_in(folder / "resumed", "trainer.resume=auto")
        run_in(folder / "sharded", *fsdp)
        in_thread = ("trainer.checkpoint_in_background=true", "trainer.checkpoint_every_steps=1")
        try:
            run_in(folder / "sharded_resumed", *fsdp, *in_thread, ends_at=3)
        except Interrupted:
            run_in(folder / "sharded_resumed", *fsdp, *in_thread, "trainer.resume=auto")
        torch.save(found, folder / f"rank{distributed.rank()}.pt")
        if distributed.rank() == 1:
            raise ValueError("rank 1 has had enough")
        distributed.on_first_rank(str)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
