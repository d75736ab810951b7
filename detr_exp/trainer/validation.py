"""Evaluation between epochs and after the last one: evaluate, log, save the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from functools import partial

from detr_exp.config.mistakes import did_you_mean
from detr_exp.data.joined import image_ids_by_set
from detr_exp.data.loader import WorkerError
from detr_exp.data.splits import HELD_OUT
from detr_exp.metric.backend import CocoEvaluation
from detr_exp.metric.honest import Choice, flattery
from detr_exp.protocols import Metric
from detr_exp.signals import Interrupt, Interrupted
from detr_exp.structures import Batch, Detections
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.checkpoint_content import NonFiniteError, inference_content
from detr_exp.trainer.console import Console, number
from detr_exp.trainer.diagnosis.no_detections import check_evaluation
from detr_exp.trainer.diagnosis.predictions import PredictionSheet, names_in, save_evaluation_charts
from detr_exp.trainer.diagnosis.skipped_images import record_skipped
from detr_exp.trainer.diagnosis.worst_images import save_details
from detr_exp.trainer.distributed import on_first_rank, sync_buffers
from detr_exp.trainer.due import is_within_epoch
from detr_exp.trainer.evaluation import evaluate, headline, parts_of
from detr_exp.trainer.resume import is_loss
from detr_exp.trainer.selection import BestMetric
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.sharding import gathered_weights
from detr_exp.trainer.state import Run, State, floating_buffers
from detr_exp.trainer.summary import print_result

DEFAULT_MONITORS = ("keypoint_mAP", "segm_mAP", "mAP")


def evaluate_epoch(
    settings: Settings, console: Console, run: Run, state: State, interrupt: Interrupt
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Evaluate on the validation split, log, save the best checkpoint, and update early stopping.

    Returns:
        all metrics of the evaluated weights: `ema`, `raw` or both; and the logged values.

    Raises:
        Interrupted: a signal came; the state is unchanged.
        WorkerError: a process that loads images was lost; the state is unchanged.
    """
    values: dict[str, float] = {}
    evaluated: dict[str, dict[str, float]] = {}
    monitored_values: dict[str, float] = {}
    before = [(best, best.state_dict()) for of in (state.best, state.best_held_out) for best in of.values()]
    epoch = state.epoch_number - 1
    run.criterion.begin_epoch(epoch)
    for which in weights_to_evaluate(settings, state):
        images = PredictionSheet(
            run.data, names_in(run.data.split("val")), settings.num_pictures, settings.picture_threshold
        )
        with_loss = needs_val_loss(settings)
        try:
            found = evaluate_split(settings, console, run, state, "val", which, with_loss, images, interrupt)
            beside = {}
            if run.data.held_out is not None:
                beside = evaluate_split(settings, console, run, state, HELD_OUT, which, with_loss, interrupt=interrupt)
        except (Interrupted, WorkerError):
            for best, stored in before:
                best.load_state_dict(stored)
            raise
        for split, measured in (("val", found), (HELD_OUT, beside)):
            if settings.evaluate_weights == "both":
                values |= {f"{split}/{which}_{name}": value for name, value in measured.items() if "/" not in name}
            values |= named(settings, split, measured)
        monitored_values[which] = monitored(settings, found)
        held_out = monitored(settings, beside) if beside else None
        if held_out is not None:
            if not math.isfinite(held_out):
                monitored_values[which] = math.nan  # diverged, although val does not show it
            state.best_held_out[which].update(held_out, epoch, monitored_values[which])
        if state.best[which].update(monitored_values[which], epoch, held_out):
            content = inference_content(run, state, which, found) | ({HELD_OUT: beside} if beside else {})
            on_first_rank(files.save, content, run.output_dir / files.BEST[which])
            if winner_of(state) == which:
                metric = run.make_metric("val")
                on_first_rank(save_details, run, "val", metric, found, state.step, settings.num_pictures)
                on_first_rank(save_evaluation_charts, run, found, state.step)
        evaluated[which] = found
        on_first_rank(check_evaluation, console, run, state, which, found)
        image = on_first_rank(images.save, run.output_dir / "predictions", state.step)
        if image is not None:
            run.tracker.image(image, "predictions", state.step)
    values["val/epoch"] = state.position / state.steps_per_epoch
    run.tracker.log(state.step, values)
    if run.should_prune is not None and not is_within_epoch(settings, state):  # pruners count epochs
        state.is_pruned = on_first_rank(run.should_prune, state.epoch_number, monitored_values[which])
    if state.early_stopping:
        state.early_stopping.update(stopping_value(settings, monitored_values), epoch)
    return evaluated, values


def evaluate_split(
    settings: Settings,
    console: Console,
    run: Run,
    state: State,
    split: str,
    which: str,
    with_loss: bool,
    images: PredictionSheet | None = None,
    interrupt: Interrupt | None = None,
) -> dict[str, float]:
    """Metrics of the EMA or the raw weights on one split.

    Raises:
        Interrupted: a signal came.
    """
    loader = run.loader(split, settings.eval_batch_size or state.batch_size)
    weights = state.ema.swapped(state.network) if which == "ema" and state.ema else nullcontext()
    with (
        weights,
        gathered_weights(state.network),
        console.progress(f"evaluating {split}", len(loader)) as meter,
    ):
        sync_buffers(floating_buffers(state.network))

        def on_batch(batch: Batch, detections: list[Detections]) -> None:
            meter()
            record_skipped(run, state.step, [batch])
            if images is not None:
                images.add(batch, detections)

        return evaluate(
            state.network,
            loader,
            run.make_metric(split),
            settings.hardware.precision(evaluating=True),
            criterion=run.criterion if with_loss else None,
            parts=parts_of(run.data.split(split), partial(run.make_metric, split)),
            on_batch=on_batch,
            interrupt=interrupt,
        )


def finish(settings: Settings, console: Console, run: Run, state: State, interrupt: Interrupt) -> float | None:
    """Write `checkpoint_best_total.pth` (the better of EMA and raw), evaluate it on the test split, return its value.

    Raises:
        Interrupted: a signal came; a resumed run repeats this.
        NonFiniteError: no evaluation gave a finite value.
    """
    winner = winner_of(state)
    total = run.output_dir / files.BEST_TOTAL
    if winner is None and (lost := sum(best.lost for best in state.best.values())):
        raise NonFiniteError(
            f"{settings.monitor or 'mAP'} was no finite number in any of {lost} evaluations, so no checkpoint is the "
            f"best; the last weights are in {run.output_dir / files.NEWEST}. Lower optim.lr"
        )
    if winner is None:
        on_first_rank(files.save, inference_content(run, state, weights_to_evaluate(settings, state)[-1], {}), total)
        print_result(console, run, f"no evaluation counted; the last weights are in {total}", {})
        return None
    on_first_rank(files.duplicate, run.output_dir / files.BEST[winner], total)
    best = state.best[winner]
    epoch = (best.best_epoch or 0) + 1
    values = {"best/epoch": float(epoch)}
    content = files.load(total)
    values |= {f"best/{name}": value for name, value in headline(content["metrics"]).items()}
    name = f"val/{(settings.monitor or default_monitor(content['metrics'])).removeprefix('val/')}"
    value = content["metrics"][name.removeprefix("val/")]
    result = f"best {name} {number(value, 4)} at epoch {epoch} of {state.epoch_number} ({winner} weights)"
    tables = {"val": content["metrics"]}
    if state.best_held_out:
        tables[HELD_OUT] = content[HELD_OUT]
        chosen = flattery(_choices(state.best), _choices(state.best_held_out))
        values |= {f"best/{HELD_OUT}_{name}": value for name, value in headline(content[HELD_OUT]).items()}
        values["best/luck"] = chosen.luck
        result += f"; {chosen}"
    if settings.run_test and run.data.test is not None:
        state.load_weights(content["model"])
        found = evaluate_split(
            settings, console, run, state, "test", "raw", settings.compute_test_loss, interrupt=interrupt
        )
        tables["test"] = found
        values |= named(settings, "test", found)
    run.tracker.log(state.step, values)
    print_result(console, run, result, tables)
    return best.best_raw


def winner_of(state: State) -> str | None:
    """The weights, `raw` or `ema`, whose best evaluation is the best of the run; None before the first that counts."""
    values = {which: best.best_raw for which, best in state.best.items() if best.best_raw is not None}
    return max(values, key=lambda which: values[which], default=None)


def _choices(bests: Mapping[str, BestMetric]) -> list[Choice]:
    """The best of each kind of weights that was evaluated, here and on the other half of the validation images."""
    known = [(best.best_raw, best.beside) for best in bests.values()]
    return [Choice(here, there) for here, there in known if here is not None and there is not None]


def weights_to_evaluate(settings: Settings, state: State) -> tuple[str, ...]:
    """Which weights are evaluated; of two, the last one gives `val/mAP`."""
    if state.ema is None:
        return ("raw",)
    return {"ema": ("ema",), "raw": ("raw",), "both": ("raw", "ema")}[settings.evaluate_weights]


def stopping_value(settings: Settings, monitored_values: dict[str, float]) -> float:
    """The monitored value for early stopping: that of the EMA weights if configured, else the better one."""
    if settings.early_stopping_use_ema and "ema" in monitored_values:
        return monitored_values["ema"]
    return max(monitored_values.values(), key=lambda value: value if math.isfinite(value) else -math.inf)


def needs_val_loss(settings: Settings) -> bool:
    """Whether evaluations compute the loss; `auto`: if it is monitored."""
    if settings.compute_val_loss == "auto":
        return is_loss(settings.monitor or "")
    return bool(settings.compute_val_loss)


def named(settings: Settings, split: str, found: dict[str, float]) -> dict[str, float]:
    """The values of an evaluation with the names under which they are logged."""
    return {
        name.replace("time/", f"time/{split}_") if name.startswith("time/") else f"{split}/{name}": value
        for name, value in found.items()
        if settings.log_per_class_metrics or "AP/" not in name
    }


def monitored(settings: Settings, found: dict[str, float]) -> float:
    """The value that decides which epoch is best: keypoint, else mask, else box mAP unless `monitor` names one.

    Higher is better, so a loss is negated.

    Raises:
        ValueError: the run does not measure `monitor`.
    """
    name = settings.monitor or default_monitor(found)
    _refuse_unless_measured(name, found)
    value = found[name.removeprefix("val/")]
    return -value if is_loss(name) else value


def default_monitor(found: Collection[str]) -> str:
    """The monitored metric if `trainer.monitor` is null.

    Raises:
        ValueError: the evaluator has none of the default metrics.
    """
    default = next((name for name in DEFAULT_MONITORS if name in found), None)
    if default is None:
        names = [name for name in found if "/" not in name]
        raise ValueError(
            f"the evaluator measures {', '.join(names) or 'nothing'}, and none of {', '.join(DEFAULT_MONITORS)}, which "
            f"decide what is best by default; name one: trainer.monitor=val/{names[0] if names else '<value>'}"
        )
    return default


def refuse_unmeasured_monitor(run: Run, found: Mapping[str, float]) -> None:
    """Refuse a monitor that an evaluation did not measure.

    Args:
        run: its config has `trainer.monitor`.
        found: the values that a metric of this run gives, by name.

    Raises:
        ValueError: lists the known names.
    """
    monitor = run.config["trainer"]["monitor"]
    if monitor is None:
        default_monitor(found)
    elif not is_loss(monitor):
        _refuse_unless_measured(monitor, _with_sets(run, found))


def refuse_unknown_monitor(run: Run, monitor: str | None, compute_val_loss: bool | str) -> None:
    """Refuse a monitor that the run does not measure, before training; only for COCO metrics.

    Args:
        run: its data, network and metric determine what is measured.
        monitor: `trainer.monitor`.
        compute_val_loss: `trainer.compute_val_loss`.

    Raises:
        ValueError: lists the known names.
    """
    if monitor is None:
        return
    metric: Metric = run.make_metric("val", tuple(run.data.split("val").image_ids[:1]))
    if not isinstance(metric, CocoEvaluation):
        return
    losses = {"loss", *(f"loss_{name}" for name in run.criterion.names(run.network.tasks))}
    known = _with_sets(run, metric.compute())
    _refuse_unless_measured(monitor, {*known, *(losses if compute_val_loss else ())} - {"nonfinite"})


def _with_sets(run: Run, found: Mapping[str, float]) -> set[str]:
    """The names that a metric measures, and those of each of several data sets."""
    of_sets = {f"{name}/{key}" for name in image_ids_by_set(run.data.split("val")) for key in headline(dict(found))}
    return {*found, *of_sets}


def _refuse_unless_measured(monitor: str, measured: Iterable[str]) -> None:
    name, known = monitor.removeprefix("val/"), sorted(measured)
    if name in known:
        return
    without = " (trainer.compute_val_loss=false leaves losses out)" if is_loss(monitor) and "loss" not in known else ""
    raise ValueError(
        f"trainer.monitor is {monitor!r}, which this run does not measure{without}; "
        f"{did_you_mean(name, known, 'trainer.monitor=val/{}')}use one of "
        f"{', '.join(known)}"
    )
