"""Trainings from Python: results, mistakes, threads, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import detr_exp
from detr_exp import launch
from detr_exp.config.compose import CONF_DIR
from detr_exp.config.mistakes import ConfigError
from detr_exp.fitting import LOGGING
from detr_exp.trainer import checkpoint as files

NO_TRAINING = ["data.root=/nowhere", "data=coco"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def test_a_run_as_the_command_writes_it_and_a_second_one(tiny_run: list[str], tmp_path: Path) -> None:
    before, mask = handlers(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    first, second = detr_exp.fit(tiny_run), detr_exp.fit([*tiny_run, "hydra.run.dir=own"])
    assert (handlers(), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == (before, mask)
    assert second.folder == tmp_path / "own"
    pattern = yaml.safe_load((CONF_DIR / "config.yaml").read_text())["hydra"]["run"]["dir"]
    assert first.folder.relative_to(tmp_path).parts[0] == Path(pattern).parts[0]
    assert first.folder.name.endswith("-rtdetrv2_tiny-shapes")
    assert json.loads((first.folder / "run.json").read_text())["words"] == tiny_run
    stored = files.load(first.folder / files.BEST_TOTAL)["metrics"]
    assert first.metrics == {name: value for name, value in stored.items() if value != -1}
    assert len(first.metrics) < len(stored), "the shapes are small, so that there is no mAP_large"
    plain = [name for name in first.metrics if not name.startswith("time/")]
    assert {name: second.metrics[name] for name in plain} == {name: first.metrics[name] for name in plain}
    assert first.detector.path == first.folder / files.BEST_TOTAL
    assert first.detector is first.detector
    frame = first.to_pandas()
    assert frame["val/mAP"].dropna().tolist() == [first.metrics["mAP"]]
    assert not (frame == -1).any().any()


def test_in_a_thread_of_a_notebook_whose_loop_runs(tiny_run: list[str], tmp_path: Path) -> None:
    async def cell() -> Path:
        return (await asyncio.to_thread(detr_exp.fit, tiny_run, folder="run")).folder

    assert asyncio.run(cell()) == tmp_path / "run"
    assert (tmp_path / "run" / files.BEST_TOTAL).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=rtdetr"], "options of model:"),
        (["optim.lr=1,2"], "--multirun"),
        (["optim.lrr=1"], "optim.lr"),
        (["sweep=seeds"], r"fit\(\) trains one.*python -m detr_exp.train sweep=seeds"),
        (["--multirun", "seed=1"], r"--multirun is for the command line.*folder="),
        (["hydra/launcher=local"], "is for the command line"),
        (["hydra.run.dir=outputs/${now:%H}"], "is for the command line"),
        ("model=rtdetrv2", r'is no list of overrides; give \["key=value"'),
        ({"seed": 1}, "is no list of overrides"),
        ([Path("seed=1")], "is no list of overrides"),
        (["model.weights=absent.pth"], "model.weights=null"),
        (NO_TRAINING, r"is not a folder.*data\.root="),
    ],
)
def test_mistakes_are_exceptions_and_leave_nothing(words: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        detr_exp.fit(words)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_resumed_elsewhere_is_the_result(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_exp.trainer.trainer import Trainer

    step = Trainer.train_step

    def interrupted(*given: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(*given)

    before = handlers()
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"outputs.* is saved: trainer\.resume=auto"):
        detr_exp.fit(tiny_run)
    assert handlers() == before
    (stopped,) = tmp_path.glob("outputs/*/*")
    with pytest.raises(ValueError, match=r"holds a run.*hydra\.run\.dir="):
        detr_exp.fit(tiny_run, folder=stopped)
    with pytest.raises(ConfigError, match="command line"):
        detr_exp.fit(["hydra.run.dir=a"], folder="b")
    monkeypatch.setattr(Trainer, "train_step", step)
    assert detr_exp.fit([*tiny_run, "trainer.resume=auto"]).folder == stopped
    assert list(tmp_path.glob("outputs/*/*")) == [stopped]


def test_no_ranks_of_torchrun(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"use python instead of torchrun"):
        detr_exp.fit(tiny_run)
    assert not list(tmp_path.iterdir())


def test_the_package_is_imported_at_no_cost(tmp_path: Path) -> None:
    code = (
        "import sys, detr_exp; few = len([n for n in sys.modules if n.startswith('detr_exp')]); detr_exp.fit; "
        "print(few, [n for n in ('torch', 'numpy', 'pandas', 'mlflow') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "1 []"


def test_ranks_get_what_can_be_sent_to_them(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sent(Exception):
        pass

    def start(job: launch.Job, ranks: int) -> None:
        raise Sent(json.dumps(asdict(job)), ranks)

    monkeypatch.setattr(launch, "_on_ranks", start)
    with pytest.raises(Sent) as found:
        detr_exp.fit([*tiny_run, "trainer.hardware.devices=2"], folder="run")
    job, ranks = json.loads(found.value.args[0]), found.value.args[1]
    assert (job["folder"], job["logging"], ranks) == (str(tmp_path / "run"), LOGGING, 2)


@pytest.mark.slow
def test_fits_in_two_threads_at_once(tiny_run: list[str], tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(detr_exp.fit(tiny_run).folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2


@pytest.mark.slow
def test_two_ranks(tiny_run: list[str], tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    words = [*tiny_run, "trainer.hardware.devices=2"]
    script.write_text(f"import detr_exp\nif __name__ == '__main__':\n    print(detr_exp.fit({words}, folder='run'))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / files.BEST_TOTAL).exists()
