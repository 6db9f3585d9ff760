"""Capacity: limits on connections, resources, keys and batches.

A limit is so many requests and tokens per period on a scope; its use is kept in the ledger by the
claim itself (sql/functions/claim.sql). Here are the limits as people set them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.ids import uuid7

Period = Literal["minute", "hour", "day", "week", "month", "lifetime"]
Scope = Literal["connection", "resource", "api_key", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So many requests and tokens per period; None: any number."""

    period: Period
    requests: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit in force on a scope. ``limit_id`` is its account in the ledger."""

    limit_id: UUID
    scope_id: UUID
    period: Period
    requests: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitUse:
    """A limit and what of it counts at present: true usage, and reservations of calls in flight."""

    limit_id: UUID
    scope_id: UUID
    period: Period
    requests: int | None
    tokens: int | None
    used_requests: int
    used_tokens: int


_scope_insert = Query("tenants", "scope_insert", NoRow)
_limit_insert = Query("tenants", "limit_insert", NoRow)
_limit_change = Query("tenants", "limit_change", NoRow)
_limit_delete = Query("tenants", "limit_delete", NoRow)
_limits_of = Query("tenants", "limits_of", Limit)
_ready_wake = Query("tenants", "ready_wake", NoRow)
_limits_used = Query("tenants", "limits_used", LimitUse)


async def open_scope(
    conn: Connection, *, workspace_id: UUID, scope_id: UUID, kind: Scope, amounts: Sequence[Amount]
) -> None:
    """Give something new its mutex and its limits."""
    await _scope_insert.run(conn, workspace_id=workspace_id, scope_id=scope_id, kind=kind)
    await set_limits(conn, workspace_id=workspace_id, scope_id=scope_id, amounts=amounts)


async def set_limits(
    conn: Connection, *, workspace_id: UUID, scope_id: UUID, amounts: Sequence[Amount]
) -> None:
    """Make these the limits of a scope, effective at the next claim.

    Of several amounts for one period the smaller of each kind counts. A period that had a limit
    keeps its account, so what was used stays used.
    """
    wanted: dict[Period, Amount] = {}
    for amount in amounts:
        held = wanted.get(amount.period)
        wanted[amount.period] = Amount(
            period=amount.period,
            requests=_smaller(amount.requests, held.requests if held else None),
            tokens=_smaller(amount.tokens, held.tokens if held else None),
        )
    wanted = {p: a for p, a in wanted.items() if a.requests is not None or a.tokens is not None}
    for limit in await _limits_of.all(conn, workspace_id=workspace_id, scope_ids=[scope_id]):
        amount = wanted.pop(limit.period, None)
        if amount is None:
            await _limit_delete.run(conn, workspace_id=workspace_id, limit_id=limit.limit_id)
        elif (amount.requests, amount.tokens) != (limit.requests, limit.tokens):
            await _limit_change.run(
                conn,
                workspace_id=workspace_id,
                limit_id=limit.limit_id,
                requests=amount.requests,
                tokens=amount.tokens,
            )
    for amount in wanted.values():
        await _limit_insert.run(
            conn,
            workspace_id=workspace_id,
            limit_id=uuid7(),
            scope_id=scope_id,
            period=amount.period,
            requests=amount.requests,
            tokens=amount.tokens,
        )
    await _ready_wake.run(conn, workspace_id=workspace_id, scope_id=scope_id)


def _smaller(one: int | None, other: int | None) -> int | None:
    given = [n for n in (one, other) if n is not None]
    return min(given, default=None)


async def used(
    conn: Connection, *, workspace_id: UUID, scope_ids: Sequence[UUID], guard_s: float
) -> list[LimitUse]:
    """The limits of scopes and what of each counts now."""
    return await _limits_used.all(
        conn, workspace_id=workspace_id, scope_ids=list(scope_ids), guard_s=guard_s
    )
