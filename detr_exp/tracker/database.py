"""Databases of servers (PostgreSQL, MySQL), reached through SQLAlchemy: their drivers, and one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SERVERS = ("postgresql", "mysql", "mssql")  # need a driver package
REQUIREMENTS = {"psycopg": "'detr_exp[postgres]'", "MySQLdb": "mysqlclient"}  # module -> what to install
MALFORMED = (
    "it is no address; write dialect+driver://user:password@host:port/database, and in the password %40 for @, %3A "
    "for :, %2F for /"
)
CONNECT = 10  # seconds to wait for a server
# by dialect: waits until no other process has this lock, which ends with the connection
LOCKS = {
    "postgresql": "SELECT pg_advisory_xact_lock(3620193645)",
    "mysql": "SELECT GET_LOCK('detr_exp', 300)",
}


def is_on_server(address: str) -> bool:
    """Whether this is the address of a database of a server: `postgresql+psycopg://...`."""
    return dialect_of(address) in SERVERS


def dialect_of(address: str) -> str:
    """`postgresql` of `postgresql+psycopg://...`."""
    return address.partition(":")[0].partition("+")[0]


def missing_driver(address: str) -> str | None:
    """Which package the database of an address needs, or what is wrong with the address, in words; None if nothing.

    Errors of libraries are not quoted: of an address that they read wrongly they would show a part of the password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    if address.startswith("postgres://"):
        return "postgres:// is not a database of SQLAlchemy; write postgresql+psycopg://..."
    if not is_on_server(address):
        return None
    if address.partition("?")[0].count("@") > 1:
        return MALFORMED
    try:
        make_url(address).get_dialect().import_dbapi()
    except NoSuchModuleError:
        return f"SQLAlchemy has no driver {address.partition(':')[0]}; for PostgreSQL write postgresql+psycopg://..."
    except (ArgumentError, ValueError):
        return MALFORMED
    except ImportError as error:
        package = error.name or address.partition(":")[0].partition("+")[2]  # psycopg without its libpq has no name
        if dialect_of(address) == "postgresql" and package != "psycopg":
            return f"{package} is not installed: pip install 'detr_exp[postgres]', and write postgresql+psycopg://..."
        return f"{package} is not installed: pip install {REQUIREMENTS.get(package, package)}"
    return None


def patience(address: str) -> dict[str, int]:
    """Settings that let the driver give up a server that does not answer."""
    return {"connect_timeout": CONNECT} if dialect_of(address) in LOCKS and "connect_timeout" not in address else {}


@contextmanager
def sole_access(address: str) -> Iterator[None]:
    """In this context, no other process of this project has sole access to the database.

    Raises:
        sqlalchemy.exc.OperationalError: the server cannot be reached.
    """
    from sqlalchemy import NullPool, create_engine, text

    os.environ.setdefault("PGCLIENTENCODING", "utf8")  # from a database without encoding psycopg would give bytes
    with create_engine(address, poolclass=NullPool, connect_args=patience(address)).connect() as connection:
        if dialect_of(address) in LOCKS:
            connection.execute(text(LOCKS[dialect_of(address)]))
        yield
