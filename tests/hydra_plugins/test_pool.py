"""Jobs that an engine starts elsewhere: in another folder, and with no other variables than those passed on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_plugins.detr_exp._pool import passed_on

ROOT = Path(__file__).resolve().parents[2]
APP = """
import os, subprocess, sys
from pathlib import Path
from detr_exp import cli
from hydra_plugins.detr_exp.local_launcher import Child, LocalLauncher

def elsewhere(self, work):
    with open(work.log, "ab") as log:
        process = subprocess.Popen(
            work.command, cwd=work.folder, stdin=subprocess.PIPE, stdout=log, stderr=log,
            env={"PATH": os.environ["PATH"], **work.environment},
        )
    self.children[str(process.pid)] = Child(0, "elsewhere", process)
    return str(process.pid), "elsewhere"

def task(cfg):
    import mine
    paths = [cfg.data.root, cfg.model.weights, cfg.trainer.resume, os.environ["MLFLOW_HERE"], cfg.tracker.project]
    return sum(Path(path).exists() for path in paths) + mine.HALF

if __name__ == "__main__":
    LocalLauncher.start = elsewhere
    cli.main(task, "config", "")
"""


def test_relative_paths_mean_what_they_mean_where_the_sweep_was_started(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    for name in ("data", "lib"):
        (tmp_path / name).mkdir()
    for name in ("w.pth", "c.pth", "variable", "project"):
        (tmp_path / name).touch()
    (tmp_path / "lib" / "mine.py").write_text("HALF = 0.5")
    words = ["--multirun", "tracker=none", "hydra.sweep.dir=s", "hydra/launcher=local", "seed=0,1", "data=coco"]
    words += ["data.root=data", "model.weights=w.pth", "trainer.resume=c.pth", "tracker.project=project"]
    variables = {"PYTHONPATH": f"lib:{os.path.relpath(ROOT, tmp_path)}", "MLFLOW_HERE": "variable"}
    command = [sys.executable, "app.py", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + next(tmp_path.glob("s/*/job.log")).read_text()
    assert done.stdout.count("5.5000") >= 2


def test_the_folders_of_modules_are_passed_on_as_absolute_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in (("lib", f"{tmp_path}/lib"), (f"{ROOT}::../x", f"{ROOT}:{tmp_path}:{tmp_path.parent}/x")):
        monkeypatch.setenv("PYTHONPATH", given)
        assert passed_on()["PYTHONPATH"] == expected
    monkeypatch.setenv("PYTHONPATH", "")
    assert passed_on()["PYTHONPATH"] == ""
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in passed_on()
