"""Capacity: limits on connections, models, resources, keys and batches.

A limit is so many requests and tokens per period on a scope; its use is kept in the ledger by the
claim itself (sql/functions/claim.sql). Here are the limits as people set them, and what of them is
used.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.ids import uuid7

Period = Literal["minute", "hour", "day", "week", "month", "lifetime"]
Scope = Literal["connection", "model", "resource", "api_key", "batch"]

#: Periods that slide unless a limit says otherwise; the others follow the UTC calendar.
SLIDING: frozenset[Period] = frozenset({"minute", "hour"})

#: What a limit may be counted by, value for value: ``source-ip`` or ``metadata:`` and a field.
SOURCE_IP = "source-ip"
METADATA = "metadata:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So many requests and tokens per period; None: any number.

    ``tokens`` are input and output together. ``sliding``: count the last period up to now, not the
    present one of the UTC calendar; None: as is usual for the period. ``dimension``: count apart for
    every client address or every value of a metadata field.
    """

    period: Period
    requests: int | None = None
    tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    sliding: bool | None = None
    dimension: str | None = None

    @property
    def slides(self) -> bool:
        """Whether it slides, by itself or by its period's custom. A lifetime never does."""
        if self.period == "lifetime":
            return False
        return self.period in SLIDING if self.sliding is None else self.sliding

    @property
    def account(self) -> tuple[Period, bool, str | None]:
        """What makes two amounts on one scope the same limit."""
        return (self.period, self.slides, self.dimension)

    @property
    def bounds(self) -> tuple[int | None, int | None, int | None, int | None]:
        """Requests, tokens, input tokens and output tokens."""
        return (self.requests, self.tokens, self.input_tokens, self.output_tokens)

    @property
    def most_input_tokens(self) -> int | None:
        """The largest prompt that could ever fit."""
        return _smaller(self.tokens, self.input_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit that people gave a scope. ``limit_id`` is its account in the ledger."""

    limit_id: UUID
    scope_id: UUID
    period: Period
    sliding: bool
    dimension: str | None
    requests: int | None
    tokens: int | None
    input_tokens: int | None
    output_tokens: int | None

    @property
    def amount(self) -> Amount:
        """The same without its identity."""
        return Amount(
            period=self.period,
            requests=self.requests,
            tokens=self.tokens,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            sliding=self.sliding,
            dimension=self.dimension,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitUse:
    """A limit and what of it counts at present: true usage, and reservations of calls in flight.

    What a provider was seen to count beyond our own calls is included.
    """

    limit_id: UUID
    scope_id: UUID
    period: Period
    sliding: bool
    source: Literal["given", "observed"]
    requests: int | None
    tokens: int | None
    input_tokens: int | None
    output_tokens: int | None
    used_requests: int
    used_input_tokens: int
    used_output_tokens: int

    @property
    def used_tokens(self) -> int:
        """Input and output together."""
        return self.used_input_tokens + self.used_output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchId:
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResourceId:
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attached:
    attached: str


_scope_insert = Query("tenants", "scope_insert", NoRow)
_scope_state_insert = Query("tenants", "scope_state_insert", NoRow)
_scope_batches = Query("tenants", "scope_batches", _BatchId)
_limit_insert = Query("tenants", "limit_insert", NoRow)
_limit_observed_insert = Query("tenants", "limit_observed_insert", NoRow)
_limit_change = Query("tenants", "limit_change", NoRow)
_limit_delete = Query("tenants", "limit_delete", NoRow)
_limits_of = Query("tenants", "limits_of", Limit)
_flows_attach_dimensions = Query("tenants", "flows_attach_dimensions", _Attached)
_flows_wake = Query("tenants", "flows_wake", NoRow)
_ready_wake = Query("tenants", "ready_wake", _ResourceId)
_limits_used = Query("tenants", "limits_used", LimitUse)


async def open_scope(
    conn: Connection,
    *,
    workspace_id: UUID,
    scope_id: UUID,
    kind: Scope,
    amounts: Sequence[Amount] = (),
) -> None:
    """Give something new its mutex, its limits, and what will be learned about it."""
    await _scope_insert.run(conn, workspace_id=workspace_id, scope_id=scope_id, kind=kind)
    if kind in ("connection", "model"):
        await _scope_state_insert.run(conn, workspace_id=workspace_id, scope_id=scope_id)
    if kind == "model":
        await _limit_observed_insert.run(
            conn, workspace_id=workspace_id, limit_id=uuid7(), scope_id=scope_id
        )
    await set_limits(conn, workspace_id=workspace_id, scope_id=scope_id, amounts=amounts)


async def set_limits(
    conn: Connection, *, workspace_id: UUID, scope_id: UUID, amounts: Sequence[Amount]
) -> list[UUID]:
    """Make these the limits of a scope, effective at the next claim; the resources to ring for.

    Of several amounts for one period the smaller of each kind counts. A period that had a limit
    keeps its account, so what was used stays used.
    """
    wanted = _tightest(amounts)
    for limit in await _limits_of.all(conn, workspace_id=workspace_id, scope_ids=[scope_id]):
        amount = wanted.pop(limit.amount.account, None)
        if amount is None:
            await _limit_delete.run(conn, workspace_id=workspace_id, limit_id=limit.limit_id)
        elif amount.bounds != limit.amount.bounds:
            await _limit_change.run(
                conn,
                workspace_id=workspace_id,
                limit_id=limit.limit_id,
                requests=amount.requests,
                tokens=amount.tokens,
                input_tokens=amount.input_tokens,
                output_tokens=amount.output_tokens,
            )
    for amount in wanted.values():
        await _limit_insert.run(
            conn,
            workspace_id=workspace_id,
            limit_id=uuid7(),
            scope_id=scope_id,
            period=amount.period,
            sliding=amount.slides,
            dimension=amount.dimension,
            requests=amount.requests,
            tokens=amount.tokens,
            input_tokens=amount.input_tokens,
            output_tokens=amount.output_tokens,
        )
    if any(amount.dimension is not None for amount in wanted.values()):
        for batch in await _scope_batches.all(conn, workspace_id=workspace_id, scope_id=scope_id):
            await attach_dimensions(conn, workspace_id=workspace_id, batch_id=batch.batch_id)
    await _flows_wake.run(conn, workspace_id=workspace_id, scope_id=scope_id)
    woken = await _ready_wake.all(conn, workspace_id=workspace_id, scope_id=scope_id)
    return [row.resource_id for row in woken]


async def attach_dimensions(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> None:
    """Let a batch's items count for the limits of their own values of dimensions."""
    await _flows_attach_dimensions.one(conn, workspace_id=workspace_id, batch_id=batch_id)


async def limits(conn: Connection, *, workspace_id: UUID, scope_ids: Sequence[UUID]) -> list[Limit]:
    """The limits that people gave scopes."""
    return await _limits_of.all(conn, workspace_id=workspace_id, scope_ids=list(scope_ids))


def most_input_tokens(amounts: Iterable[Amount]) -> int | None:
    """The largest prompt that fits all of these limits; None: any."""
    found: int | None = None
    for amount in amounts:
        found = _smaller(found, amount.most_input_tokens)
    return found


def _tightest(amounts: Sequence[Amount]) -> dict[tuple[Period, bool, str | None], Amount]:
    """One amount per account, with the smaller bound of each kind; without those that bound nothing."""
    found: dict[tuple[Period, bool, str | None], Amount] = {}
    for amount in amounts:
        held = found.get(amount.account, amount)
        found[amount.account] = replace(
            amount,
            requests=_smaller(amount.requests, held.requests),
            tokens=_smaller(amount.tokens, held.tokens),
            input_tokens=_smaller(amount.input_tokens, held.input_tokens),
            output_tokens=_smaller(amount.output_tokens, held.output_tokens),
        )
    return {key: a for key, a in found.items() if any(b is not None for b in a.bounds)}


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
