"""One process for each run of a sweep, on the nodes of a Ray cluster.

Each run has a detached actor, which reserves cores and GPUs and starts the run's process: that is fresh, has its own
log, and can save its state when Ray kills the actor. Runs go on when the sweep's process is gone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.config.mistakes import ConfigError
from detr_exp.signals import OWNED, Interrupted
from hydra_plugins.detr_exp._job_process import NOT_SHARED
from hydra_plugins.detr_exp._pool import GRACE, THREADS, Ended, Pool, State, Work, how_ended
from hydra_plugins.detr_exp._recorded import JobError

if TYPE_CHECKING:
    import ray

NAMESPACE = "detr_exp"
WAITING = "Ray"  # the place of a run that has no node yet
LINGER = 10.0  # seconds in which a sweep can ask how a run has ended
ANSWER = 10.0  # seconds in which a cluster's address has to answer
HOST_AND_PORT = re.compile(r"(?:ray://)?\[?([^/\]]+)\]?:(\d{1,5})")
KILLED = -9  # SIGKILL: by a user, or by a machine without memory


class Host:
    """The actor of a run."""

    def __init__(self, work: Work, threads: int, gpus: float) -> None:
        environment = os.environ | work.environment | dict.fromkeys(THREADS, str(threads)) | {OWNED: "1"}
        if not gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # with some, Ray has named them
        try:
            with open(work.log, "ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, *work.command[1:]],
                    cwd=work.folder,
                    stdin=subprocess.PIPE,  # closed when this process is gone: the run saves its state and ends
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except FileNotFoundError:
            self.process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({NOT_SHARED})"])
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        """Return cores and GPUs, even if no sweep is there to ask for it."""
        self.process.wait()
        time.sleep(LINGER)
        os._exit(0)

    def place(self) -> str:
        return socket.gethostname()

    def wait(self) -> int:
        """The exit status of the run, after its end."""
        return self.process.wait()

    def end(self) -> None:
        """Ask the run to save its state and end; kill it if it does not end in time."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.process.kill()


class Actor(NamedTuple):
    """What this process knows of an actor.

    Attributes:
        handle: to call its methods.
        place: reference to its answer where it is.
        code: reference to the exit status of its run.
    """

    handle: Any
    place: ray.ObjectRef[str]
    code: ray.ObjectRef[int]


class RayLauncher(Launcher):
    """Runs jobs of a sweep on Ray; `conf/hydra/launcher/ray.yaml` explains the arguments."""

    interval = 0.5

    def __init__(
        self,
        address: str | None,
        slots: int | None,
        num_cpus: float | None,
        num_gpus: float | None,
        resources: Mapping[str, float],
        retries: int,
    ) -> None:
        self.address, self.most, self.num_cpus, self.num_gpus = address, slots, num_cpus, num_gpus
        self.resources, self.retries = dict(resources), retries
        self.actors: dict[str, Actor] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError:
            raise ConfigError("hydra/launcher=ray needs ray: pip install 'detr_exp[ray]'") from None
        self.pool = Pool(self, hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._connect()
        return self.pool.launch(job_overrides, initial_job_idx)

    def serve(self, jobs: Iterable[tuple[int, Sequence[str], str]], ended: Ended) -> None:
        self._connect()
        self.pool.serve(jobs, ended)

    def _connect(self) -> None:
        """Join the cluster, or start one, and find out how many runs have room in it.

        Raises:
            ConfigError: it does not answer, has other versions, or no node has room for a run.
        """
        import ray

        if ray.is_initialized():
            return
        handler = signal.getsignal(signal.SIGTERM)
        init = functools.partial(ray.init, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        address = self.address or os.environ.get("RAY_ADDRESS")
        try:
            if (place := HOST_AND_PORT.fullmatch(address or "")) is not None:  # Ray itself goes on asking
                socket.create_connection((place[1], int(place[2])), timeout=ANSWER).close()
            init(address or "auto")
            self.survives = True
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            if address or not isinstance(error, ConnectionError):
                raise ConfigError(
                    f"hydra.launcher.address={address}: no Ray cluster that can be used "
                    f"({' '.join(str(error).split())[:300]}); start one: ray start --head"
                ) from error
            init("local", include_dashboard=False)
            self.survives = False  # it ends with this process
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the sweep without saving its runs
        self._reserve([node["Resources"] for node in ray.nodes() if node["Alive"]])

    def _reserve(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """What a run reserves, and how many runs have room.

        Args:
            nodes: the resources of each.

        Raises:
            ConfigError: no node has room for one.
        """
        gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        share = min((node["CPU"] // node["GPU"] for node in nodes if node.get("GPU") and "CPU" in node), default=2.0)
        largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        num_cpus = self.num_cpus or max(1.0, min(share, largest))
        num_gpus = min(1.0, gpus) if self.num_gpus is None else self.num_gpus
        wanted = {"CPU": num_cpus, "GPU": num_gpus, **self.resources}
        self.needs = {name: amount for name, amount in wanted.items() if amount}
        room = int(sum(min(node.get(name, 0.0) // amount for name, amount in self.needs.items()) for node in nodes))
        if not room and self.most is None:
            raise ConfigError(
                f"a run needs {self.needs}, but no node of the Ray cluster has that (the largest: {largest:g} CPU, "
                f"{gpus:g} GPU); ask for less: hydra.launcher.num_cpus=1 hydra.launcher.num_gpus=0, or, if the cluster "
                "grows when runs wait, say how many may: hydra.launcher.slots=8"
            )
        self.slots = self.most or room

    def start(self, work: Work) -> tuple[str, str]:
        import ray

        further = {name: amount for name, amount in self.needs.items() if name not in ("CPU", "GPU")}
        gpus, id = self.needs.get("GPU", 0.0), f"{work.name}-{uuid.uuid4().hex[:8]}"
        handle = (
            ray.remote(Host)
            .options(
                name=id,
                lifetime="detached",  # it does not end with this process
                max_restarts=0,
                max_concurrency=3,
                num_cpus=self.needs["CPU"],
                num_gpus=gpus,
                resources=further or None,
            )
            .remote(work, max(1, math.floor(self.needs["CPU"])), gpus)
        )
        self._know(id, handle)
        return id, WAITING

    def _know(self, id: str, handle: Any) -> Actor:
        self.actors[id] = Actor(handle, handle.place.remote(), handle.wait.remote())
        return self.actors[id]

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        return {id: self._state(id) for id in ids}

    def _state(self, id: str) -> State:
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        actor = self.actors.get(id)
        if actor is None:
            try:
                actor = self._know(id, ray.get_actor(id, NAMESPACE))
            except ValueError:
                return State("", JobError("its actor is gone"), lost=True)
        known, _ = ray.wait([actor.place, actor.code], num_returns=2, timeout=0, fetch_local=False)
        place = WAITING
        try:
            if actor.place in known:
                place = ray.get(actor.place)
            if actor.code not in known:
                return State(place)
            code = ray.get(actor.code)
        except ActorUnavailableError:
            del self.actors[id]  # for now: ask again
            return State(place)
        except RayError as error:
            *_, last = str(error).strip().splitlines()
            return State(place, JobError(last.strip()), lost="creation task" not in str(error))
        ray.kill(actor.handle)
        del self.actors[id]
        how = how_ended(code)
        return State(place, how, lost=code == KILLED or isinstance(how, Interrupted))

    def cancel(self, ids: Sequence[str]) -> None:
        import ray

        actors = [self.actors[id] for id in ids if id in self.actors]
        places = [actor.place for actor in actors]
        placed, _ = ray.wait(places, num_returns=len(places), timeout=0) if places else ([], [])
        ends = [actor.handle.end.remote() for actor in actors if actor.place in placed]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=GRACE + 10)
        for actor in actors:
            ray.kill(actor.handle)
