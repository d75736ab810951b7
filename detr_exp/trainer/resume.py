"""Going on where a run stopped: whether a checkpoint fits, and putting its state back."""

from __future__ import annotations

from pathlib import Path

from detr_exp.config.keys import FIXED, FREE, RULES, differing, is_under
from detr_exp.config.stored import upgraded
from detr_exp.model.adapter.slim import BaseFile
from detr_exp.protocols import Counting, Network
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.trainer.state import COUNTED, DECIDED, Run, State
from detr_exp.values import Values, flat

EXTRA = ("world_size", "logged_lines", "nonfinite_costs", "data_fingerprint")  # the state, in a checkpoint


def load_for_resuming(path: Path, config: Values) -> Values:
    """What a checkpoint holds, if a run with this config can go on from it.

    Raises:
        ValueError: when the checkpoint is for inference only, damaged, or of a run that this config cannot continue.
    """
    saved = files.load(path)
    if saved.get("kind") != "training":
        raise ValueError(
            f"{path} holds weights only and cannot be resumed; give its folder's {files.NEWEST}, or start anew from "
            f"these weights with model.weights={path}"
        )
    if missing := [name for name in (*DECIDED, *COUNTED, *EXTRA) if name not in saved]:
        raise ValueError(
            f"{path} was written by another version and cannot be continued bit by bit (it has no {', '.join(missing)})"
            f"; start a new run from its weights with model.weights={path}"
        )
    before, now = _compared(saved, config)
    may_change = _refuse_other_ranks(path, saved["world_size"], now["trainer.resume_world_size"])
    fixed = [
        key
        for key in differing(before, now)
        if is_under(key, FIXED) and (key in before or key.startswith(RULES)) and key not in may_change
    ]
    if fixed:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in fixed[:8])
        raise ValueError(
            f"{path} cannot be continued with this config: {changes}; set them back, or start a new run from its "
            f"weights with model.weights={path}"
        )
    return saved


def _refuse_other_ranks(path: Path, before: int, allowed: str) -> tuple[str, ...]:
    """Keys that may change when the number of ranks does.

    Raises:
        ValueError: it does, and that is not allowed.
    """
    now = distributed.world_size()
    if now == before:
        return ()
    if allowed != "any":
        raise ValueError(
            f"{path} was written by {before} rank(s) and this run has {now}, whose steps would be others; use "
            f"trainer.hardware.devices={before}, or accept that: trainer.resume_world_size=any"
        )
    return tuple(f"trainer.{name}" for name in DECIDED)


def _reposition(saved: Values, state: State) -> list[str]:
    """Let a run whose epochs have other steps go on after the pictures that were seen, at most a step before.

    Another number of ranks changes the size of a step, other data the number of steps.

    Returns:
        what changes.
    """
    ranks, before, told = distributed.world_size(), state.position, []
    if ranks != saved["world_size"]:
        old, now = saved["world_size"] * saved["batch_size"], ranks * state.batch_size * state.grad_accum_steps
        state.batch = saved["batch"] * old // now * state.grad_accum_steps
        told.append(
            f"resumed on {ranks} rank(s) instead of {saved['world_size']}: a step is {now} images instead of "
            f"{old * saved['grad_accum_steps']}, an epoch {state.steps_per_epoch} steps; random draws and sizes of "
            "batches are others from here on, the schedule goes on at the same share of the run"
        )
    state.batch = min(state.batch, state.steps_per_epoch * state.grad_accum_steps)
    state.moved = state.epoch * state.steps_per_epoch + state.batch // state.grad_accum_steps - state.step
    if not told and state.position != before:
        told.append(
            f"resumed with {state.steps_per_epoch} steps an epoch; the schedule goes on at step {state.position} of "
            f"{state.total_steps}, as far as {before} was before"
        )
    return told


def restore(saved: Values, run: Run, state: State) -> list[str]:
    """Give a run the state of a checkpoint; no file is touched.

    Args:
        saved: by `load_for_resuming`.

    Returns:
        sentences for the user: where it goes on, and what differs from the stored run.

    Raises:
        ValueError: when a tensor does not fit.
    """
    assert run.resume_from is not None
    _refuse_other_base(run.resume_from, saved.get("base"), run.base)
    _refuse_other_groups(run.resume_from, saved["optimizer"]["param_groups"], state.optimizer.param_groups)
    reason = why_best_is_incomparable(saved, run)
    if reason is not None:
        fresh = {which: best.state_dict() for which, best in state.best.items()}
        saved = saved | {"best": fresh, "early_stopping": None}
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run.resume_from} does not fit this network and optimiser, as files of other versions may not "
            f"({' '.join(str(error).split())[:300]}); start a new run from its weights with "
            f"model.weights={run.resume_from}"
        ) from error
    if isinstance(run.criterion.matcher, Counting):
        run.criterion.matcher.num_non_finite = saved["nonfinite_costs"]
    before, now = _compared(saved, run.config)
    changes = [key for key in differing(before, now) if not is_under(key, FREE)]
    told = [f"resumed with {key}={now.get(key)} (was {before.get(key, 'not there')})" for key in changes]
    if saved["data_fingerprint"] != run.data.fingerprint:
        told.append("resumed with data that were changed since; the run is no repetition of an undisturbed one")
    if reason is not None:
        told.append(f"resumed with {reason}: the best is sought anew from here")
    told += _reposition(saved, state)
    return [*told, f"resumed {run.resume_from} at step {state.step} (epoch {state.epoch + 1})"]


def why_best_is_incomparable(saved: Values, run: Run) -> str | None:
    """Why the best value so far says nothing about those to come; None: they are of one kind."""
    before, now = _compared(saved, run.config)
    settings = [_monitor(config, run.network) for config in (before, now)]
    if settings[0] != settings[1]:
        return f"{settings[1]} to decide what is best instead of {settings[0]}"
    if before.get("trainer.smooth_alpha") != now.get("trainer.smooth_alpha"):
        return "other running means of what decides what is best"
    if before.get("metric.eval_max_dets") != now.get("metric.eval_max_dets"):
        return "another number of detections that count (metric.eval_max_dets)"
    losses = [key for key in differing(before, now) if is_under(key, ("loss", "matcher"))]
    if is_loss(settings[1]) and losses:
        return f"another loss to decide what is best ({', '.join(losses[:3])})"
    return None


def _monitor(config: Values, network: Network) -> str:
    """The metric that decides which epoch is best, by one name."""
    of_task = {"keypoints": "keypoint_mAP", "masks": "segm_mAP"}
    usual = next((name for task, name in of_task.items() if task in network.tasks), "mAP")
    return str(config.get("trainer.monitor") or usual).removeprefix("val/")


def is_loss(name: str) -> bool:
    """Whether less of a metric is better."""
    return name.removeprefix("val/").startswith("loss")


def _refuse_other_base(path: Path, before: Values | None, now: BaseFile | None) -> None:
    """Refuse to go on with an adapter beside other weights than it was trained with, or where there was none.

    Raises:
        ValueError: it would be so.
    """
    if now is None:
        return  # a config that has lost the adapter differs in its keys
    if before is None:
        raise ValueError(
            f"{path} was trained without an adapter and cannot go on with one; take model/adapter=none, or start a new "
            f"run from its weights with model.weights={path}"
        )
    if before.get("sha256") != now.sha256:
        raise ValueError(
            f"{path} holds an adapter for the base with sha256 {str(before.get('sha256'))[:12]}..., but {now.path} is "
            f"another one ({now.sha256[:12]}...); put that base back there"
        )


def _refuse_other_groups(path: Path, before: list[Values], now: list[Values]) -> None:
    """Refuse rates and decays by which the parameters are sorted otherwise than their stored moments.

    Raises:
        ValueError: they are.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (before, now)]
    if sizes[0] != sizes[1]:
        told = [" + ".join(map(str, counts)) for counts in sizes]
        raise ValueError(
            f"{path} has its parameters in groups of {told[0]}, but the rates and decays of this config give groups of "
            f"{told[1]}; set optim.lr_backbone to null where it was, and to another number than optim.lr where it was "
            f"one, or start a new run from its weights with model.weights={path}"
        )


def copy_best_checkpoints(run: Run, state: State) -> list[str]:
    """Bring the best checkpoints along where a run goes on in another folder.

    Returns:
        sentences about those that are lost; their weights are sought anew.
    """
    if run.resume_from is None:
        return []
    evaluated = [which for which, best in state.best.items() if best.best_raw is not None]
    lost = distributed.on_first_rank(_without_best_file, run, evaluated)
    for which in lost:
        state.best[which].forget()
    return [
        f"resumed without {files.BEST[which]}, which was not beside it; the best is sought anew from here"
        for which in lost
    ]


def _without_best_file(run: Run, evaluated: list[str]) -> list[str]:
    """Bring the best checkpoints along where a run goes on in another folder.

    Returns:
        the weights whose best checkpoint is lost.
    """
    assert run.resume_from is not None
    lost = []
    for which in evaluated:
        here, there = run.output_dir / files.BEST[which], run.resume_from.parent / files.BEST[which]
        if not here.exists() and there.is_file():
            files.duplicate(there, here)
        elif not here.exists():
            lost.append(which)
    return lost


def _compared(saved: Values, config: Values) -> tuple[Values, Values]:
    """Both configs as dotted keys; where a batch size was left to the machine, it is the one decided on."""
    decided = {f"trainer.{name}": saved[name] for name in DECIDED}
    before, now = flat(upgraded(saved["config"])) | decided, flat(config)
    return before, now | decided if now.get("trainer.batch_size") == "auto" else now
