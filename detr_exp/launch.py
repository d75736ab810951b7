"""Starts the ranks of a training, or joins ranks that `torchrun` has started.

A single rank trains in this process. Several ranks are processes of torch's elastic launcher inside the job, so that
there is one run folder and one result, also with `--multirun`; this process forwards signals to them and ends with
their status. Under `torchrun` rank 0 reads the command line and writes to Hydra's folder; the others wait for the
config.
"""

from __future__ import annotations

import json
import logging
import logging.config
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from detr_exp.config.mistakes import ConfigError
from detr_exp.config.stored import stored
from detr_exp.signals import Interrupt, Interrupted, ended_by, held_back
from detr_exp.streams import name_files_in_utf8
from detr_exp.terminal import guard_messages
from detr_exp.trainer.garbage_collection import off_until_training
from detr_exp.values import Values, values_of

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

JOB = "job"


@dataclass
class Job:
    """The arguments of every rank.

    Attributes:
        folder: of the run.
        config: resolved.
        choices: the chosen option of every group.
        overrides: of the command line.
        logging: for rank 0, as `logging.config.dictConfig` takes it.
        hydra_files: files for the folder's `.hydra`: name -> content.
    """

    folder: str
    config: Values
    choices: dict[str, str]
    overrides: list[str]
    logging: Values
    hydra_files: dict[str, str]


class RanksFailed(RuntimeError):
    """A rank failed, and all others were stopped."""


def train(
    folder: Path,
    cfg: DictConfig,
    choices: dict[str, str],
    overrides: list[str],
    log: Values,
    hydra_files: dict[str, str] | None = None,
) -> float | None:
    """Run one training on `trainer.hardware.devices` ranks, or on the ranks that `torchrun` has started.

    Args:
        folder: of the run.
        cfg: the config.
        choices: see `Job`.
        overrides: see `Job`.
        log: see `Job`.
        hydra_files: see `Job`.

    Returns:
        the best value of `trainer.monitor`.

    Raises:
        Interrupted: a signal came; the state is saved.
        RanksFailed: a rank failed; its traceback is printed.
        ValueError: settings do not fit, or a rank reported a mistake in settings or data.
    """
    with off_until_training():
        from detr_exp import build
        from detr_exp.trainer import distributed
        from detr_exp.training import train_in

        hardware = build.hardware(cfg)
        if not distributed.started_as_rank() and hardware.num_ranks == 1:
            return train_in(folder, cfg, choices=choices, overrides=overrides, hydra_files=hydra_files)
    if distributed.started_as_rank():
        folder = _folder_at_restart(folder, cfg)
    job = Job(str(folder), values_of(cfg), dict(choices), list(overrides), log, hydra_files or {})
    if distributed.started_as_rank():
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise ConfigError(
                "torchrun has started this sweep, whose runs start their ranks themselves; use no torchrun, but "
                "trainer.hardware.devices=auto"
            )
        hardware.refuse_ranks(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        distributed.rendezvous()[0].set(JOB, json.dumps(asdict(job)))
        return _train(job)
    return _on_ranks(job, hardware.num_ranks)


def _folder_at_restart(folder: Path, cfg: DictConfig) -> Path:
    """The folder of this run: that of its first start if `torchrun` has restarted it; it resumes there."""
    from detr_exp.trainer import checkpoint as files
    from detr_exp.trainer import distributed

    earlier = distributed.earlier_folder()
    if earlier is None:
        return folder
    if cfg.trainer.resume is None or (earlier / files.NEWEST).exists():
        cfg.trainer.resume = "auto"
    if folder != earlier:
        with suppress(OSError):  # Hydra has created it for this start
            folder.rmdir()
    return earlier


def is_follower() -> bool:
    """Whether `torchrun` started this process as another rank than the first."""
    return int(os.environ.get("RANK", "0")) > 0


def follow() -> None:
    """Run a rank other than the first under `torchrun`: train with the job of rank 0.

    Raises:
        SystemExit: the rank failed.
    """
    name_files_in_utf8()
    from detr_exp.trainer import distributed

    try:
        text = distributed.rendezvous()[0].get(JOB).decode()
        if text:
            _train(Job(**json.loads(text)))
    except BaseException as error:
        sys.exit(_quiet_status(error))


def release_followers() -> None:
    """Let the other ranks under `torchrun` end without training, for example after `--help`. Called by rank 0."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # checked without torch, which --help does not need
        from detr_exp.trainer import distributed

        store, _, _ = distributed.rendezvous()
        if not store.check([JOB]):
            store.set(JOB, "")


def _train(job: Job) -> float | None:
    """Train one rank."""
    from detr_exp import build
    from detr_exp.cli import status_of
    from detr_exp.trainer import distributed
    from detr_exp.training import train_in

    cfg = stored(job.config, Path(job.folder))
    hardware = build.hardware(cfg)
    with distributed.process_group(hardware.torch_device, hardware.timeout, status_of):
        return train_in(
            Path(job.folder), cfg, choices=job.choices, overrides=job.overrides, hydra_files=job.hydra_files
        )


def _on_ranks(job: Job, count: int) -> float | None:
    """Start ranks, forward signals to them, and return their result or raise their error."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method="spawn",
    )
    silence_the_launcher()
    with held_back():  # otherwise signals to the process group would end the tracker, which would lose its resources
        resource_tracker.ensure_running()
    ended: list[float | BaseException | None] = []

    def launch() -> None:
        try:
            ended.append(elastic_launch(config, _rank)(job)[0])
        except BaseException as error:
            ended.append(error)

    # not in the main thread, where the launcher would handle signals and give ranks only 30 seconds to save
    launcher = threading.Thread(target=launch, name="launcher")
    with Interrupt(at_once=partial(_send, getattr(signal, "SIGKILL", signal.SIGTERM))) as interrupt:
        launcher.start()
        delivered = False
        while launcher.is_alive():
            launcher.join(0.2)
            if interrupt.number is not None and not delivered:
                delivered = _send(interrupt.number)
    result = ended[0]
    if isinstance(result, ChildFailedError):
        raise _reason(result) from None
    if isinstance(result, BaseException):
        raise result
    return result


def _rank(job: Job) -> float | BaseException | None:
    """A rank that `elastic_launch` has started.

    Returns:
        the result, or an exception that all ranks raise, for the parent to raise.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    guard_messages()
    if is_follower():
        logging.basicConfig(level=logging.ERROR)
    else:
        logging.config.dictConfig(job.logging)
    try:
        return _train(job)
    except BaseException as error:
        if hasattr(error, "exit_status") and not _is_peer_failed(error):
            return error
        get_error_handler().record_exception(error)  # read by the parent
        sys.exit(_quiet_status(error))


def _quiet_status(error: BaseException) -> int:
    """The exit status for an error; it is printed only if no other process reports it."""
    from detr_exp.cli import report, status_of
    from detr_exp.trainer.heartbeat import PeerSilentError

    status = status_of(error)
    if (status == 1 and not _is_peer_failed(error)) or isinstance(error, PeerSilentError):
        report(error)
    return status


def _is_peer_failed(error: BaseException) -> bool:
    from detr_exp.trainer.distributed import PeerFailed

    return isinstance(error, PeerFailed)


def _reason(error: ChildFailedError) -> BaseException:
    """The exception for the failures that the launcher has recorded."""
    from detr_exp.trainer.heartbeat import PeerSilentError

    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    status, killed_by = failure.exitcode, -min(0, failure.exitcode)
    message = failure.message["message"] if isinstance(failure.message, dict) else str(failure.message)
    text = message.partition(": ")[2]
    if message.startswith(PeerSilentError.__name__):
        return PeerSilentError(text)
    if number := ended_by(status):  # it came before the training began, so there is nothing to save
        return Interrupted(number)
    if status == 2:
        return ConfigError(text)
    ending = f"was ended by {signal.Signals(killed_by).name}" if killed_by else f"failed ({text})"
    return RanksFailed(f"rank {rank} {ending}, which stopped the others; to resume: trainer.resume=auto")


def _send(number: int) -> bool:
    """Send a signal to all ranks; returns whether there are any."""
    pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    for pid in pids:
        os.kill(pid, number)
    return bool(pids)


def silence_the_launcher() -> None:
    """Hide its warnings and tracebacks, which repeat those of the ranks; `LOGLEVEL` shows them."""
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)
