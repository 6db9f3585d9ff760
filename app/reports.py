"""Reports: the views of schema ``report`` as a dictionary, their rows, the rollups, and who may read them.

The views themselves are SQL (sql/reports/); what they say of themselves is in the catalog, and everything
here reads it from there.
"""

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

from app.db import Connection, NoRow, Query
from app.errors import SluiceError, UsageError

#: What a row's time is called, the first that a view has: what ``since`` looks at.
_TIMES: Final = (
    "minute_at",
    "hour_at",
    "day_on",
    "ended_at",
    "last_seen_at",
    "created_at",
    "seen_at",
)

_REPORT: Final = "sluice_report"
_TEXT: Final = "sluice_report_text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a view, its type in Postgres, and what it says."""

    name: str
    type: str
    about: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A reporting view."""

    name: str
    about: str | None
    columns: Sequence[Column]

    @property
    def time(self) -> str | None:
        """The column that says when; None: it shows the present."""
        names = {column.name for column in self.columns}
        return next((name for name in _TIMES if name in names), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    view: str
    about: str | None
    column: str
    type: str
    column_about: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rolled:
    minutes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Role:
    name: str
    can_login: bool
    sees_everything: bool


_report_columns = Query("reports", "report_columns", _Described)
_rollup_some = Query("reports", "rollup_some", _Rolled)
_report_readers = Query("reports", "report_readers", _Reader)
_report_role = Query("reports", "report_role", _Role)
_report_grant_put = Query("reports", "report_grant_put", NoRow)
_report_grant_delete = Query("reports", "report_grant_delete", NoRow)


async def views(conn: Connection) -> dict[str, View]:
    """Every reporting view by name."""
    rows = await _report_columns.all(conn)
    found: dict[str, View] = {}
    for name, group in groupby(rows, key=lambda row: row.view):
        described = list(group)
        found[name] = View(
            name=name,
            about=described[0].about,
            columns=[
                Column(name=row.column, type=row.type, about=row.column_about) for row in described
            ],
        )
    return found


async def roll_up(conn: Connection, *, most: int = 20) -> int:
    """Count some minutes anew whose attempts have changed; how many. Within the caller's transaction."""
    return (await _rollup_some.one(conn, most=most)).minutes


async def readers(conn: Connection) -> list[int]:
    """The pids of the backends that work for logins which may read reports."""
    return [row.pid for row in await _report_readers.all(conn)]


async def rows(
    conn: Connection,
    *,
    view: View,
    since: timedelta | None = None,
    where: Mapping[str, str] | None = None,
    most: int | None = None,
) -> AsyncGenerator[tuple[Any, ...]]:
    """The rows of a view, newest first where it has a time, in bounded memory. Needs a transaction.

    ``where``: columns and the text of the value that they must have. Raises UsageError for a column that
    is not there, for a value of another type, and for ``since`` where nothing says when.
    """
    names = {column.name for column in view.columns}
    conditions: list[sql.Composable] = []
    values: list[object] = []
    if since is not None:
        if view.time is None:
            raise UsageError(f"{view.name} shows the present; --since says nothing about it.")
        conditions.append(sql.SQL("{} >= clock() - %s::interval").format(sql.Identifier(view.time)))
        values.append(since)
    for name, value in (where or {}).items():
        if name not in names:
            raise UsageError(
                f"{view.name} has no column '{name}'; it has: {', '.join(sorted(names))}."
            )
        conditions.append(sql.SQL("{} = %s").format(sql.Identifier(name)))
        values.append(value)
    query = sql.SQL("select {} from report.{}").format(
        sql.SQL(", ").join(sql.Identifier(column.name) for column in view.columns),
        sql.Identifier(view.name),
    )
    if conditions:
        query += sql.SQL(" where ") + sql.SQL(" and ").join(conditions)
    if view.time is not None:
        query += sql.SQL(" order by {} desc").format(sql.Identifier(view.time))
    if most is not None:
        query += sql.SQL(" limit {}").format(sql.Literal(most))
    async with conn.cursor("report") as cursor:
        try:
            await cursor.execute(query, values)
        except psycopg.errors.DataError as error:
            raise UsageError(f"{error.diag.message_primary}.") from error
        async for row in cursor:
            yield row


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a login may do with the views. ``workspace_id`` None: it sees all workspaces."""

    with_texts: bool = False
    workspace_id: UUID | None = None
    timeout_s: int = 300
    idle_s: int = 900
    connections: int = 5


async def grant(conn: Connection, *, user: str, allowed: Allowance) -> str | None:
    """Let a login read the views; its password, if the login had to be made. In a transaction.

    Its rows are those of its workspace, which the views check by ``session_user``. Read-only,
    statement and idle timeouts and the connection limit are settings of the login itself: roles do not
    inherit settings. Raises SluiceError for a login that would see everything anyway.
    """
    name = sql.Identifier(user)
    known = await _report_role.one_or_none(conn, name=user)
    if known is not None and known.sees_everything:
        raise SluiceError(
            f"'{user}' is a superuser or owns the tables, and sees everything anyway. Name another login."
        )
    if user in (_REPORT, _TEXT):
        raise UsageError(f"'{user}' is the group itself. Name a login.")
    for group in (_REPORT, _TEXT):
        if await _report_role.one_or_none(conn, name=group) is None:
            await conn.execute(sql.SQL("create role {} nologin").format(sql.Identifier(group)))
    for statement in _GROUPS:
        await conn.execute(statement)
    password = None
    if known is None:
        password = secrets.token_urlsafe(24)
        # Hashed here, so that the server's log never shows it.
        hashed = conn.pgconn.encrypt_password(
            password.encode(), user.encode(), b"scram-sha-256"
        ).decode()
        await conn.execute(
            sql.SQL("create role {} login password {}").format(name, sql.Literal(hashed))
        )
    for setting, value in {
        "default_transaction_read_only": "on",
        "statement_timeout": f"{allowed.timeout_s}s",
        "idle_in_transaction_session_timeout": "60s",
        "idle_session_timeout": f"{allowed.idle_s}s",
        "timezone": "UTC",
        # One reader, one processor: parallel plans would take those of the engine.
        "max_parallel_workers_per_gather": "0",
        # Plans over many days look dear, and compiling them takes longer than running them.
        "jit": "off",
    }.items():
        await conn.execute(
            sql.SQL("alter role {} set {} = {}").format(
                name, sql.Identifier(setting), sql.Literal(value)
            )
        )
    await conn.execute(
        sql.SQL("alter role {} connection limit {}").format(name, sql.Literal(allowed.connections))
    )
    await conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier(_REPORT), name))
    texts = "grant {} to {}" if allowed.with_texts else "revoke {} from {}"
    await conn.execute(sql.SQL(texts).format(sql.Identifier(_TEXT), name))
    try:
        await _report_grant_put.run(
            conn, role_name=user, workspace_id=allowed.workspace_id, with_texts=allowed.with_texts
        )
    except psycopg.errors.ForeignKeyViolation as error:
        raise UsageError(f"There is no workspace {allowed.workspace_id}.") from error
    return password


async def revoke(conn: Connection, *, user: str) -> bool:
    """Let a login read nothing any more; False when it could not. The login itself stays."""
    if await _report_role.one_or_none(conn, name=user) is not None:
        for group in (_REPORT, _TEXT):
            if await _report_role.one_or_none(conn, name=group) is not None:
                await conn.execute(
                    sql.SQL("revoke {} from {}").format(sql.Identifier(group), sql.Identifier(user))
                )
    return bool(await _report_grant_delete.run(conn, role_name=user))


#: What the groups may do; sql/reports/zz_grants.sql says the same after every migration.
_GROUPS: Final = (
    "grant usage on schema report to sluice_report, sluice_report_text",
    "grant select on all tables in schema report to sluice_report",
    "revoke all on report.item_texts from sluice_report",
    "grant select on report.item_texts to sluice_report_text",
)
