"""The wheel works by itself: installed beside the libraries, run from an empty folder, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that sees the libraries of this one and the wheel, but not the checkout."""
    home = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    # a .pth line adds the folder only: .pth files inside it, and with them the editable checkout, are not followed
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    return python


def run(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([python, *words], cwd=folder, env=clean, capture_output=True, text=True, check=False)


def test_its_page_can_be_shown(wheel: Path) -> None:
    words = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_wheel_holds_configs_and_plugins(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"detr_exp/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert shipped <= names
    assert "hydra_plugins/detr_exp/grid_sweeper.py" in names
    assert "detr_exp/published/weights.csv" in names
    assert "hydra_plugins/__init__.py" not in names, "others put their plugins there too"
    assert not [name for name in names if name.startswith("tests/")]


def test_the_commands_run_from_an_empty_folder(python: Path, tiny_run: list[str], tmp_path: Path) -> None:
    where = run(python, tmp_path, "-c", "import detr_exp; print(detr_exp.__file__)").stdout
    assert str(ROOT) not in where
    done = run(python, tmp_path, "-m", "detr_exp.train", *tiny_run, "loss.focal_gamma=2.0")
    assert done.returncode == 0, done.stderr
    (trained,) = (path.parent for path in tmp_path.glob("outputs/*/*/metrics.jsonl"))
    done = run(python, tmp_path, "-m", "detr_exp.evaluate", f"checkpoint={trained}")
    assert done.returncode == 0, done.stderr
    done = run(python, tmp_path, "-m", "detr_exp.predict", f"checkpoint={trained}", f"source={trained}/predictions")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("outputs/predict/*/*/detections.json"))
    words = ["--multirun", *tiny_run, "loss=focal,vfl"]
    done = run(python, tmp_path, "-m", "detr_exp.train", *words)
    assert done.returncode == 0, done.stderr
    assert "2 runs, best first" in done.stdout
    done = run(python, tmp_path, "-m", "detr_exp.train", "model=rtdetrv3")
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    done = subprocess.run(
        [python.parent / "detr-exp", "train", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "rtdetrv2_tiny" in done.stdout
