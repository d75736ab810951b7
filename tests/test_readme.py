"""What the README says, done."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp.config.compose import compose

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
NAMES = "train|evaluate|predict|export|benchmark|report|compare|reproduce|sync"
COMMANDS = re.findall(rf"python -m detr_exp\.({NAMES}) ([^#\n]*)", SHELL)
OWN_PART = "model/backbone=mine"  # what tests/test_extension.py does


def test_the_python_example_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save("photo.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace("outputs/<day>/<run>", str(trained)), names)
    assert tuple(names["outputs"].pred.logits.shape) == (2, 100, 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [pair for pair in COMMANDS if OWN_PART not in pair[1]], ids=" ".join)
def test_commands_compose(command: tuple[str, str]) -> None:
    name, line = command
    words = shlex.split(line.replace("<", "").replace(">", ""))
    if "--multirun" in words:
        words = [word.partition(",")[0] for word in words if word != "--multirun"]
    compose(words, config_name="config" if name == "train" else name)


def test_torchrun_starts_a_command_that_composes() -> None:
    pattern = r"^python -m detr_exp\.torchrun .*-m detr_exp\.train (.*)"
    (line,) = re.findall(pattern, SHELL.replace("\\\n", " "), re.MULTILINE)
    compose(shlex.split(line))


def test_jobs_of_slurm_start_scripts_that_are_there_with_words_that_compose() -> None:
    jobs = re.findall(r"^sbatch (?:--\S+ )*(\S+) (.*)", SHELL.replace("\\\n", " "), re.MULTILINE)
    assert {Path(script) for script, _ in jobs} == {
        path.relative_to(ROOT) for path in (ROOT / "scripts/slurm").iterdir()
    }
    for script, words in jobs:
        assert words.strip() in (ROOT / script).read_text().replace(" \\\n#  ", ""), "its header gives the same command"
        done = subprocess.run(["bash", "-n", ROOT / script], text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        compose(shlex.split(words))


def test_words_of_the_table_exist() -> None:
    for line in README.splitlines():
        if line.startswith("| `"):
            for words in re.findall(r"`([^`]*=[^`]*)`", line.rpartition("|")[0].rpartition("|")[0]):
                compose(shlex.split(words))
