"""The parts of a run, and its state, which changes during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_exp.data.dataset import DataSet
from detr_exp.loss.criterion import SetCriterion
from detr_exp.model.adapter.slim import BaseFile, load_own_state, own_state
from detr_exp.protocols import Counting, Metric, Network, Tracker
from detr_exp.tensor_files import Stored
from detr_exp.trainer import distributed
from detr_exp.trainer.elastic import Members
from detr_exp.trainer.ema import EMA
from detr_exp.trainer.precision import Precision
from detr_exp.trainer.selection import BestMetric, EarlyStopping
from detr_exp.trainer.sharding import optimizer_sharded_like, sharded_like
from detr_exp.trainer.teaching import Teaching

DECIDED = ("batch_size", "grad_accum_steps")
STAGES = ("first_stage_epoch", "best_since_return")  # later than the first checkpoints
COUNTED = ("epoch", "batch", "step", "moved", "closed", "log_count", "term_names", "bad_in_a_row")


@dataclass
class Run:
    """Everything a training needs, built by `build.run`.

    Attributes:
        data: the data set; `data.loader(...)` gives batches.
        network: on the CPU, with its starting weights.
        criterion: outputs, targets, num_boxes -> weighted terms and `total`.
        make_optimizer: network, and parameters trained beside it -> optimiser; called once they are on their device.
        make_schedule: (steps per epoch, total steps) -> (step -> factor of every base learning rate).
        make_metric: split name -> metric with the ground truth of this split; with image ids, only of these images.
        tracker: records metrics and files.
        config: resolved config, stored in every checkpoint.
        output_dir: the run folder.
        seed: determines all random numbers.
        identity: the same for runs with the same config; see `origin.identity`.
        resume_from: the checkpoint to resume from, or None.
        should_prune: (epoch from 1, monitored value) -> whether to end the run now; None: never.
        base: the file with the frozen parameters if an adapter is trained; None: checkpoints contain all parameters.
        start: `weights` (the word) and `sha256` of the initial weights, or `backbone` and `sha256`; None: random ones.
        share: how much of the network is from the file of initial weights, in words.
        teaching: by a teacher, or None.
    """

    data: DataSet
    network: Network
    criterion: SetCriterion
    make_optimizer: Callable[[Network, Sequence[nn.Parameter]], torch.optim.Optimizer]
    make_schedule: Callable[[int, int], Callable[[int], float]]
    make_metric: Callable[..., Metric]
    tracker: Tracker
    config: Stored
    output_dir: Path
    seed: int
    identity: str = ""
    resume_from: Path | None = None
    should_prune: Callable[[int, float], bool] | None = None
    base: BaseFile | None = None
    start: dict[str, str] | None = None
    share: str = ""
    teaching: Teaching | None = None

    def loader(self, split: str, batch_size: int, step_batches: int = 1) -> Any:
        """This rank's batches of a split; see `data.dataset.DataSet.loader`."""
        return self.data.loader(
            split,
            network=self.network,
            batch_size=batch_size,
            seed=self.seed,
            training=split == "train",
            step_batches=step_batches,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )


def nonfinite_costs(run: Run) -> int:
    """Number of matching costs so far that were not finite; 0 if the matcher does not count them."""
    matcher = run.criterion.matcher
    return matcher.num_non_finite if isinstance(matcher, Counting) else 0


@dataclass
class State:
    """The state of a training; `state_dict` is the part that `checkpoint.pth` contains.

    Attributes:
        batch_size: images of a micro-batch on one device.
        grad_accum_steps: micro-batches of a step.
        epoch: epochs finished.
        batch: micro-batches already used in the current epoch.
        is_slim: whether the frozen parameters are those of `Run.base` and not saved.
        products: the library of the matrix products; see `ops.products`.
        forward: the module that training steps call: the network, or a wrapper that averages gradients over ranks.
        best: of the evaluations of the `raw` and the `ema` weights, on `val`, which chooses.
        best_held_out: what the other half of the validation images would have chosen; empty without such a half.
        step: optimiser steps taken.
        moved: offset of the position in the schedule from `step`, after the number of ranks has changed.
        closed: the step of the last end of an epoch that was completed: evaluated if due, and saved.
        log_sums: sums of the loss terms `term_names` since the last line of the log, on the device.
        epoch_sums, epoch_count: the same of the steps of the current epoch.
        unread: (step, image ids, whether it was skipped) of the steps whose flag is not read from the device yet.
        bad_in_a_row: steps in a row that were skipped, as far as read.
        good_buffers: batch statistics after the last interval without such a step.
        num_low_evaluations: evaluations in a row with almost no correct detections; starts at 0 when a run resumes.
        logged_lines: lines of `metrics.jsonl` when the state was stored.
        first_stage_epoch: epochs finished at the best state of the first stage; see `second_stage`.
        best_since_return: in the second stage, the best value since it last went back to that state.
        teaching: see `Run`.
        members: of the network, that are trained together; None: it is trained alone.
    """

    network: Network
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    precision: Precision
    schedule: Callable[[int], float]
    loader: Any
    batch_size: int
    grad_accum_steps: int
    steps_per_epoch: int
    total_steps: int
    best: dict[str, BestMetric]
    best_held_out: dict[str, BestMetric]
    early_stopping: EarlyStopping | None
    is_slim: bool = False
    products: str = "torch"
    epoch: int = 0
    batch: int = 0
    step: int = 0
    moved: int = 0
    closed: int = 0
    log_sums: Tensor | None = None
    log_count: int = 0
    epoch_sums: Tensor | None = None
    epoch_count: int = 0
    term_names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    unread: list[tuple[int, list[int], Tensor]] = field(default_factory=list)
    bad_in_a_row: int = 0
    is_pruned: bool = False
    good_buffers: list[Tensor] = field(default_factory=list)
    num_low_evaluations: int = 0
    logged_lines: int = 0
    first_stage_epoch: int | None = None
    best_since_return: float | None = None
    teaching: Teaching | None = None
    members: Members | None = None

    @property
    def position(self) -> int:
        """Number of steps of an uninterrupted run with the same progress."""
        return self.step + self.moved

    @property
    def epoch_number(self) -> int:
        """The epoch of the last step, counted from 1."""
        return math.ceil(self.position / self.steps_per_epoch)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the network that checkpoints contain."""
        return own_state(self.network) if self.is_slim else self.network.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the result of `weights`, or full tensors with the same names.

        Raises:
            RuntimeError: the tensors do not fit.
        """
        weights = sharded_like(weights, self.network.state_dict())
        load_own_state(self.network, weights) if self.is_slim else self.network.load_state_dict(weights)

    def state_dict(self) -> Stored:
        return {
            "model": self.weights(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "log_sums": self.log_sums,
            "epoch_sums": self.epoch_sums,
            "epoch_count": self.epoch_count,
            "world_size": distributed.world_size(),
            "products": self.products,
            **{name: getattr(self, name) for name in (*DECIDED, *COUNTED, *STAGES)},
            "best": {name: best.state_dict() for name, best in self.best.items()},
            "best_held_out": {name: best.state_dict() for name, best in self.best_held_out.items()},
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping else None,
            **({} if self.projection is None else {"projection": self.projection.state_dict()}),
        }

    @property
    def trained(self) -> list[nn.Module]:
        """The modules that training steps call and that average their gradients over ranks."""
        beside = None if self.teaching is None else self.teaching.forward
        return [self.forward] if beside is None else [self.forward, beside]

    @property
    def projection(self) -> nn.Module | None:
        """What is trained beside the network, see `teaching`; None if nothing is."""
        return self.teaching.projection if self.teaching is not None and self.teaching.parameters else None

    def load_learnt(self, saved: Stored) -> None:
        """Load weights, averages and the moments of the optimiser, and no progress."""
        self.load_weights(saved["model"])
        if self.projection is not None:
            self.projection.load_state_dict(sharded_like(saved["projection"], self.projection.state_dict()))
        if self.ema is not None and saved["ema"] is not None:
            average = sharded_like(saved["ema"]["average"], self.ema.state_dict()["average"])
            self.ema.load_state_dict(saved["ema"] | {"average": average})
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer_sharded_like(saved["optimizer"], self.optimizer))
        for group, now in zip(self.optimizer.param_groups, settings):
            group.update(now)  # moments come from the file; rates, decays and all other settings from the config
        if saved["scaler"]:  # empty without loss scaling
            self.precision.scaler.load_state_dict(saved["scaler"])

    def load_state_dict(self, saved: Stored) -> None:
        self.load_learnt(saved)
        self.logged_lines = saved["logged_lines"]
        for name in COUNTED:
            setattr(self, name, saved[name])
        for name in STAGES:
            setattr(self, name, saved.get(name))
        self.epoch_count = saved.get("epoch_count", 0)  # later than the first checkpoints, as its sums are
        for name in ("log_sums", "epoch_sums"):
            sums = saved.get(name)
            setattr(self, name, None if sums is None else sums.to(self.precision.device))
        for name, best in self.best.items():
            best.load_state_dict(saved["best"][name])
        for name, best in self.best_held_out.items():
            best.load_state_dict(saved["best_held_out"][name])
        if self.early_stopping is not None and saved["early_stopping"] is not None:
            self.early_stopping.load_state_dict(saved["early_stopping"])


def floating_buffers(network: Network) -> list[Tensor]:
    """Batch statistics, which forward passes change."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]
