"""The steps of `docs/kubernetes/Containerfile` without a container: linted, and run as they are in an environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "kubernetes" / "Containerfile"
INDEX = "https://pypi.org/simple"  # as the build argument TORCH: the libraries are here already


def instructions() -> list[tuple[str, str]]:
    """Name and words of each, without comments."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, words) for name, _, words in (line.partition(" ") for line in joined)]


def test_the_container_file_is_fine(absent: Callable[[str], NoReturn]) -> None:
    found = Path(sys.executable).with_name("hadolint")
    linter = str(found) if found.exists() else shutil.which("hadolint")
    if linter is None:
        absent("hadolint is not installed (pip install 'detr_exp[engines]')")
    done = subprocess.run([linter, FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_steps_install_the_wheel_and_the_command_starts(tmp_path: Path, some_seconds: list[str]) -> None:
    context, home, work = tmp_path / "wheel", tmp_path / "env", tmp_path / "work"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(context), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(home, with_pip=True)
    # a .pth line adds the folder only: .pth files inside it, and with them the editable checkout, are not followed
    (site,) = home.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work.mkdir(mode=0o777)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables, command = clean | {"PATH": f"{home}/bin:{os.environ['PATH']}"}, list[str]()
    for name, words in instructions():
        words = words.replace("/tmp/wheel", str(context))
        if name in ("ARG", "ENV"):
            variables |= dict(pair.split("=", 1) for pair in words.split())
            variables["TORCH"] = INDEX
        elif name == "COPY":
            *sources, _ = words.split()
            assert sources == ["constraints.txt", "dist/*.whl"]
            shutil.copy(ROOT / "constraints.txt", context)
        elif name == "RUN" and "pip" in words:
            # neither Debian's packages nor users of this machine
            line = re.sub(r"&& useradd .*", "", words)
            subprocess.run(["sh", "-c", line], cwd=tmp_path, env=variables, check=True, capture_output=True)
            assert not context.exists()
        elif name in ("ENTRYPOINT", "CMD"):
            command += json.loads(words)
    assert command == ["python", "-m", "detr_exp.train", "--help"]
    variables["HOME"] = variables["MPLCONFIGDIR"] = str(tmp_path / "anyone")
    shown = subprocess.run(command, cwd=work, env=variables, check=True, capture_output=True, text=True).stdout
    assert "model=" in shown
    where = subprocess.run(
        ["python", "-c", "import detr_exp, psycopg, boto3, ray; print(detr_exp.__file__)"],
        cwd=work,
        env=variables,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(home))
    trained = [*command[:3], *some_seconds, "trainer.epochs=1", "hydra.run.dir=run"]
    subprocess.run(trained, cwd=work, env=variables, check=True, capture_output=True)
    assert (work / "run" / "checkpoint.pth").exists()
