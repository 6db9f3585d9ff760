"""One Postgres for the whole run, one template, and two grades of database.

``conn``      a connection in a transaction that is rolled back: the default, about a millisecond.
``database``  the address of a database of the test's own, cloned from the template: for several
              connections, NOTIFY, processes.

The server is the embedded one (``SLUICE_TEST_POSTGRES=16`` for that version), or whatever
``SLUICE_TEST_DATABASE`` says: a URL of a superuser's database, or ``container``.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from app import embedded
from app.db import Connection, Database, folder
from app.ids import created_on, uuid7


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server's database in which databases may be created."""
    given = os.environ.get("SLUICE_TEST_DATABASE")
    if given == "container":
        from testcontainers.postgres import PostgresContainer  # noqa: PLC0415 - needs an engine

        with PostgresContainer("postgres:18", driver=None) as container:
            yield container.get_connection_url()
    elif given:
        yield given
    else:
        base = tmp_path_factory.getbasetemp()
        # Under xdist every process has a folder of its own below the run's: they share one server.
        home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sluice"
        server = embedded.acquire(
            home,
            version=int(os.environ.get("SLUICE_TEST_POSTGRES", "18")),
            settings={"fsync": "off", "full_page_writes": "off", "log_min_messages": "warning"},
        )
        yield server.url
        server.release()


def at(url: str, name: str) -> str:
    """The same server, another database."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"/{name}"))


def schema_files() -> list[Path]:
    root = folder("sql")
    return [
        root / "schema.sql",
        *sorted((root / "functions").glob("*.sql")),
        *sorted((root / "reports").glob("*.sql")),
    ]


@pytest.fixture(scope="session")
def template(cluster: str) -> str:
    """A database with the schema, made once per content of sql/, shared by all processes."""
    text = b"\n".join(file.read_bytes() for file in schema_files())
    name = f"sluice_template_{hashlib.sha256(text).hexdigest()[:16]}"
    with psycopg.connect(cluster, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(820)")
        made = conn.execute("select from pg_database where datname = %s", (name,)).rowcount
        if not made:
            building = f"{name}_building"
            conn.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(building))
            )
            conn.execute(sql.SQL("create database {}").format(sql.Identifier(building)))
            with psycopg.connect(at(cluster, building), autocommit=True) as inside:
                inside.execute(text)
                inside.execute(
                    "select partitions_ensure(d::date) from generate_series("
                    "current_date - 1, current_date + 1, interval '1 day') d"
                )
            conn.execute(
                sql.SQL("alter database {} rename to {}").format(
                    sql.Identifier(building), sql.Identifier(name)
                )
            )
        conn.execute("select pg_advisory_unlock(820)")
    return name


@contextmanager
def cloned(cluster: str, template: str) -> Generator[str]:
    """The address of a new database like the template; it is dropped at the end."""
    name = f"test_{uuid4().hex[:16]}"
    new = sql.Identifier(name)
    with psycopg.connect(cluster, autocommit=True) as conn:
        # Copying files takes a sixth of the time of the default, which logs every block.
        conn.execute(
            sql.SQL("create database {} template {} strategy file_copy").format(
                new, sql.Identifier(template)
            )
        )
    try:
        yield at(cluster, name)
    finally:
        with psycopg.connect(cluster, autocommit=True) as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(new))


@pytest.fixture(scope="session")
def shared_database(cluster: str, template: str) -> Iterator[str]:
    """The database under ``conn``; nothing is ever committed there."""
    with cloned(cluster, template) as url:
        yield url


@pytest.fixture
def database(cluster: str, template: str) -> Iterator[str]:
    """The address of a database of the test's own."""
    with cloned(cluster, template) as url:
        yield url


@pytest.fixture
async def conn(shared_database: str) -> AsyncIterator[Connection]:
    """A connection whose transaction is rolled back at the end."""
    async with await psycopg.AsyncConnection.connect(shared_database) as connection:
        await connection.execute("select partitions_ensure(%s)", (created_on(uuid7()),))
        yield connection
        await connection.rollback()


@pytest.fixture
async def db(database: str) -> AsyncIterator[Database]:
    """A pool on a database of the test's own."""
    async with Database(database, size=6) as pool:
        yield pool
