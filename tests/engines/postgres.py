"""A PostgreSQL server of its own on loopback, with a password, as an unprivileged user."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

PASSWORD = "q9$Vx/w:2#@k%7"  # every character that an address has a meaning for
IN_ADDRESS = "q9%24Vx%2Fw%3A2%23%40k%257"


def programs() -> Path | None:
    """The folder of initdb and pg_ctl."""
    found = shutil.which("pg_ctl")
    folders = [*([Path(found).resolve().parent] if found else []), *Path("/usr/lib/postgresql").glob("*/bin")]
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Postgres:
    """Started in the constructor; `stop` also removes its files.

    Args:
        connections: at once, at most.
    """

    def __init__(self, connections: int = 40) -> None:
        self.programs, self.port, self.connections = programs(), free_port(), connections
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self.user:
            for path in (self.folder, secret):
                shutil.chown(path, "postgres", "postgres")
        self._do("initdb", "-D", "data", "-A", "scram-sha-256", "-U", "tester", f"--pwfile={secret}", "--no-sync")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        options += f" -c fsync=off -c shared_buffers=16MB -c max_connections={self.connections}"
        self._do("pg_ctl", "-D", "data", "-w", "-t", "120", "-l", "log", "-o", options, "start")

    def halt(self) -> None:
        self._do("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    def stop(self) -> None:
        self.halt()
        shutil.rmtree(self.folder)

    def database(self, name: str) -> str:
        """The address of a new database."""
        self.ask("postgres", f"create database {name}")
        return f"postgresql+psycopg://tester:{IN_ADDRESS}@127.0.0.1:{self.port}/{name}"

    def ask(self, database: str, words: str) -> list[str]:
        """The lines of an answer."""
        words_of = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", "-d", database, "-Atc", words]
        return self._do(*words_of).splitlines()

    def client(self) -> subprocess.Popen[bytes]:
        """Stays connected until it is killed."""
        words = [self.programs / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", "-d", "postgres"]
        return subprocess.Popen(words, stdin=subprocess.PIPE, env={"PGPASSWORD": PASSWORD}, stderr=subprocess.DEVNULL)

    def _do(self, program: str, *words: str) -> str:
        done = subprocess.run(
            [str(self.programs / program), *words],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if program != "pg_ctl" else subprocess.DEVNULL,  # else the server keeps it open
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            **self.user,
        )
        assert done.returncode == 0, (program, words, done.stdout)
        return done.stdout
