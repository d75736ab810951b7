"""All commands under one name."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from detr_exp import __main__ as front


def test_the_list_has_every_command() -> None:
    modules = Path(front.__file__).parent.glob("*.py")
    started = {path.stem for path in modules if 'if __name__ == "__main__"' in path.read_text("utf-8")}
    assert set(front.COMMANDS) == started - {"__main__"}


@pytest.mark.parametrize("name", sorted(front.COMMANDS))
def test_a_command_gets_the_words_after_its_name(
    name: str, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[list[str]] = []
    monkeypatch.setattr(import_module(f"detr_exp.{name}"), "main", lambda: received.append(sys.argv[1:]))
    assert command(front.main, name, "a=1", "--help") == 0
    assert received == [["a=1", "--help"]]


@pytest.mark.parametrize("words", [["model=rtdetrv2"], ["--multirun", "loss=focal,vfl"], ["+a=1"], ["--cfg", "job"]])
def test_without_a_command_it_trains(
    words: list[str], command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[list[str]] = []
    monkeypatch.setattr("detr_exp.train.main", lambda: received.append(sys.argv[1:]))
    assert command(front.main, *words) == 0
    assert received == [words]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands(
    words: list[str], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(front.main, *words) == 0
    shown = capfd.readouterr().out
    assert all(f"\n  {name} " in shown for name in front.COMMANDS)
    assert max(map(len, shown.splitlines())) <= 120


def test_a_mistyped_command_is_refused(command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert command(front.main, "trian") == 2
    assert "trian is not a command; did you mean train?" in capfd.readouterr().err


@pytest.mark.parametrize("words", [[], ["train"], ["weights"], ["explain"], ["evaluate"]])
def test_the_version_is_ours(words: list[str], command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert command(front.main, *words, "--version") == 0
    shown = capfd.readouterr().out
    assert shown.startswith("detr_exp 0.")
    assert f"torch {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else ''}" in shown
    assert "Hydra" not in shown


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [
        ("bash", "detr-exp ", set(front.COMMANDS)),
        ("fish", "detr-exp ex", {"export", "export_weights", "explain"}),
        ("bash", "detr-exp model=rtdetrv2_t", {"model=rtdetrv2_tiny"}),
        ("fish", "detr-exp train loss.focal_", {"loss.focal_alpha=", "loss.focal_gamma="}),
        ("bash", "detr-exp predict outp", {"output="}),
        ("bash", "detr-exp weights ", set()),
    ],
)
def test_what_may_follow(
    shell: str,
    line: str,
    expected: set[str],
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert command(front.main, "-sc", f"query={shell}") == 0
    assert set(capfd.readouterr().out.split()) == expected


COMPLETION = {  # shell -> where its settings are, and what stands there
    "bash": (".bashrc", 'eval "$(detr-exp --shell-completion install=bash)"'),
    "zsh": (".zshrc", 'eval "$(detr-exp --shell-completion install=zsh)"'),
    "fish": ("fish/config.fish", "detr-exp --shell-completion install=fish | source"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("shell", ["bash", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zsh", "fish"))])
def test_a_shell_completes_what_is_typed(shell: str, tmp_path: Path) -> None:
    """In a terminal, with the tabulator key."""
    import pty

    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    program, settings = tmp_path / "detr-exp", tmp_path / COMPLETION[shell][0]
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m detr_exp "$@"\n')
    program.chmod(0o755)
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(f"{COMPLETION[shell][1]}\necho read the settings\n")
    home = {name: str(tmp_path) for name in ("HOME", "ZDOTDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")}
    env = os.environ | home | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TERM": "xterm"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe(shell, [shell, "-i"], env | {"PYTHONPATH": str(Path(front.__file__).parents[1])})
    try:
        read_until(terminal, b"read the settings")
        os.write(terminal, b"detr-exp train model=rtdetrv2_t\t")
        read_until(terminal, b"model=rtdetrv2_tiny")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


def read_until(terminal: int, words: bytes) -> None:
    shown, end = b"", time.monotonic() + 60
    while words not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\([A-Z]", b"", shown):
        assert time.monotonic() < end, shown.decode(errors="replace")
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536)
