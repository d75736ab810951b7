"""Addresses of databases: which driver they need, in words; real servers are in `tests/engines`."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from detr_exp.tracker.database import is_on_server, missing_driver, patience


@pytest.mark.parametrize("address", ["sqlite:///outputs/mlflow.db", "http://host:5000", "databricks", "/some/folder"])
def test_other_stores_need_no_driver(address: str) -> None:
    assert not is_on_server(address)
    assert missing_driver(address) is None


@pytest.mark.parametrize(
    ("address", "name", "words"),
    [
        (
            "postgresql+psycopg://me:secret@host/db",
            "psycopg",
            "psycopg is not installed: pip install 'detr",
        ),
        ("postgresql+psycopg://me:secret@host/db", None, "psycopg is not installed: pip install 'detr"),
        ("postgresql+psycopg2://me:secret@host/db", "psycopg2", "and write postgresql+psycopg://..."),
        ("postgres://me:secret@host/db", "", "write postgresql+psycopg://..."),
        ("postgresql+nodriver://me:secret@host/db", "", "no driver postgresql+nodriver"),
        ("postgresql+psycopg://me:sec@ret@host/db", "", "%40 for @"),
        ("postgresql+psycopg://me@host:secret/db", "", "it is no address"),
        ("mysql://me:secret@host/db", "MySQLdb", "pip install mysqlclient"),
        ("mysql+pymysql://me:secret@host/db", "pymysql", "pip install pymysql"),
    ],
)
def test_a_missing_driver_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, address: str, name: str | None, words: str
) -> None:
    """`psycopg` without its C library raises an error without a name."""
    imported = builtins.__import__

    def without(module: str, *others: Any) -> Any:
        if module in ("psycopg", "psycopg2", "MySQLdb", "pymysql") and others[3:] in ((), (0,)):
            raise ImportError("cannot be imported", name=name)
        return imported(module, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    found = missing_driver(address)
    assert found is not None
    assert words in found
    assert not any(part in found for part in ("secret", "ret@"))


def test_a_time_limit_of_the_address_holds() -> None:
    assert patience("postgresql+psycopg://host/db") == {"connect_timeout": 10}
    assert patience("postgresql+psycopg://host/db?connect_timeout=3") == {}
    assert patience("sqlite:///x.db") == {}
