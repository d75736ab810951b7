"""The sweep's own run in MLflow, the parent of the runs of its jobs."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from detr_exp.data.splits import HELD_OUT
from detr_exp.metric.mean import mean_of
from detr_exp.runs.swept import alone, folder_of
from detr_exp.terminal import printable, say
from detr_exp.tracker.base import FINISHED, RunRecord
from detr_exp.tracker.secrets import masked
from detr_exp.values import measured
from detr_exp.writing import write
from hydra_plugins.detr_exp._ledger import Entry, Ledger, by_point, score, setting_of

if TYPE_CHECKING:
    from detr_exp.metric.honest import Flattery
    from detr_exp.runs.past import PastRun

LINK = "parent.json"


@contextlib.contextmanager
def parent_run(config: DictConfig, folder: Path, environment: dict[str, str], ledger: Ledger) -> Iterator[None]:
    """In this context, the jobs' runs are children of the sweep's run in MLflow.

    It is created before the first job, and with it the store, which several processes could not create at once. A sweep
    that resumes in its folder resumes its run. A store that cannot be reached does not stop a sweep.

    Args:
        config: of the sweep; without an MLflow store in its tracker, nothing happens.
        folder: of the sweep.
        environment: variables of the jobs; receives the id of the parent run.
        ledger: read at the end.
    """
    raced = OmegaConf.select(config, "hydra.sweeper.race", default=False)
    keys = ("tracking_uri", "project", "artifact_root")
    uri, project, root = (OmegaConf.select(config, f"tracker.{key}") for key in keys)
    if uri is None or find_spec("mlflow") is None:
        yield
        return
    from detr_exp.tracker.mlflow import finish_parent
    from detr_exp.tracker.tracker import PARENT_VARIABLE

    try:
        run_id = opened(
            uri,
            project,
            folder,
            {"sweep": str(folder), "words": " ".join(masked(list(config.hydra.overrides.task)))},
            root,
            {f"swept/{key}": text for key, text in ranges_of(config).items()},
        )
    except Exception as error:
        say(f"warning: no run for this sweep in {uri} ({printable(error)[:200]}); its runs will have no parent")
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
            best = next(iter(by_point(ledger.latest().values(), raced)), [])
            place = folder_of(folder, best[0].hash, best[0].overrides) if best else folder
            tags = {"best.run": str(place), "best.setting": setting_of(best[0])} if best else {}
            values = best_values(folder, ledger, best)
            child = described(place) if best else {}
            note = note_of(ranges_of(config), best[0], values, child) if best else ""
            finish_parent(uri, project, run_id, status, values, tags | child, note)


def ranges_of(config: DictConfig) -> dict[str, str]:
    """What a sweep tries: key -> the values as they were given, on the command line or in a file."""
    words = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    given = {one.key_or_group: str(one.input_line).partition("=")[2] for one in words if one.is_sweep_override()}
    return masked(
        {key: str(text) for key, text in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items()} | given
    )


def described(folder: Path) -> dict[str, str]:
    """The best run of a sweep in tags: its words, and its id in the store."""
    from detr_exp.runs.past import mapping
    from detr_exp.tracker.mlflow import LINK as RUN

    words = shlex.join(alone(RunRecord.load(folder).words))
    return {"best.words": words, "best.mlflow_run": str(mapping(folder / RUN, json.loads).get("run_id", ""))}


def note_of(ranges: Mapping[str, str], best: Entry, values: Mapping[str, float], child: Mapping[str, str]) -> str:
    """What the page of a sweep's run says first, in Markdown; two lines, because it folds longer ones."""
    link = f"[its run](#/experiments/{{experiment}}/runs/{child['best.mlflow_run']})"
    seeds = f", mean of {values['best/seeds']:.0f} seeds" if "best/seeds" in values else ""
    swept = "; ".join(f"`{key}` {text}" for key, text in ranges.items())
    return (
        f"**Best: {values['best/monitor']:.4f}**{seeds}, {link}: `{' '.join(best.overrides)}`\n\nSwept: {swept}\n\n"
        f"```\npython -m detr_exp.train {child['best.words']}\n```"
    )


def opened(
    uri: str, project: str, folder: Path, tags: dict[str, str], artifact_root: str | None, params: dict[str, str]
) -> str:
    """The id of the sweep's run: that of an earlier start in the folder, or a new one.

    Raises:
        ValueError: the file with its id is damaged.
    """
    from detr_exp.runs.past import mapping
    from detr_exp.tracker.mlflow import start_parent

    known = mapping(folder / LINK, json.loads)
    if known.get("tracking_uri") != masked(uri) or "id" not in known:
        known = {"id": uuid.uuid4().hex, "tracking_uri": masked(uri)}
        # before the run exists: a sweep killed now finds it when it resumes
        write(folder / LINK, json.dumps(known) + "\n")
    return start_parent(uri, project, "/".join(folder.parts[-2:]), tags, known["id"], artifact_root, params)


def best_values(folder: Path, ledger: Ledger, best: Sequence[Entry]) -> dict[str, float]:
    """The metric of the best point, and the values of its best evaluation: with several seeds the means over them.

    Args:
        folder: of the sweep.
        ledger: of it.
        best: the runs of the best point; none where no run has a result.
    """
    if not best:
        return {}
    of = mean_of([score(entry) for entry in best])
    values: dict[str, float] = {"best/monitor": of.value}
    if of.deviation is not None:
        values |= {"best/deviation": of.deviation, "best/seeds": of.runs}
    measured = [last_values(folder_of(folder, entry.hash, entry.overrides), "best/") for entry in best]
    common = [name for name in measured[0] if all(name in one for one in measured)]
    values |= {name: mean(one[name] for one in measured) for name in common}
    chosen = choice_among(honest_runs(folder, ledger.latest()))
    return values if chosen is None else values | {"best/luck": chosen.luck}


def choice_among(runs: Mapping[str, PastRun]) -> Flattery | None:
    """What became of choosing the best of `honest_runs`; None where there are none."""
    if not runs:
        return None
    from detr_exp.runs.chosen import honest
    from detr_exp.runs.settings import points

    return honest(points(list(runs.values())))


def honest_runs(folder: Path, entries: Mapping[str, Entry]) -> dict[str, PastRun]:
    """By hash the finished runs that were chosen by half of the validation images, and measured on the other half."""
    from detr_exp.runs.past import PastRun

    found = {}
    for name, entry in entries.items():
        place = folder_of(folder, entry.hash, entry.overrides)
        if math.isfinite(score(entry)) and last_values(place, f"best/{HELD_OUT}_"):
            found[name] = PastRun.load(place)
    return found


def last_values(folder: Path, prefix: str) -> dict[str, float]:
    """The newest value of every metric of a run whose name begins with `prefix`."""
    from detr_exp.tracker.jsonl import JsonLines

    values: dict[str, float] = {}
    for line in JsonLines.read(folder / "metrics.jsonl"):
        values |= {k: v for k, v in measured(line).items() if k.startswith(prefix) and v is not None}
    return values
