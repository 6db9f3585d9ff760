"""The database: named statements, a pool, and what to do while it is away.

Statements live in ``sql/queries/<noun>.sql`` under ``-- name: x`` headers, in psycopg's own
``%(name)s`` syntax: what you read there is what is sent. ``Query`` binds one to the dataclass of its
rows; the module that owns the noun wraps it in a function. Nothing here opens a transaction for
a domain function: processes and handlers do (``async with db.transaction() as conn``).
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Generic, LiteralString, Self, TypeVar, cast
from weakref import WeakKeyDictionary

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import class_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from app.errors import DatabaseUnavailableError
from app.log import Log

log = Log("db")

Connection = AsyncConnection[Any]
Row = TypeVar("Row")
Result = TypeVar("Result")

_RESTED_S = 1.0

_HERE = Path(__file__).resolve().parent
_NAME = re.compile(rb"^-- name: (\w+)[^\n]*\n", re.MULTILINE)

#: Failures of the connection, not of the statement: the same work may be tried again.
CONNECTION_ERRORS = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, OSError)


def folder(name: str) -> Path:
    """A folder of package data: inside the installed package, else beside it in the checkout."""
    installed = _HERE / name
    return installed if installed.is_dir() else _HERE.parent / name


@cache
def statements(file: str) -> dict[str, bytes]:
    """All statements of ``sql/queries/<file>.sql`` by name, in the order of the file."""
    text = (folder("sql") / "queries" / f"{file}.sql").read_bytes()
    parts = _NAME.split(text)[1:]
    return {name.decode(): body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


class NoRow:
    """The row type of statements that return nothing."""


class Query(Generic[Row]):
    """One named statement and the type of its rows.

    ``row`` is a dataclass or a Struct whose fields are the statement's columns; an extra or a missing
    one is a TypeError at the first fetch, and a test compares them without running the statement.
    """

    def __init__(self, file: str, name: str, row: type[Row]) -> None:
        self.file = file
        self.name = name
        self.row = row
        self.sql = statements(file)[name]

    async def all(self, conn: Connection, **params: object) -> list[Row]:
        """Every row."""
        async with conn.cursor(row_factory=class_row(self.row)) as cursor:
            await cursor.execute(self.sql, params)
            return await cursor.fetchall()

    async def one_or_none(self, conn: Connection, **params: object) -> Row | None:
        """The only row, or None."""
        rows = await self.all(conn, **params)
        if len(rows) > 1:
            raise RuntimeError(f"{self.name} returned {len(rows)} rows where one was expected")
        return rows[0] if rows else None

    async def one(self, conn: Connection, **params: object) -> Row:
        """The only row; raises RuntimeError when there is none."""
        row = await self.one_or_none(conn, **params)
        if row is None:
            raise RuntimeError(f"{self.name} returned no row")
        return row

    async def run(self, conn: Connection, **params: object) -> int:
        """Execute it for its effect; the number of rows that it changed or returned."""
        async with conn.cursor() as cursor:
            await cursor.execute(self.sql, params)
            return cursor.rowcount

    async def stream(
        self, conn: Connection, *, size: int = 500, **params: object
    ) -> AsyncGenerator[Row]:
        """Rows through a server-side cursor, ``size`` at a time: any number in bounded memory.

        Needs an open transaction, which keeps one snapshot for all rows.
        """
        async with conn.cursor(self.name, row_factory=class_row(self.row)) as cursor:
            cursor.itersize = size
            await cursor.execute(self.sql, params)
            async for row in cursor:
                yield row


class Database:
    """A pool of connections to one database.

    ``revive`` is called when no connection can be had (the embedded server restarts itself there);
    it must be quick and may be called often.
    """

    def __init__(
        self, url: str, *, size: int, revive: Callable[[], None] | None = None, name: str = "sluice"
    ) -> None:
        self.url = url
        self._revive = revive
        self._reviving = asyncio.Lock()
        self._used_at = WeakKeyDictionary[Connection, float]()
        self._pool = AsyncConnectionPool[Connection](
            url,
            kwargs={"autocommit": True, "application_name": name, **KEEPALIVE},
            min_size=1,
            max_size=size,
            # A connection that died while it rested is replaced here, not found by its next user.
            check=self._check,
            timeout=5,
            reconnect_timeout=5,
            max_lifetime=3600,
            open=False,
        )

    async def __aenter__(self) -> Self:
        try:
            await self._pool.open(wait=True, timeout=10)
        except (*CONNECTION_ERRORS, TimeoutError) as error:
            await self._pool.close()
            raise unavailable(self.url, error) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection in autocommit; for single statements and for reading."""
        try:
            conn = await self._pool.getconn()
        except PoolTimeout:
            await self.revive()
            raise
        try:
            yield conn
        finally:
            self._used_at[conn] = time.monotonic()
            await self._pool.putconn(conn)

    async def _check(self, conn: Connection) -> None:
        """Ask a connection whether it lives; not one that did a second ago: it costs a round trip."""
        if time.monotonic() - self._used_at.get(conn, -_RESTED_S) >= _RESTED_S:
            await AsyncConnectionPool.check_connection(conn)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Connection]:
        """A connection inside a transaction that commits at the end of the block."""
        async with self.connection() as conn, conn.transaction():
            yield conn

    async def revive(self) -> None:
        """Do what can be done about a database that does not answer."""
        if self._revive is not None:
            async with self._reviving:
                try:
                    await asyncio.to_thread(self._revive)
                except Exception as error:  # noqa: BLE001 - the caller retries and reports
                    log.warning("database.revive_failed", error=str(error))

    async def persist(
        self, work: Callable[[], Awaitable[Result]], *, what: str, stop: asyncio.Event | None = None
    ) -> Result:
        """Repeat ``work`` until the database lets it succeed, with jittered backoff up to 2 s.

        Only failures of the connection are repeated. With ``stop`` set the failure is raised.
        """
        attempt = 0
        while True:
            try:
                return await work()
            except CONNECTION_ERRORS as error:
                attempt += 1
                if stop is not None and stop.is_set():
                    raise
                if attempt == 1:
                    log.warning("database.lost", during=what, error=type(error).__name__)
                await self.revive()
                await asyncio.sleep(random.uniform(0.05, min(2.0, 0.1 * 2**attempt)))  # noqa: S311 - jitter
            else:
                if attempt:
                    log.info("database.found", during=what, tries=attempt)


#: A silently cut connection is noticed within half a minute.
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "connect_timeout": 10,
}


def unavailable(url: str, error: BaseException) -> DatabaseUnavailableError:
    """The sentence for a database that cannot be reached; never shows its password."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error:
        return DatabaseUnavailableError("SLUICE_DATABASE_URL is not a valid PostgreSQL address.")
    where = f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DatabaseUnavailableError(
        f"The database at {where} does not answer ({reason}). "
        "Start it, or correct SLUICE_DATABASE_URL; nothing was lost."
    )


def literal(sql: bytes) -> LiteralString:
    """Trusted text from this package's own files, for psycopg functions that take only str."""
    return cast("LiteralString", sql.decode())
