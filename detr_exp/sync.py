"""Send missing data of a run to its trackers: `python -m detr_exp.sync run=<folder or id>`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.folder import exclusive_access
from detr_exp.runs.past import find
from detr_exp.terminal import say
from detr_exp.tracker.base import RunRecord
from detr_exp.tracker.follower import Follower, Tail
from detr_exp.tracker.secrets import MASK
from detr_exp.tracker.tracker import make_views

USAGE = """\
Send what MLflow, TensorBoard and Weights & Biases lack of a run folder; nothing is sent twice.

  python -m detr_exp.sync run=outputs/<day>/<run>                        to the recorded store
  python -m detr_exp.sync run=... tracking_uri=http://127.0.0.1:5000     to another MLflow store

  run            run folders, sweep folders, ids of runs or of a sweep in MLflow; one, or several: run=A,B
  tracking_uri   MLflow store; null: the recorded one
  root           folder that is searched for ids
"""


class OutOfReachError(RuntimeError):
    """A view does not accept data."""


def sync(cfg: DictConfig) -> None:
    """Update the views of some runs.

    Raises:
        ValueError: `cfg.run` names something that is no run; for a single run see `synchronise`.
        OutOfReachError: a view could not be updated; the others were.
    """
    folders = find(cfg.run, cfg.root)
    behind: list[Exception] = []
    for folder in folders:
        try:
            synchronise(folder, cfg.tracking_uri)
        except (ValueError, OutOfReachError) as error:
            if len(folders) == 1:
                raise
            say(f"{folder}: {error}")
            behind.append(error)
        else:
            say(f"{folder}: everything is sent")
    if behind:
        raise OutOfReachError(f"{len(behind)} of {len(folders)} runs were not sent (see above); all others were")


def synchronise(folder: Path, tracking_uri: str | None = None, patience: float = 60.0) -> None:
    """Send everything in a run folder to the views of the run.

    Args:
        folder: of the run.
        tracking_uri: MLflow store; None: the one of the run.
        patience: seconds without progress of any view, after which it gives up.

    Raises:
        ValueError: the folder is no run folder, its run is still going, its store is known only without the password,
            or a view refuses the data.
        OutOfReachError: a view could not be updated.
    """
    record = RunRecord.load(folder)
    uri = tracking_uri or record.views["tracking_uri"]
    if uri is not None and MASK in uri:
        raise ValueError(f"{folder} has its store only as {uri}; give the whole address: tracking_uri=...")
    with exclusive_access(folder):
        if record.status == "running":  # no process holds the folder: it was killed
            record.status = "killed"
            record.save(folder)
        wanted = (uri, record.views["tensorboard"], record.views["wandb"])
        views = make_views(uri, record.views.get("artifact_root"), *wanted[1:])
        if len(views) < sum(map(bool, wanted)):
            raise ValueError(
                f"{folder} has trackers whose packages are missing (see above); install them, and sync again"
            )
        behind = Follower([Tail(view, folder, record) for view in views]).close(patience)
    if refusals := [tail.refusal for tail in behind if tail.refusal]:
        raise ValueError("; ".join(refusals))
    if behind:
        names = ", ".join(tail.name for tail in behind)
        raise OutOfReachError(
            f"{names} did not accept everything, and nothing for {patience:.0f} s; is the server running?"
        )


def main() -> None:
    cli.main_without_folder(sync, "sync", USAGE)


if __name__ == "__main__":
    main()
