"""The training engine: one epoch, one step, one evaluation, each readable from top to bottom.

An optimiser step covers `grad_accum_steps` micro-batches. Its losses are divided by the number of boxes in all of
them, so that the gradient does not depend on how a batch is split. The random generator of a step is seeded with (seed,
step, micro-batch) and every sample is a function of (seed, epoch, index): there is no random state to save, and a
resumed run reproduces the uninterrupted run bit for bit.

Several ranks run the same code, each on its part of the images. Values on which they must agree are exchanged by the
functions of `distributed`, which return their argument if there is only one rank.
"""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detr_exp.data.loader import WorkerError, batches
from detr_exp.ops.resize import resized
from detr_exp.protocols import Network
from detr_exp.signals import Interrupt, Interrupted
from detr_exp.structures import Batch
from detr_exp.tensor_files import Stored
from detr_exp.trainer import distributed
from detr_exp.trainer.background import Background
from detr_exp.trainer.batch_size import find_batch_size, refuse_too_large
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.trainer.checkpoint_content import copy_as_numbered, save_training
from detr_exp.trainer.console import Console
from detr_exp.trainer.diagnosis.curves import Curves, save_label_statistics
from detr_exp.trainer.diagnosis.sanity import refuse_wrong_evaluator, save_training_samples
from detr_exp.trainer.diagnosis.skipped_images import record_skipped
from detr_exp.trainer.distributed import on_first_rank
from detr_exp.trainer.due import has_ended, is_evaluated, is_exhausted, is_pending
from detr_exp.trainer.elastic import WHOLE, as_member, complete_gradients, trained_members
from detr_exp.trainer.ema import EMA
from detr_exp.trainer.evaluation import as_float32
from detr_exp.trainer.garbage_collection import on_for_training
from detr_exp.trainer.pace import Pace
from detr_exp.trainer.parallel import gradient_exchange, parallel
from detr_exp.trainer.results import Results
from detr_exp.trainer.resume import copy_best_checkpoints, load_for_resuming, refuse_run_without_best, restore
from detr_exp.trainer.run_status import PrunedError
from detr_exp.trainer.second_stage import begin_or_return
from detr_exp.trainer.selection import BestMetric, EarlyStopping
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.skipped_steps import check_skipped_steps
from detr_exp.trainer.state import Run, State, floating_buffers, nonfinite_costs
from detr_exp.trainer.summary import print_epoch, print_start
from detr_exp.trainer.validation import evaluate_epoch, finish
from detr_exp.trainer.window import seed_step, windows


@dataclass
class Trainer:
    """Trains a `Run` with the given settings, and prints its progress on a console."""

    settings: Settings

    def __post_init__(self) -> None:
        self.console = Console(self.settings.progress_bar, is_enabled=distributed.rank() == 0)

    # ------------------------------------------------------------------------------------------------ the whole run

    def fit(self, run: Run, state: State) -> float | None:
        """Train, evaluate, save the best; returns the best monitored value (None if never evaluated).

        Args:
            run: with a started tracker.
            state: by `start`.

        Raises:
            Interrupted: a signal came; the state is saved.
            NonFiniteError: too many steps in a row were not finite.
            WorkerError: a process that loads images was lost; the state is saved.
            PrunedError: `run.should_prune` ended it; its files are complete.
        """
        for sentence in copy_best_checkpoints(run, state):
            self.console.line(sentence)
        save_training_samples(self.settings, run, state)
        save_label_statistics(self.settings, run)
        self.results, self.curves = Results(run.output_dir, state.closed), Curves(self.settings)
        self.pace.earlier = self.results.seconds
        is_owned = True if distributed.world_size() > 1 else None
        with on_for_training(), Interrupt(is_owned=is_owned) as interrupt, Background() as self.background:
            if run.resume_from == run.output_dir / NEWEST and state.closed == state.step > 0:
                self.save_numbered(run, state)  # a killed run may or may not have done this
            try:
                while is_pending(self.settings, state) or not has_ended(self.settings, state):
                    if is_pending(self.settings, state):
                        self.end_epoch(run, state, interrupt)
                    else:
                        self.train_one_epoch(run, state, interrupt)
            except WorkerError as error:  # between two steps
                if distributed.world_size() > 1:
                    raise  # the other ranks are in the middle of the next one
                self.save_newest(run, state, is_last=True)
                raise WorkerError(f"{error}. The state is saved; to resume: trainer.resume=auto") from error
            self.background.wait()
            best = finish(self.settings, self.console, run, state, interrupt)
        if state.is_pruned:
            raise PrunedError(best, state.epoch_number)
        return best

    def start(self, run: Run) -> State:
        """Move everything to its device, and restore the state of a resumed run; no file is touched.

        Raises:
            ValueError: data, weights or settings do not fit.
        """
        if self.settings.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
        saved = None if run.resume_from is None else load_for_resuming(run.resume_from, run.config)
        hardware = self.settings.hardware.decided(None if saved is None else saved.get("products", "torch"))
        settings = self.settings = replace(self.settings, hardware=hardware)
        network = hardware.place(run.network)
        run.criterion.to(hardware.torch_device)
        if run.teaching is not None:
            run.teaching.place(hardware)
        run.start = run.start if saved is None else saved.get("start")
        batch_size, grad_accum_steps = self.batch(run, network, saved)
        parts = network, run.data, run.criterion, run.teaching
        members = trained_members(settings.elastic, *parts, hardware.compile)
        if hardware.compile:
            run.criterion.compile()
        forward = parallel(network, settings.hardware.strategy)
        if run.teaching is not None:
            run.teaching.wrap(settings.hardware.strategy)
        beside = [] if run.teaching is None else run.teaching.parameters
        loader = run.loader("train", batch_size, grad_accum_steps)
        steps_per_epoch = math.ceil(len(loader) / grad_accum_steps)
        total_steps = steps_per_epoch * math.ceil(settings.epochs)
        if (last := settings.last_step(steps_per_epoch)) is not None:
            total_steps = min(total_steps, last)
        best = {which: BestMetric(settings.skip_best_epochs, settings.smooth_alpha) for which in ("raw", "ema")}
        state = State(
            network=network,
            forward=forward,
            optimizer=run.make_optimizer(network, beside),
            ema=EMA(
                network,
                decay=settings.ema_decay,
                tau=settings.ema_tau,
                update_interval=settings.ema_update_interval,
                copy_first=settings.ema_copy_first,
            )
            if settings.use_ema
            else None,
            precision=settings.hardware.precision(),
            schedule=run.make_schedule(steps_per_epoch, total_steps),
            loader=loader,
            batch_size=batch_size,
            grad_accum_steps=grad_accum_steps,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            best=best,
            best_held_out={} if run.data.held_out is None else deepcopy(best),
            early_stopping=EarlyStopping(
                settings.early_stopping_patience,
                settings.early_stopping_min_delta,
                settings.skip_best_epochs,
            )
            if settings.early_stopping
            else None,
            parameters=[p for p in (*network.parameters(), *beside) if p.requires_grad],
            is_slim=run.base is not None,
            products=hardware.library,
            teaching=run.teaching,
            members=members,
        )
        if saved is not None:
            for sentence in restore(saved, run, state):
                self.console.line(sentence)
            refuse_run_without_best(self.settings, saved, run, state)
        state.good_buffers = [buffer.clone() for buffer in floating_buffers(network)]
        self.pace = Pace(state)
        print_start(self.console, settings, run, state)
        refuse_wrong_evaluator(run)
        return state

    def batch(self, run: Run, network: Network, saved: Stored | None) -> tuple[int, int]:
        """Images per device and batches per step; a resumed run with `auto` uses the values chosen before.

        Raises: ValueError when the batch does not fit into memory.
        """
        if self.settings.batch_size == "auto":
            if saved is not None:
                return saved["batch_size"], saved["grad_accum_steps"]
            return min(distributed.gather(find_batch_size(self.settings, run, network, distributed.world_size())))
        refuse_too_large(self.settings, run, network, int(self.settings.batch_size))
        return int(self.settings.batch_size), self.settings.grad_accum_steps

    def end_epoch(self, run: Run, state: State, interrupt: Interrupt) -> None:
        """Evaluate if due, save, and only then print metrics, because a user who reads them may end the run.

        Within an epoch, with `eval_every_steps`, training goes on afterwards.
        """
        found: dict[str, dict[str, float]] = {}
        logged: dict[str, float] = {}
        if is_evaluated(self.settings, state):
            try:
                found, logged = evaluate_epoch(self.settings, self.console, run, state, interrupt)
            except Interrupted:
                self.save_newest(run, state, is_last=True)  # `closed` is unchanged, so the evaluation is repeated
                raise
        on_first_rank(self.results.add, self.pace.row() | logged)
        state.closed = state.step
        self.background.wait()  # before the state of the first stage is written or read
        begin_or_return(self.settings, self.console, run, state, found)
        self.save_newest(run, state)
        print_epoch(self.console, self.settings, state, self.pace, found)
        on_first_rank(self.curves.draw, run, self.results, state.step, has_ended(self.settings, state))
        if state.early_stopping and state.early_stopping.is_reached:
            self.console.line(
                f"early stopping: no improvement above {self.settings.early_stopping_min_delta} in "
                f"{self.settings.early_stopping_patience} evaluations"
            )
        self.save_numbered(run, state)

    def save_numbered(self, run: Run, state: State) -> None:
        """Save the newest checkpoint under the number of its epoch, if due."""
        if state.epoch % self.settings.checkpoint_interval == 0 and state.batch == 0:
            copy_as_numbered(run, state, self.settings.keep_checkpoints, self.thread())

    def save_newest(self, run: Run, state: State, *, is_last: bool = False) -> None:
        """Write `checkpoint.pth`; if this process ends then, at once."""
        check_skipped_steps(self.settings, state)
        self.background.wait()
        save_training(run, state, background=None if is_last else self.thread())

    def thread(self) -> Background | None:
        return self.background if self.settings.checkpoint_in_background else None

    # -------------------------------------------------------------------------------------------------- one epoch

    def train_one_epoch(self, run: Run, state: State, interrupt: Interrupt) -> None:
        """Train to the end of the current epoch, starting at `state.batch`."""
        state.network.train()
        sampler = state.loader.batch_sampler
        sampler.set_epoch(state.epoch)
        run.criterion.begin_epoch(state.epoch)
        sampler.set_start(state.batch)
        self.pace.begin_epoch()
        with self.console.progress(f"epoch {state.epoch + 1}/{self.settings.epochs}", state.steps_per_epoch) as meter:
            if state.batch:
                meter(advance=state.batch // state.grad_accum_steps)
            for window in windows(batches(state.loader), state.grad_accum_steps):
                terms, skipped = self.train_step(run, state, window)
                state.step += 1
                state.batch += len(window)
                record_skipped(run, state.step, window)
                state.unread.append((state.step, [i for batch in window for i in batch.image_ids], skipped))
                self.pace.add(terms, sum(len(batch) for batch in window) * distributed.world_size())
                if state.step % self.settings.log_every_steps == 0 or state.step == state.total_steps:
                    self.log_train(run, state)
                meter(self.pace.status)
                if self.settings.checkpoint_every_steps and state.step % self.settings.checkpoint_every_steps == 0:
                    self.save_newest(run, state)
                if number := distributed.signal_of_any_rank(interrupt.number):
                    self.save_newest(run, state, is_last=True)
                    raise Interrupted(number)
                if is_exhausted(self.settings, state):
                    break
                if state.batch < len(state.loader) and is_pending(self.settings, state):
                    with self.pace.paused():
                        self.end_epoch(run, state, interrupt)
                    if has_ended(self.settings, state):
                        break
            else:
                state.epoch += 1
                state.batch = 0
        check_skipped_steps(self.settings, state)

    def train_step(self, run: Run, state: State, window: list[Batch]) -> tuple[Tensor, Tensor]:
        """One optimiser step over the micro-batches of `window`.

        Returns:
            the loss terms and the gradient norm `[N + 1]`, and whether the step was not finite `[]`; on the device.
        """
        began, teaching = time.process_time(), state.teaching
        factor = state.schedule(state.position)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        num_boxes, num_images, most_objects = distributed.count_over_ranks(window)
        over_ranks = distributed.mean_over_ranks if distributed.world_size() > 1 else None
        members = [WHOLE] if state.members is None else state.members.of_step(run.seed, state.step)
        sums: dict[str, Tensor] = {}
        for micro, batch in enumerate(window):
            batch = batch.to(state.precision.device, non_blocking=True)
            distributed.sync_denoising(state.network, most_objects[micro])
            for member in members:
                seed_step(run.seed, state.step, micro)
                last = micro == len(window) - 1 and member is members[-1]
                with as_member(state.network, member), gradient_exchange(state.trained, last):
                    with state.precision.autocast():
                        images = batch.pixels(state.precision.memory_format)
                        inputs, padding_mask = resized(images, batch.padding_mask, member.image_size)
                        outputs = state.forward(inputs, batch.targets, padding_mask)
                    taught = teaching and teaching(batch, images, outputs, state.precision, member)
                    losses = run.criterion(
                        as_float32(outputs), batch.targets, num_boxes, num_images, over_ranks, taught
                    )
                    if state.members is not None:
                        losses = state.members.share_of_mean(losses, len(members), state.forward if last else None)
                    state.precision.backward(losses["total"])
                for name, value in losses.items():
                    sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        if state.members is not None:
            complete_gradients(state.parameters)
        terms = distributed.mean_over_ranks(torch.stack(list(sums.values())))
        total = terms[list(sums).index("total")]
        norm, skipped = state.precision.step(state.optimizer, state.parameters, self.settings.clip_max_norm, total)
        if state.ema is not None:
            state.ema.update(skipped)
        state.term_names = [*sums, "grad_norm"]
        if teaching is not None:
            teaching.step_seconds += time.process_time() - began
        return torch.cat([terms, norm[None]]), skipped

    def log_train(self, run: Run, state: State) -> None:
        """Log mean losses since the last line, learning rates, and skipped steps; reads the device once."""
        assert state.log_sums is not None
        means = (state.log_sums / state.log_count).tolist()
        state.log_sums, state.log_count = None, 0
        values = {f"train/{name}": value for name, value in zip(state.term_names, means)}
        values = {"train/loss": values.pop("train/total"), **values}  # compare pages begin with the first metric
        values["train/epoch"] = state.position / state.steps_per_epoch
        rates = [group["lr"] for group in state.optimizer.param_groups]
        values |= {"train/lr": max(rates), "train/lr_min": min(rates)}
        values["time/images_per_second"] = self.pace.rate
        if state.precision.device.type == "cuda":
            values["system/gpu_memory_gib"] = self.pace.memory
        if state.teaching is not None:
            values["time/teacher_share"] = state.teaching.share_of_time()
        values["train/nonfinite_steps"] = check_skipped_steps(self.settings, state)
        values["train/nonfinite_costs"] = nonfinite_costs(run)
        run.tracker.log(state.step, values)
