"""Exit statuses and what a user sees when something goes wrong."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli, folder
from detr_exp.config.mistakes import ConfigError
from detr_exp.signals import Interrupted
from detr_exp.trainer.checkpoint_content import NonFiniteError
from detr_exp.trainer.hardware import Hardware


def a_mistake() -> None:
    Hardware(
        device="abacus",
        amp="bf16",
        eval_amp=None,
        channels_last=False,
        gradient_checkpointing=False,
        compile=False,
        threads=None,
    )


def a_bug() -> None:
    int("ten")


def a_library_stumbles() -> None:
    """As Hydra does where it is interrupted while it reads a file."""
    try:
        raise Interrupted(10)
    finally:
        int("ten")


def raised(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("action", "status", "traceback"),
    [
        (a_mistake, 2, False),
        (a_bug, 1, True),
        (raised(ConfigError("x")), 1, True),  # raised by a test, which is none of ours
        (raised(NonFiniteError("images [3]")), 1, False),
        (raised(KeyError("x")), 1, True),
        (raised(OSError(errno.ENOSPC, "No space left on device")), 2, False),
        (raised(OSError(errno.EROFS, "Read-only file system", "ro/run")), 2, False),
        (raised(OSError(errno.EFBIG, "File too large")), 2, False),
        (raised(OSError(errno.EMFILE, "Too many open files")), 1, False),
        (raised(MemoryError()), 1, False),
        (raised(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")), 1, False),
        (raised(OSError(errno.EIO, "Input/output error")), 1, True),
        (raised(Interrupted(15)), 143, False),
        (raised(Interrupted(2)), 130, False),
        (raised(KeyboardInterrupt()), 130, False),
        (a_library_stumbles, 75, False),
    ],
)
def test_exit_statuses_of_errors(
    action: Callable[[], None], status: int, traceback: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        action()
    assert cli.report(caught.value) == status
    told = capsys.readouterr().err
    assert ("Traceback" in told) == traceback
    assert told.strip()


def alone() -> float:
    raise AssertionError("nothing was to be started")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.source.seed=${oc.env:NO_SUCH_VARIABLE}"], r"NO_SUCH_VARIABLE.*data\.source\.seed=\.\.\."),
        (["optim.lr=${optim.lrr}"], r"optim\.lr refers to a missing key.*optim\.lrr"),
        (["optim.lr=${optim.lr}"], "Recursive"),
        (["optim.lr=${unheard:3}"], "unheard"),
        (["optim.lr=${oc.env:HOME}"], r"refers to .* takes a number"),
        (["hydra.run.dir=${oc.env:NO_SUCH_VARIABLE}"], r"NO_SUCH_VARIABLE.*hydra\.run\.dir=\.\.\."),
        (["~optim.lr"], r"every run needs optim\.lr"),
        (["--config-name", "other"], r"--config-name other.*group=option"),
        (["--config-path", "/elsewhere"], "--config-path /elsewhere"),
        (["--package", "loss"], "--cfg job --package loss"),
        (["--cfg", "job", "--package", "lost"], "there is no such key"),
        (["--resolve"], "--cfg job --resolve"),
        (["--multirun", "--cfg", "job"], "cannot be combined"),
        (["--info", "everything"], "invalid choice"),
        (["--shell-completion"], "install=bash"),
        (["--shell-completion", "install=nope"], "install=bash"),
        (["--experimental-rerun", "job.pickle"], "can run code"),
        (["hydra.run.dri=x"], "dri"),
        (["hydra.run.dir=../file"], r"File exists.*hydra\.run\.dir="),
        (["hydra.run.dir=../file/run"], r"Not a directory.*hydra\.run\.dir="),
        ([f"hydra.run.dir={'x' * 300}"], r"too long.*hydra\.run\.dir="),
        (["--multirun", "seed=range(0,0)"], "gives no value"),
        (["--multirun", "seed=range(1,3,0)"], "cannot be counted"),
        (["--multirun", "loss="], "does not exist"),
        (["--multirun", "seed=1,2,1"], "gives 1 more than once"),
        (["--multirun", "loss=focal,'focal'"], "gives focal more than once"),
        (["--multirun", "optim.lr=1e-4,0.0001"], "more than once"),
        (["--multirun", "seed=1,2", "hydra.sweep.subdir=same"], r"hydra\.sweep\.dir="),
        (["--multirun", "seed=1,2", "hydra.sweep.subdir=${hydra.job.num}"], r"hydra\.job\.num"),
        (["--multirun", "seed=1,2", "hydra.sweep.dir=../file"], r"File exists.*hydra\.sweep\.dir="),
        (["tracker=none", "--multirun", "seed=1,1"], "more than once"),
        (["sweep=seed"], r"sweep=seed does not exist; did you mean sweep=seeds\?"),
        (["--multirun", "loss=focal,vfl", "loss.focal_gama=2"], r"focal_gama.*did you mean"),
        (["--multirun", "loss=focal,vfl", "hydra.sweep.dri=x"], "dri"),
        (["sweep=[seeds,learning_rates]"], r"names several files.*: sweep=learning_rates seed=0,1,2"),
        (["--multirun", "sweep=seeds,focal_gamma"], r"names several files.*: sweep=focal_gamma seed=0,1,2"),
        (["sweep=seeds", "sweep=optuna"], r"names several files.*: sweep=optuna seed=0,1,2"),
    ],
)
def test_a_mistake_about_hydra_is_one_sentence_and_leaves_nothing(
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    (tmp_path / "file").touch()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert command(lambda: cli.main(lambda cfg: alone(), "config", ""), *words) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert re.search(told, said.err), said.err
    assert not list(here.iterdir())


def test_a_sweep_of_options_sets_keys_that_only_these_have(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def note(cfg: DictConfig) -> float:
        seen.append((cfg.model["_target_"], cfg.data.root))
        return 0.0

    words = "--multirun", "experiment=rtdetrv2_r18vd_120e_coco,rfdetr_nano_coco", f"data.root={tmp_path}"
    assert command(lambda: cli.main(note, "config", ""), *words) == 0, capsys.readouterr().err
    assert [root for _, root in seen] == [str(tmp_path)] * 2
    assert len({network for network, _ in seen}) == 2


def test_a_refused_command_leaves_only_folders_of_the_user(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(cfg: DictConfig) -> float:
        with folder.exclusive_access(Path(HydraConfig.get().runtime.output_dir)):
            raise_in_our_name()
        return 0.0

    os.utime(tmp_path, (1, 1))
    (tmp_path / "mine").mkdir()
    os.utime(tmp_path / "mine", (1, 1))
    for place in ("mine", "made/for/it"):
        assert command(lambda: cli.main(refuse, "config", ""), f"hydra.run.dir={place}") == 2
    assert [path.name for path in tmp_path.rglob("*") if "made" in str(path)] == []


def raise_in_our_name() -> None:
    a_mistake()
