"""Kill runs at their file operations, let the same command go on, and compare with runs that were left in peace.

    python scripts/kill_at_disk.py [--minutes 50] [--points N] [--only NAME] [--seed 0]

Three kinds: a short training, the same with a store of MLflow that is not there yet, and a sweep of two. Every opening
for writing, write, fsync, rename, unlink and truncation is counted below Python, by a library that is preloaded (needs
gcc), so that what SQLite and torch write in C counts, too. A recording run lists them; they are grouped by file and
operation, points are sampled from each group: its first, its last, then others. SIGKILL comes before the operation,
or (`half`) when half of a write is done. Then the same command is given again. It must end with status 0, the same bits
in checkpoints and metrics as an undisturbed run, nothing left over, and a store, a ledger and a report that open.
Exit status 1 where that is not so.

Points are processes forked from one that has loaded everything and done nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import importlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from kill_and_resume import RTDETR, compare, metrics  # noqa: E402

SOURCE = Path(__file__).with_suffix(".c")
WORDS = (
    *("data=shapes", "data.source.size=64", "data.train=8", "data.val=4", "data.test=0", "data.num_workers=0"),
    *("model.image_size=[64,64]", "model.num_queries=20", *RTDETR),
    *("trainer/hardware=cpu", "trainer.hardware.amp=null", "trainer.hardware.threads=1", "trainer.deterministic=true"),
    *("trainer.epochs=2", "trainer.batch_size=4", "trainer.checkpoint_every_steps=1", "trainer.checkpoint_interval=1"),
    *("trainer.num_pictures=1", "trainer.log_every_steps=1", "trainer.progress_bar=none"),
)
LIMIT = 300.0  # seconds for one run
# parts of names that are new in every run
DRAWN = ((r"[0-9a-f]{32}", "<id>"), (r"\.[0-9a-f]{12}\.part", ".<id>.part"), (r"\d{13}[+%][0-9A-Za-z+%-]*", "<when>"))
DRAWN = (*DRAWN, (r"\.uploading\.\w{8}", ".uploading.<id>"))


class Point(NamedTuple):
    """When to kill: before the `number`-th `operation` (`half`: in the middle of a write) on a path like `pattern`."""

    operation: str
    pattern: str
    number: int


class Kind(NamedTuple):
    """Attributes: `words` of the command in a folder, and whether it is `swept` and `tracked` in a store."""

    words: Callable[[Path], list[str]]
    swept: bool
    tracked: bool


def _short(root: Path) -> tuple[str, ...]:
    return "tracker=mlflow", f"tracker.tracking_uri=sqlite:///{root}/store/mlflow.db", "trainer.epochs=1"


KINDS = {
    "training": Kind(
        lambda root: [*WORDS, "tracker=none", "trainer.resume=auto", f"hydra.run.dir={root}/run"], False, False
    ),
    "store": Kind(
        lambda root: [*WORDS, *_short(root), "trainer.resume=auto", f"hydra.run.dir={root}/run"],
        *(False, True),
    ),
    "sweep": Kind(
        lambda root: [
            *("--multirun", *WORDS, *_short(root), "trainer.num_pictures=0"),
            *("optim.lr=1e-4,2e-4", f"hydra.sweep.dir={root}/sweep"),
        ],
        *(True, True),
    ),
}


class Rehearsal:
    """Runs of one kind, all in a folder of the same name.

    Args:
        base: a folder for everything.
        kind: what is run.
    """

    def __init__(self, base: Path, kind: Kind) -> None:
        self.kind, self.root, self.peace = kind, base / "work", base / "peace"
        self.log, self.said = base / "operations", base / "said"
        self.words = kind.words(self.root)
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def run(self, point: Point | None = None, recorded: bool = False) -> int:
        """The command in a process of its own; how it ended."""
        return self._forked(lambda: self._train(point, recorded))

    def record(self) -> dict[tuple[str, str], int]:
        """Run in peace, keep what comes of it; how often there was which operation on which files."""
        self._fresh()
        if self.run(recorded=True) != 0:
            raise RuntimeError(f"the undisturbed run failed: {self.said.read_text(encoding='utf-8')[-3000:]}")
        self.root.rename(self.peace)
        lines = [line.split(" ", 1) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return Counter((operation, normalised(path)) for operation, path in lines)

    def wrong(self, point: Point) -> tuple[bool, list[str]]:
        """Kill at a point and go on; whether it was reached, and what is not as it should be."""
        self._fresh()
        ended = self.run(point)
        if ended not in (0, -signal.SIGKILL):
            return False, [f"the first run ended with {ended}: {self.said.read_text(encoding='utf-8')[-1500:]}"]
        again = self.run()
        if again != 0:
            return True, [
                f"the command given again ended with {again}: {self.said.read_text(encoding='utf-8')[-1500:]}"
            ]
        found = self.compared()
        if self._forked(self._look) != 0:
            found.append(f"store, ledger or report do not open: {self.said.read_text(encoding='utf-8')[-1500:]}")
        return ended == -signal.SIGKILL, found

    def compared(self) -> list[str]:
        """Where run folders differ from those of the undisturbed run, and what was left over."""
        found = []
        for one in sorted(path.parent for path in self.peace.rglob("metrics.jsonl")):
            two = self.root / one.relative_to(self.peace)
            # a sweep says `trainer.resume=auto` to jobs that go on
            found += [f"{two.name} {line}" for line in compare(one, two) if ".config.trainer.resume:" not in line]
        return found + [f"left over: {path}" for path in self.root.rglob(".*.part")]

    def _train(self, point: Point | None, recorded: bool) -> None:
        from detr_exp import train

        operation, pattern, number = point or ("", "", 0)
        log = str(self.log) if recorded else ""
        root = str(self.root) if point or recorded else ""
        sys.argv = ["detr_exp", *self.words]
        self.library.kill_at(*(os.fsencode(word) for word in (root, operation, pattern)), number, os.fsencode(log))
        train.main()
        if recorded:
            self.library.kill_at(b"", b"", b"", 0, b"")
            (self.log.with_name("modules")).write_text("\n".join(sys.modules), encoding="utf-8")

    def _look(self) -> None:
        """Open what other commands open; raises where something is wrong."""
        from omegaconf import OmegaConf

        from detr_exp.report import report_in
        from detr_exp.runs.past import find, load_all
        from hydra_plugins.detr_exp._ledger import Ledger

        folder = self.root / ("sweep" if self.kind.swept else "run")
        runs = load_all(find(str(folder)), str(folder))
        wrong = [f"{run.folder} is {run.status}" for run in runs if run.status != "ok"]
        report_in(self.root / "report", OmegaConf.create({"runs": str(folder), "root": str(self.root), "title": None}))
        if self.kind.swept:
            sweep = next(folder.rglob("sweep.jsonl")).parent
            values = [
                {key: (entry.status, entry.metric) for key, entry in Ledger(one).latest().items()}
                for one in (sweep, self.peace / sweep.relative_to(self.root))
            ]
            wrong += [] if values[0] == values[1] else [f"the ledger says {values[0]}, not {values[1]}"]
        if self.kind.tracked:
            wrong += self._stored([run.folder for run in runs])
        if wrong:
            raise RuntimeError("; ".join(wrong))

    def _stored(self, folders: list[Path]) -> list[str]:
        """What a store lacks or holds too often."""
        from detr_exp.tracker.mlflow import open_store

        file = self.root / "store" / "mlflow.db"
        open_store(f"sqlite:///{file}", "detr_exp")
        with sqlite3.connect(file) as base:
            runs = base.execute("SELECT count(*) FROM runs").fetchone()[0]
            going_on = base.execute("SELECT count(*) FROM runs WHERE status != 'FINISHED'").fetchone()[0]
            twice = base.execute(
                "SELECT key, step FROM metrics WHERE key NOT LIKE 'system/%' AND key NOT LIKE 'time/%' "
                "GROUP BY run_uuid, key, step HAVING count(*) > 1"
            ).fetchall()
            sent = {
                run: {
                    (key, step)
                    for key, step in base.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (run,))
                }
                for (run,) in base.execute("SELECT run_uuid FROM runs").fetchall()
            }
        wanted = len(folders) + self.kind.swept
        wrong = [f"{runs} runs in the store instead of {wanted}"] if runs != wanted else []
        wrong += [f"{going_on} runs in the store have not ended"] if going_on else []
        wrong += [f"{key} at step {step} is in the store twice" for key, step in twice]
        for folder in folders:
            run = json.loads((folder / "mlflow.json").read_text(encoding="utf-8"))["run_id"]
            lines = metrics(folder)
            logged = {(key, line["step"]) for line in lines for key in line if key not in ("step", "time/unix")}
            wrong += [f"{key} at step {step} is not in the store" for key, step in sorted(logged - sent[run])][:3]
        return wrong

    def _fresh(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def _forked(self, task: Callable[[], None]) -> int:
        """Exit status of a process that does something, minus the signal that ended it."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()
                with open(self.said, "wb") as said:
                    os.dup2(said.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
                os.chdir(self.root)
                task()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        deadline = time.monotonic() + LIMIT
        while True:
            ended, how = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(how)
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 124
            time.sleep(0.02)


def normalised(path: str) -> str:
    """A path with parts that are new in every run as `*`, as a pattern."""
    for drawn, name in DRAWN:
        path = re.sub(drawn, name, path)
    path = re.sub(r"([\[\]?*])", r"[\1]", path.replace("[", "\0")).replace("\0", "[[]")
    return re.sub(r"<\w+>", "*", path)


def points(groups: dict[tuple[str, str], int], rng: random.Random) -> list[Point]:
    """All kill points, the most telling first: of each group the first, the last, then the others in random order."""
    rounds: dict[int, list[Point]] = defaultdict(list)
    for (operation, pattern), count in groups.items():
        numbers = list(dict.fromkeys([1, count, *rng.sample(range(1, count + 1), count)]))
        for place, number in enumerate(numbers):
            rounds[3 * place].append(Point(operation, pattern, number))
            if operation == "write":
                rounds[3 * place + 1].append(Point("half", pattern, number))
    ordered = []
    for place in sorted(rounds):
        rng.shuffle(rounds[place])
        ordered += rounds[place]
    return ordered


def rehearse(name: str, seconds: float, most: int | None, seed: int) -> tuple[int, int, int, int, list[str]]:
    """Groups, operations, points tried, points reached, and what was wrong."""
    rng = random.Random(f"{seed} {name}")
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="kill_at_disk.") as folder:
        rehearsal = Rehearsal(Path(folder).resolve(), KINDS[name])
        groups = rehearsal.record()
        load_modules(Path(folder) / "modules")
        plan = points(groups, rng)[:most]
        tried = reached = 0
        wrong: list[str] = []
        for point in plan:
            if time.monotonic() > end:
                break
            was_reached, found = rehearsal.wrong(point)
            tried += 1
            reached += was_reached
            if found:
                wrong.append(f"{point.operation} {point.number} {point.pattern}: {'; '.join(found[:4])}")
                print(f"WRONG {name}: {wrong[-1]}", flush=True)
    return len(groups), sum(groups.values()), tried, reached, wrong


def load_modules(names: Path) -> None:
    """Load what a run has loaded, so that those forked from here need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names.read_text(encoding="utf-8").splitlines():
            if name not in sys.modules and not name.startswith("__"):
                try:
                    importlib.import_module(name)
                except Exception:  # some modules can be loaded by their own packages only
                    continue


def preloaded(arguments: list[str]) -> int:
    """This script again, with the library under it."""
    with tempfile.TemporaryDirectory(prefix="kill_at_disk.") as folder:
        library = Path(folder) / "kill_at_disk.so"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, __file__, *arguments], env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="for all kinds together")
    parser.add_argument("--points", type=int, help="of each kind; else as many as there is time for")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import detr_exp.build
    import detr_exp.report
    import detr_exp.train  # noqa: F401

    names = [name for name in KINDS if arguments.only in (None, name)]
    end = time.monotonic() + 60 * arguments.minutes
    failed = False
    print("kind      groups  operations  points  killed  wrong  seconds", flush=True)
    for place, name in enumerate(names):
        begin = time.monotonic()
        seconds = (end - begin) / (len(names) - place)
        groups, operations, tried, reached, wrong = rehearse(name, seconds, arguments.points, arguments.seed)
        spent = time.monotonic() - begin
        print(f"{name:<9}{groups:7}{operations:12}{tried:8}{reached:8}{len(wrong):7}{spent:9.0f}", flush=True)
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    if fnmatch.fnmatch(os.environ.get("LD_PRELOAD", ""), "*/kill_at_disk.so"):
        sys.exit(main())
    sys.exit(preloaded(sys.argv[1:]))
