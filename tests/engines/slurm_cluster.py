"""A SLURM cluster of pretended machines on this one: the real daemons on loopback, without systemd and cgroups.

Each machine has a PID namespace, so that killing its first process ends the machine with everything on it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/ctld.pid
SlurmctldLogFile={folder}/log/ctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=120
SlurmdTimeout=6
InactiveLimit=0
MinJobAge=600
BatchStartTimeout=20
MessageTimeout=20
CommunicationParameters=NoAddrCache
"""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "")  # "": forgotten


class SlurmCluster:
    """slurmctld and one slurmd for each machine, from entering the block to its end.

    Attributes:
        environment: variables with which SLURM's commands find the cluster.
    """

    def __init__(self, machines: int = 2) -> None:
        self.names = [f"n{number}" for number in range(1, machines + 1)]

    def __enter__(self) -> SlurmCluster:
        # a short path, because sockets have at most 108 characters
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))
        self.folder.chmod(0o755)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the python of scripts is that of the tests
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.hurried: set[tuple[str, str]] = set()
        try:
            self._configure()
            self._start("munged", "munged", "--foreground", "--force", *self._munge_files())
            wait_for((self.folder / "munge/socket").exists, 10, "munged has no socket")
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for name in self.names:
                self.boot(name)
            wait_for(lambda: all(self.is_up(name) for name in self.names), 30, "the machines are not up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if "slurmctld" in self.daemons:
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        for name in self.names:
            self.kill(name)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, name: str) -> None:
        """Start a machine; in its namespace the machines' names are known."""
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        machine = 'mount --bind "$1/hosts" /etc/hosts; slurmd -D -N "$2" -f "$1/slurm.conf" & wait'
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._start(name, *apart, "bash", "-c", machine, "machine", str(self.folder), name)

    def kill(self, name: str) -> None:
        """End a machine with all its processes, as a power cut does."""
        daemon = self.daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()  # --kill-child ends the first process of the namespace, and the kernel all others
            daemon.wait()

    def hide(self, name: str, folder: Path) -> None:
        """Put an empty disk over a folder on a machine, as if the machines did not share it."""
        self._mount(name, "-t", "tmpfs", "none", str(folder))

    def take_away(self, name: str, program: str) -> None:
        """Let a machine have a command no longer."""
        self._mount(name, "--bind", "/dev/null", str(shutil.which(program)))

    def _mount(self, name: str, *words: str) -> None:
        (first,) = Path(f"/proc/{self.daemons[name].pid}/task/{self.daemons[name].pid}/children").read_text().split()
        subprocess.run(["nsenter", "-t", first, "-m", "mount", *words], check=True)

    def is_up(self, name: str) -> bool:
        return self.run("sinfo", "-h", "-n", name, "-p", "low", "-o", "%T", check=False) in (
            "idle",
            "mixed",
            "allocated",
        )

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`; empty for a job that is not known."""
        found = re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", job, check=False))
        return found[1] if found else ""

    def hurry(self) -> None:
        """Start requeued jobs soon, which otherwise wait for two minutes."""
        for job in self.run("squeue", "-h", "-t", "PENDING", "-o", "%i %r").splitlines():
            number, _, reason = job.partition(" ")
            start = (number, self.field(number, "Restarts"))
            if reason == "BeginTime" and start not in self.hurried:
                self.hurried.add(start)
                # not at once: the machine refuses a job that it has just ended
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2", check=False)

    def ended(self, job: str, timeout: float) -> str:
        """The state of a job after its end; requeued jobs start at once."""

        def is_over() -> bool:
            self.hurry()
            return self.field(job, "JobState") in ENDED

        wait_for(is_over, timeout, f"job {job} did not end")
        return self.field(job, "JobState")

    def _configure(self) -> None:
        for name in ("state", "munge", "log"):
            (self.folder / name).mkdir()
        (self.folder / "munge/key").write_bytes(os.urandom(128))
        (self.folder / "munge/key").chmod(0o600)
        port, *ports = free_ports(1 + len(self.names))
        host, cores = socket.gethostname().partition(".")[0], max(2, os.cpu_count() or 1)
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={place} CPUs={cores} State=UNKNOWN\n"
            for name, place in zip(self.names, ports)
        )
        every = f"Nodes={','.join(self.names)} MaxTime=INFINITE State=UP OverSubscribe=NO"
        nodes += f"PartitionName=low {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE\n"
        nodes += f"PartitionName=grace {every} PriorityTier=1 PreemptMode=REQUEUE GraceTime=30\n"
        nodes += f"PartitionName=high {every} PriorityTier=10 PreemptMode=OFF\n"
        conf = CONF.format(host=host, folder=self.folder, port=port) + nodes
        (self.folder / "slurm.conf").write_text(conf)
        version = [int(part) for part in re.findall(r"\d+", self.run("slurmd", "-V"))[:2]]
        cgroups = "CgroupPlugin=disabled" if version >= [23, 11] else "CgroupAutomount=no"
        (self.folder / "cgroup.conf").write_text(f"{cgroups}\n")
        names = "".join(f"127.0.0.1 {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _munge_files(self) -> list[str]:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig=KILL", *command),
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def free_ports(count: int) -> list[int]:
    """Ports that no process uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], object], timeout: float, otherwise: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root only"
    commands = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if shutil.which(name) is None]
    return f"there is no {', '.join(commands)}: apt-get install {' '.join(PACKAGES)}" if commands else ""
