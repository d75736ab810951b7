"""Storages of studies: addresses, and servers that are away; real ones are in `tests/engines`."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr_exp.config.mistakes import ConfigError
from detr_exp.trainer import study
from detr_exp.trainer.study import StorageError, is_outage, patiently, storage

optuna = pytest.importorskip("optuna")


def outage() -> Exception:
    """What Optuna raises when a server ends a connection."""
    error = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = type("OperationalError", (Exception,), {})("cannot connect to postgresql://me:secret@host/db")
    return error


@pytest.mark.parametrize("address", [None, "other.journal", "sqlite:///{folder}/s.db"])
def test_a_study_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    place = None if address is None else address.format(folder=tmp_path)
    optuna.create_study(study_name="s", storage=storage(tmp_path, place)).ask()
    assert len(optuna.load_study(study_name="s", storage=storage(tmp_path, place)).trials) == 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("postgres://me:secret@host/db", "write postgresql+psycopg://"),
        ("nosuch://me:secret@host/db", "sqlite:///file.db or a path, or leave it out"),
        ("postgresql+psycopg://me:secret@host:port/db", "hydra.sweeper.storage="),
    ],
)
def test_what_is_no_storage_is_refused_without_its_password(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        storage(tmp_path, address)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_storage_out_of_reach_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"hydra\.sweeper\.storage=sqlite:////no/x\.db cannot be reached \(unable"):
        storage(tmp_path, "sqlite:////no/x.db")


def test_a_call_is_repeated_while_the_storage_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "PAUSE", 0.0)
    answers = [outage(), outage(), 7]

    def call() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(call, "postgresql://me:secret@host/db") == 7
    assert capsys.readouterr().out.count("does not answer") == 1
    monkeypatch.setattr(study, "PATIENCE", 0.0)
    answers[:] = [outage(), outage(), outage()]
    with pytest.raises(StorageError, match="the same command goes on") as gone:
        patiently(call, "postgresql://me:secret@host/db")
    assert "secret" not in str(gone.value) + capsys.readouterr().out
    answers[:] = [KeyError("a bug")]
    with pytest.raises(KeyError):
        patiently(call, None)


def test_only_a_server_that_is_away_is_an_outage() -> None:
    assert is_outage(outage())
    assert not is_outage(ValueError("x"))
    assert not is_outage(optuna.exceptions.StorageInternalError("too long a value"))
