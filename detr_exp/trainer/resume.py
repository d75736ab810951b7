"""Resuming a run: whether a checkpoint fits, and restoring its state."""

from __future__ import annotations

from pathlib import Path

from detr_exp.config.keys import FIXED, HONEST, RULES, differing, is_free, is_under
from detr_exp.config.stored import upgraded
from detr_exp.model.adapter.slim import BaseFile
from detr_exp.protocols import Counting, Network
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.trainer.due import has_ended, is_pending
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import COUNTED, DECIDED, Run, State
from detr_exp.values import Values, flat

SAMPLE = "data.val_sample"
PRODUCTS = "trainer.hardware.products"
EXTRA = ("world_size", "logged_lines", "nonfinite_costs", "data_fingerprint")  # in a checkpoint besides the state


def load_for_resuming(path: Path, config: Values) -> Values:
    """The content of a checkpoint, if a run with this config can resume from it.

    Raises:
        ValueError: when the checkpoint is for inference only, damaged, or of a run that this config cannot resume.
    """
    saved = files.load(path)
    if saved.get("kind") != "training":
        raise ValueError(
            f"{path} holds weights only and cannot be resumed; give its folder's {files.NEWEST}, or start a new run "
            f"from these weights with model.weights={path}"
        )
    if missing := [name for name in (*DECIDED, *COUNTED, *EXTRA) if name not in saved]:
        raise ValueError(
            f"{path} was written by another version and cannot be resumed exactly (it has no {', '.join(missing)})"
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
            f"{path} cannot be resumed with this config: {changes}; restore these values, or start a new run from its "
            f"weights with model.weights={path}"
        )
    return saved


def _refuse_other_ranks(path: Path, before: int, allowed: str) -> tuple[str, ...]:
    """Keys that may change because the number of ranks has changed.

    Raises:
        ValueError: the number of ranks has changed, and that is not allowed.
    """
    now = distributed.world_size()
    if now == before:
        return ()
    if allowed != "any":
        raise ValueError(
            f"{path} was written by {before} rank(s) and this run has {now}, which changes its steps; use "
            f"trainer.hardware.devices={before}, or allow it: trainer.resume_world_size=any"
        )
    return tuple(f"trainer.{name}" for name in DECIDED)


def _reposition(saved: Values, state: State) -> list[str]:
    """Resume a run whose number of steps per epoch has changed after the images already used, or up to a step before.

    The number of ranks changes the size of a step; the data change the number of steps.

    Returns:
        messages about what changes.
    """
    ranks, before, messages = distributed.world_size(), state.position, []
    if ranks != saved["world_size"]:
        old, now = saved["world_size"] * saved["batch_size"], ranks * state.batch_size * state.grad_accum_steps
        state.batch = saved["batch"] * old // now * state.grad_accum_steps
        messages.append(
            f"resumed on {ranks} rank(s) instead of {saved['world_size']}: a step is {now} images instead of "
            f"{old * saved['grad_accum_steps']}, an epoch {state.steps_per_epoch} steps; random numbers and "
            "batch sizes differ from here on, and the schedule continues at the same fraction of the run"
        )
    state.batch = min(state.batch, state.steps_per_epoch * state.grad_accum_steps)
    state.moved = state.epoch * state.steps_per_epoch + state.batch // state.grad_accum_steps - state.step
    if not messages and state.position != before:
        messages.append(
            f"resumed with {state.steps_per_epoch} steps an epoch; the schedule continues at step {state.position} of "
            f"{state.total_steps}, the same fraction of the run as step {before} before"
        )
    return messages


def restore(saved: Values, run: Run, state: State) -> list[str]:
    """Restore the state of a run from a checkpoint; no file is touched.

    Args:
        saved: by `load_for_resuming`.

    Returns:
        messages for the user: where the run resumes, and what differs from the stored run.

    Raises:
        ValueError: a tensor does not fit.
    """
    assert run.resume_from is not None
    _refuse_other_base(run.resume_from, saved.get("base"), run.base)
    _refuse_other_teacher(run.resume_from, saved, state)
    _refuse_other_groups(run.resume_from, saved["optimizer"]["param_groups"], state.optimizer.param_groups)
    reason = why_best_is_incomparable(saved, run)
    if reason is not None:
        fresh = {
            name: {which: best.state_dict() for which, best in getattr(state, name).items()}
            for name in ("best", "best_held_out")
        }
        saved = saved | fresh | {"early_stopping": None, "best_since_return": None}
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run.resume_from} does not fit this network and optimiser, as is possible for files of other versions "
            f"({' '.join(str(error).split())[:300]}); start a new run from its weights with "
            f"model.weights={run.resume_from}"
        ) from error
    if isinstance(run.criterion.matcher, Counting):
        run.criterion.matcher.num_non_finite = saved["nonfinite_costs"]
    before, now = _compared(saved, run.config)
    changes = [key for key in differing(before, now) if not is_free(key)]
    messages = [f"resumed with {key}={now.get(key)} (was {before.get(key, 'not set')})" for key in changes]
    if saved["data_fingerprint"] != run.data.fingerprint:
        messages.append("resumed with changed data; the results differ from those of an uninterrupted run")
    if reason is not None:
        messages.append(f"resumed with {reason}: the search for the best starts again from here")
    messages += _reposition(saved, state)
    return [*messages, f"resumed {run.resume_from} at step {state.step} (epoch {state.epoch + 1})"]


def refuse_run_without_best(settings: Settings, saved: Values, run: Run, state: State) -> None:
    """Refuse to resume a finished run whose best values cannot be compared with this config.

    Raises:
        ValueError: tells why they cannot be compared.
    """
    reason = why_best_is_incomparable(saved, run)
    if reason is not None and has_ended(settings, state) and not is_pending(settings, state):
        raise ValueError(
            f"{run.resume_from} is of a finished run (epoch {state.epoch}, step {state.step}) and cannot "
            f"be resumed with {reason}; restore that setting, or train longer: trainer.epochs={state.epoch + 1}"
        )


def why_best_is_incomparable(saved: Values, run: Run) -> str | None:
    """Why the best value so far cannot be compared with later values; None: it can."""
    before, now = _compared(saved, run.config)
    settings = [_monitor(config, run.network) for config in (before, now)]
    if settings[0] != settings[1]:
        return f"{settings[1]} to decide which epoch is best, instead of {settings[0]}"
    if before.get("trainer.smooth_alpha") != now.get("trainer.smooth_alpha"):
        return "other running means of the monitored metric"
    if before.get(HONEST) != now.get(HONEST):
        return f"{'half' if now.get(HONEST) else 'all'} of the validation images to decide which epoch is best"
    if before.get(SAMPLE) != now.get(SAMPLE):
        return f"{now.get(SAMPLE) or 'all'} validation images to decide which epoch is best"
    if before.get("metric.eval_max_dets") != now.get("metric.eval_max_dets"):
        return "another number of detections per image (metric.eval_max_dets)"
    losses = [key for key in differing(before, now) if is_under(key, ("loss", "matcher"))]
    if is_loss(settings[1]) and losses:
        return f"another loss to decide which epoch is best ({', '.join(losses[:3])})"
    return None


def _monitor(config: Values, network: Network) -> str:
    """The metric that decides which epoch is best, without its prefix."""
    of_task = {"keypoints": "keypoint_mAP", "masks": "segm_mAP"}
    default = next((name for task, name in of_task.items() if task in network.tasks), "mAP")
    return str(config.get("trainer.monitor") or default).removeprefix("val/")


def is_loss(name: str) -> bool:
    """Whether lower values of a metric are better."""
    return name.removeprefix("val/").startswith("loss")


def _refuse_other_base(path: Path, before: Values | None, now: BaseFile | None) -> None:
    """Refuse to resume an adapter with another base than it was trained with, or a run that had no adapter.

    Raises:
        ValueError: base or adapter differ.
    """
    if now is None:
        return  # a config without the adapter differs in its keys
    if before is None:
        raise ValueError(
            f"{path} was trained without an adapter and cannot be resumed with one; use model/adapter=none, or start a "
            f"new run from its weights with model.weights={path}"
        )
    if before.get("sha256") != now.sha256:
        raise ValueError(
            f"{path} holds an adapter for the base with sha256 {str(before.get('sha256'))[:12]}..., but {now.path} is "
            f"another one ({now.sha256[:12]}...); restore that base there"
        )


def _refuse_other_teacher(path: Path, saved: Values, state: State) -> None:
    """Refuse another file under the name of the teacher, and a teacher whose projection was not trained.

    Raises:
        ValueError: they differ.
    """
    before, now = saved.get("teacher"), None if state.teaching is None else state.teaching.teacher.record
    if before is not None and now is not None and before.get("sha256") != now.get("sha256"):
        raise ValueError(
            f"{path} was trained with the teacher {before['teacher']} (sha256 {before.get('sha256')}), but "
            f"{now['teacher']} is another one ({now.get('sha256')}); give that one: teacher.checkpoint=..."
        )
    if ("projection" in saved) != (state.projection is not None):
        trained = "has a" if "projection" in saved else "has no"
        raise ValueError(
            f"{path} {trained} projection between the maps of the network and those of a teacher, which this config "
            f"would {'not train' if 'projection' in saved else 'begin anew'}; restore teacher and loss, or start a new "
            f"run from its weights with model.weights={path}"
        )


def _refuse_other_groups(path: Path, before: list[Values], now: list[Values]) -> None:
    """Refuse learning rates and decays that group the parameters differently from their stored moments.

    Raises:
        ValueError: the groups differ.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (before, now)]
    if sizes[0] != sizes[1]:
        groups = [" + ".join(map(str, counts)) for counts in sizes]
        raise ValueError(
            f"{path} has its parameters in groups of {groups[0]}, but the rates and decays of this config give "
            f"groups of {groups[1]}; set optim.lr_backbone to null if it was null, and to a number other than optim.lr "
            f"if it was one, or start a new run from its weights with model.weights={path}"
        )


def copy_best_checkpoints(run: Run, state: State) -> list[str]:
    """Copy the best checkpoints if a run resumes in another folder.

    Returns:
        messages about those that are missing; the search for these starts again.
    """
    if run.resume_from is None:
        return []
    evaluated = [which for which, best in state.best.items() if best.best_raw is not None]
    lost = distributed.on_first_rank(_without_best_file, run, evaluated)
    for which in lost:
        for best in (state.best, state.best_held_out):
            if which in best:
                best[which].forget()
    return [
        f"resumed without {files.BEST[which]}, which was not found; the search for the best starts again from here"
        for which in lost
    ]


def _without_best_file(run: Run, evaluated: list[str]) -> list[str]:
    """Copy the best checkpoints if a run resumes in another folder.

    Returns:
        the weights (`ema`, `raw`) whose best checkpoint is missing.
    """
    assert run.resume_from is not None
    lost = []
    stage, source = (folder / files.FIRST_STAGE for folder in (run.output_dir, run.resume_from.parent))
    if source.is_file() and not stage.exists():
        files.save(files.load(source), stage)  # the parts of a sharded one become a whole
    for which in evaluated:
        here, there = run.output_dir / files.BEST[which], run.resume_from.parent / files.BEST[which]
        if not here.exists() and there.is_file():
            files.duplicate(there, here)
        elif not here.exists():
            lost.append(which)
    return lost


def _compared(saved: Values, config: Values) -> tuple[Values, Values]:
    """Both configs as dotted keys; `auto` for batch size and products is replaced by what was chosen."""
    decided = {f"trainer.{name}": saved[name] for name in DECIDED}
    library = {PRODUCTS: saved.get("products", "torch")}  # earlier versions had no other
    before, now = flat(upgraded(saved["config"])) | decided, flat(upgraded(config))
    now |= decided if now.get("trainer.batch_size") == "auto" else {}
    for one in (before, now):
        if one.get(PRODUCTS, "auto") == "auto":  # what was asked for stays: on a GPU it is not what was used
            one |= library
    return before, now
