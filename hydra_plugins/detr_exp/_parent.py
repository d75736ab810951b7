"""The sweep's own run in MLflow, which those of its jobs are shown under."""

from __future__ import annotations

import contextlib
import json
import math
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from detr_exp.terminal import printable, say
from detr_exp.tracker.secrets import masked
from detr_exp.writing import write
from hydra_plugins.detr_exp._ledger import FINISHED, Ledger, score

LINK = "parent.json"


@contextlib.contextmanager
def parent_run(config: DictConfig, folder: Path, environment: dict[str, str], ledger: Ledger) -> Iterator[None]:
    """While it is entered, the jobs' runs are kept in MLflow under one of the sweep's own.

    It is opened before the first job, and with it the store, which processes could not make at the same time. A sweep
    that goes on in its folder goes on with its run. A store that cannot be reached is no reason not to sweep.

    Args:
        config: of the sweep; where its tracker has no MLflow store, nothing happens.
        folder: of the sweep.
        environment: of the jobs; told which run is the parent.
        ledger: read at the end.
    """
    uri, project = (OmegaConf.select(config, f"tracker.{key}") for key in ("tracking_uri", "project"))
    if uri is None or find_spec("mlflow") is None:
        yield
        return
    from detr_exp.tracker.mlflow import finish_parent
    from detr_exp.tracker.tracker import PARENT_VARIABLE

    try:
        run_id = opened(
            uri, project, folder, {"sweep": str(folder), "words": " ".join(masked(list(config.hydra.overrides.task)))}
        )
    except Exception as error:
        say(f"warning: no run for this sweep in {uri} ({printable(error)[:200]}); its runs will stand alone")
        yield
        return
    environment[PARENT_VARIABLE] = run_id
    status = "killed"
    try:
        yield
        entries = ledger.latest().values()
        status = "ok" if entries and all(entry.status in FINISHED for entry in entries) else "failed"
    except Exception:
        status = "failed"
        raise
    finally:
        with contextlib.suppress(Exception):
            finish_parent(uri, project, run_id, status, best_values(folder, ledger))


def opened(uri: str, project: str, folder: Path, tags: dict[str, str]) -> str:
    """The id of the sweep's run: that of an earlier start in the folder, or a new one.

    Raises:
        ValueError: the file that says which it was is damaged.
    """
    from detr_exp.runs.past import mapping
    from detr_exp.tracker.mlflow import start_parent

    known = mapping(folder / LINK, json.loads)
    if known.get("tracking_uri") != masked(uri) or "id" not in known:
        known = {"id": uuid.uuid4().hex, "tracking_uri": masked(uri)}
        write(folder / LINK, json.dumps(known) + "\n")  # before there is such a run: who is killed now finds it again
    return start_parent(uri, project, "/".join(folder.parts[-2:]), tags, known["id"])


def best_values(folder: Path, ledger: Ledger) -> dict[str, float]:
    """What the best run was judged by, and what it says of its best evaluation."""
    best = max(ledger.latest().values(), key=score, default=None)
    if best is None or best.metric is None or not math.isfinite(score(best)):
        return {}
    return {"best/monitor": best.metric, **last_values(folder / best.hash, "best/")}


def last_values(folder: Path, prefix: str) -> dict[str, float]:
    """The newest value of every metric of a run whose name begins with `prefix`."""
    from detr_exp.tracker.jsonl import JsonLines

    found: dict[str, float] = {}
    for line in JsonLines.read(folder / "metrics.jsonl"):
        found |= {name: value for name, value in line.items() if name.startswith(prefix) and value is not None}
    return found
