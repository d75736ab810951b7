"""What the README and the other pages say, done."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp import fitting
from detr_exp.config.compose import compose
from detr_exp.fitting import Fitted

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SHELL = "\n".join(block for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
SHELL = SHELL.replace("\\\n", " ")
PYTHON = {name: found for name, page in PAGES.items() if (found := re.findall(r"```python\n(.*?)```", page, re.DOTALL))}
NAMES = "|".join(path.stem for path in (ROOT / "conf").glob("*.yaml") if path.stem != "config") + "|train"
COMMANDS = list(dict.fromkeys(re.findall(rf"python -m detr_exp\.({NAMES}) ([^#\n|&]*)", SHELL)))
OWN_PARTS = "--config-dir"  # what tests/test_extension.py does
TABLES = ("README.md", "train.md", "several_gpus.md")  # of overrides


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_examples_run(name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a training that is done already."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save("photo.jpg")
    asked: list[list[str]] = []
    monkeypatch.setattr(fitting, "fit", lambda words: asked.append(words) or Fitted(trained, {"mAP": 0.0}))
    for example in PYTHON[name]:
        names: dict[str, object] = {}
        exec(example.replace("outputs/<day>/<run>", str(trained)).replace("=onnx", "=torchscript"), names)
        if "outputs" in names:
            assert tuple(names["outputs"].pred.logits.shape) == (2, 100, 6)  # type: ignore[attr-defined]
    for words in asked:
        compose(words)


@pytest.mark.parametrize("command", [pair for pair in COMMANDS if OWN_PARTS not in pair[1]], ids=" ".join)
def test_commands_compose(command: tuple[str, str]) -> None:
    name, line = command
    words = shlex.split(re.sub(r"<([^>]*)>", lambda found: re.sub(r"\W", "", found[1]), line))
    if "--multirun" in words or any(word.startswith("sweep=") for word in words):
        words = [word for word in words if word != "--multirun" and "interval(" not in word]
        words = [word if "[" in word else word.partition(",")[0] for word in words]
    compose(words, config_name="config" if name == "train" else name)


def test_torchrun_starts_a_command_that_composes() -> None:
    (line,) = re.findall(r"^python -m detr_exp\.torchrun .*-m detr_exp\.train (.*)", SHELL, re.MULTILINE)
    compose(shlex.split(line))


def test_jobs_of_slurm_start_scripts_that_are_there_with_words_that_compose() -> None:
    jobs = re.findall(r"^sbatch (?:--\S+ )*(\S+) (.*)", SHELL, re.MULTILINE)
    assert {Path(script) for script, _ in jobs} == {
        path.relative_to(ROOT) for path in (ROOT / "scripts/slurm").iterdir()
    }
    for script, words in jobs:
        assert words.strip() in (ROOT / script).read_text().replace(" \\\n#  ", ""), "its header gives the same command"
        done = subprocess.run(["bash", "-n", ROOT / script], text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        compose(shlex.split(words))


def test_words_of_the_table_exist() -> None:
    for line in "\n".join(PAGES[name] for name in TABLES).splitlines():
        if line.startswith("| `"):
            for words in re.findall(r"`([^`]*=[^`]*)`", line.rpartition("|")[0].rpartition("|")[0]):
                compose(shlex.split(words))
