"""SIGKILL at file operations, counted below Python: of the writers one by one, and of whole runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "kill_at_disk.py"

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not sys.platform.startswith("linux"), reason="needs gcc, on Linux"
)

# Killed at every operation, the same work done again ends the same; what others read can be read after every kill.
WRITERS = """
import ctypes, itertools, json, os, shutil, signal, sys
from pathlib import Path
from detr_exp.tracker.base import RunRecord
from detr_exp.tracker.jsonl import JsonLines
from detr_exp.runs.past import find, load_all
from detr_exp.writing import remove_left_overs, write
from hydra_plugins.detr_exp._ledger import Entry, Ledger
from detr_exp.trainer.study import repair_journal

kill_at = ctypes.CDLL(os.environ["LD_PRELOAD"]).kill_at
root = Path(sys.argv[1]).resolve() / "work"

def work():
    run = root / "run"
    run.mkdir(parents=True, exist_ok=True)
    remove_left_overs(run)
    write(run / "config.yaml", "seed: 0\\n" * 3)
    record = RunRecord(id="a" * 32, project="p", name="n")
    record.save(run)
    lines = JsonLines(run / "metrics.jsonl")
    lines.rewind(1)
    for step in range(lines.count + 1, 5):
        lines.append(step, {"val/mAP": 0.1 * step})
    lines.rewind(3)
    write(run / "classes.json", json.dumps({"bbox": []}))
    record.status = "ok"
    record.save(run)
    ledger = Ledger(root)
    for number in range(3):
        if f"h{number}" not in ledger.latest():
            ledger.append(Entry(number, [], f"h{number}", "ok", 0.5, 1.0, None))
    repair_journal(root / "journal")

def readable():
    if (root / "run" / "run.json").exists():
        (run,) = load_all(find(str(root / "run")))
        assert [line["step"] for line in run.lines] == list(range(1, len(run.lines) + 1))
    assert all(entry.status == "ok" for entry in Ledger(root).entries())

def forked(operation="", number=0):
    child = os.fork()
    if child == 0:
        kill_at(os.fsencode(root) if number else b"", operation.encode(), b"*", number, b"")
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def fresh():
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "journal").write_text("{}\\n{}\\n{")

def content():
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

fresh()
assert forked() == 0
wanted, kills = content(), 0
assert wanted["journal"] == b"{}\\n{}\\n"
for operation in ("open", "write", "half", "sync", "rename", "truncate"):
    for number in itertools.count(1):
        fresh()
        ended = forked(operation, number)
        readable()
        if ended == 0:
            assert number > 1, f"nothing was killed at {operation}"
            break
        assert ended == -signal.SIGKILL, ended
        kills += 1
        assert forked() == 0
        assert content() == wanted, (operation, number)
print(kills)
"""


def test_the_writers_at_each_of_their_operations(tmp_path: Path) -> None:
    library = tmp_path / "kill_at_disk.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SCRIPT.with_suffix(".c"), "-ldl"], check=True)
    call = [sys.executable, "-c", WRITERS, str(tmp_path)]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=SCRIPT.parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "store", "sweep"])
def test_thirty_points_of_whole_runs(kind: str) -> None:
    call = [sys.executable, str(SCRIPT), "--only", kind, "--points", "10", "--minutes", "60"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    name, _, _, points, killed, wrong, _ = done.stdout.splitlines()[-1].split()
    assert (name, points, wrong) == (kind, "10", "0")
    assert int(killed) >= 8
