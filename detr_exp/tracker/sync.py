"""Send the views of a finished run what they missed: `python -m detr_exp.tracker.sync run=<folder>`."""

from __future__ import annotations

import sys
from pathlib import Path

from detr_exp.tracker.base import RunRecord
from detr_exp.tracker.follower import Follower, Tail
from detr_exp.tracker.secrets import MASK
from detr_exp.tracker.tracker import make_views

USAGE = "usage: python -m detr_exp.tracker.sync run=<run folder> [tracking_uri=<MLflow store>]"


def synchronise(folder: Path, tracking_uri: str | None = None, patience: float = 300.0) -> None:
    """Bring the views of a run up to what its folder holds; what they have already is not sent again.

    Args:
        folder: of the run.
        tracking_uri: MLflow store; None: the one of the run.
        patience: seconds after which it gives up.

    Raises:
        ValueError: when the folder is no run's, or its store is known only without the password.
        RuntimeError: when a view could not be brought up to date.
    """
    record = RunRecord.load(folder)
    uri = tracking_uri or record.views["tracking_uri"]
    if uri is not None and MASK in uri:
        raise ValueError(f"{folder} knows its store only as {uri}; give the whole address: tracking_uri=...")
    views = make_views(uri, record.views["tensorboard"], record.views["wandb"])
    behind = Follower([Tail(view, folder, record) for view in views]).close(patience)
    if behind:
        names = ", ".join(type(tail.view).__name__ for tail in behind)
        raise RuntimeError(f"{names} did not take everything within {patience:.0f} s; is the server up?")


def main(words: list[str]) -> int:
    """Exit status: 0 done, 1 a view cannot be reached, 2 wrong usage."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if "run" not in given or set(given) - {"run", "tracking_uri"} or len(given) < len(words):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        synchronise(Path(given["run"]), given.get("tracking_uri"))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
