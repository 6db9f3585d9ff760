"""Capacity: limits on connections, models, resources, keys and batches.

A limit is so many requests and tokens per period on a scope; its use is kept in the ledger by the
claim itself (sql/functions/claim.sql). Here are the limits as people set them, and what of them is
used.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import md5
from typing import Literal
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.ids import uuid7

Period = Literal["minute", "hour", "day", "week", "month", "lifetime"]
Scope = Literal["connection", "model", "resource", "api_key", "batch"]
ScopeKind = Literal["connection", "model", "resource", "api_key", "batch", "value"]
Kind = Literal["requests", "tokens", "input_tokens", "output_tokens"]

KINDS: tuple[Kind, ...] = ("requests", "tokens", "input_tokens", "output_tokens")

#: Periods that slide unless a limit says otherwise; the others follow the UTC calendar.
SLIDING: frozenset[Period] = frozenset({"minute", "hour"})

#: What a limit may be counted by, value for value: ``source-ip`` or ``metadata:`` and a field.
SOURCE_IP = "source-ip"
METADATA = "metadata:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So many requests and tokens per period; None: any number.

    ``cost_nano``: money, in billionths of the currency, of a lifetime. ``tokens`` are input and output together. ``sliding``: count the last period up to now, not the
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
    cost_nano: int | None = None

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
    def bounds(self) -> tuple[int | None, ...]:
        """Requests, tokens, input tokens, output tokens and cost."""
        return (self.requests, self.tokens, self.input_tokens, self.output_tokens, self.cost_nano)

    @property
    def by_kind(self) -> "dict[Kind, int]":
        """The most of each kind that it bounds, money apart."""
        given = zip(
            KINDS, (self.requests, self.tokens, self.input_tokens, self.output_tokens), strict=True
        )
        return {kind: most for kind, most in given if most is not None}

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
    cost_nano: int | None

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
            cost_nano=self.cost_nano,
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
class NamedScope:
    """What a limit is set on, for people.

    ``dimension`` and ``value`` are of a scope that counts one value of another's dimension;
    ``value`` is None where a batch has none, or when no batch at hand has it.
    """

    scope_id: UUID
    kind: ScopeKind
    name: str | None
    dimension: str | None
    value: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A limit as it binds now, and where it stands.

    ``used_`` is all that counts, with what calls in flight have ``reserved_``. ``release_at``: when
    the oldest of it stops counting, ``release_`` how much that is; None: nothing ever does.
    ``resets_at``: when a calendar period ends. ``paced_requests``: so many a minute are begun evenly.
    ``recent_``: of a model's account, how much was claimed in the last so many seconds in which
    nothing but its speed held work up.
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
    paced_requests: int | None
    used_requests: int
    used_input_tokens: int
    used_output_tokens: int
    reserved_requests: int
    reserved_input_tokens: int
    reserved_output_tokens: int
    release_at: datetime | None
    release_requests: int
    release_input_tokens: int
    release_output_tokens: int
    resets_at: datetime | None
    recent_s: float | None
    recent_requests: int
    now: datetime

    @property
    def bounds(self) -> dict[Kind, int]:
        """The most of each kind that it bounds."""
        given = zip(
            KINDS, (self.requests, self.tokens, self.input_tokens, self.output_tokens), strict=True
        )
        return {kind: most for kind, most in given if most is not None}

    @property
    def used(self) -> dict[Kind, int]:
        """What counts of each kind."""
        return _by_kind(self.used_requests, self.used_input_tokens, self.used_output_tokens)

    @property
    def reserved(self) -> dict[Kind, int]:
        """What of that is only reserved, by calls in flight."""
        return _by_kind(
            self.reserved_requests, self.reserved_input_tokens, self.reserved_output_tokens
        )

    @property
    def released(self) -> dict[Kind, int]:
        """What stops counting at ``release_at``."""
        return _by_kind(
            self.release_requests, self.release_input_tokens, self.release_output_tokens
        )

    @property
    def tightest(self) -> Kind | None:
        """The kind of which the smallest share is left; None: it bounds nothing."""
        used = self.used
        return max(
            self.bounds, key=lambda kind: used[kind] / max(self.bounds[kind], 1), default=None
        )


def _by_kind(requests: int, input_tokens: int, output_tokens: int) -> dict[Kind, int]:
    return {
        "requests": requests,
        "tokens": input_tokens + output_tokens,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What replies have taught of a model, or (``model`` is None) of its connection.

    One row per limit that the provider stated within the week (``period``), or one without.
    ``ceiling``: requests per minute that it bears, as far as refusals have shown.
    """

    model: str | None
    ceiling: int | None
    concurrency: int | None
    blocked_until: datetime | None
    blocked_reason: str | None
    period: Period | None
    requests: int | None
    tokens: int | None
    input_tokens: int | None
    output_tokens: int | None
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScopeId:
    scope_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchId:
    batch_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResourceId:
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    locked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attached:
    attached: str


_scope_insert = Query("tenants", "scope_insert", NoRow)
_scopes_lock = Query("tenants", "scopes_lock", _Locked)
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
_batch_scopes = Query("capacity", "batch_scopes", _ScopeId)
_resource_scopes = Query("capacity", "resource_scopes", _ScopeId)
_connection_scopes = Query("capacity", "connection_scopes", _ScopeId)
_api_key_scopes = Query("capacity", "api_key_scopes", _ScopeId)
_scopes_named = Query("capacity", "scopes_named", NamedScope)
_limits_usage = Query("capacity", "limits_usage", Usage)
_models_learned = Query("capacity", "models_learned", Learned)


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


async def lock_scope(conn: Connection, *, workspace_id: UUID, scope_id: UUID) -> None:
    """Keep claims away from a scope's limits, and those of its dimensions' values, until the commit.

    The first lock of a transaction that takes others (sql/README.md, lock order).
    """
    await _scopes_lock.all(conn, workspace_id=workspace_id, scope_id=scope_id)


async def set_limits(
    conn: Connection, *, workspace_id: UUID, scope_id: UUID, amounts: Sequence[Amount]
) -> list[UUID]:
    """Make these the limits of a scope, effective at the next claim; the resources to ring for.

    Of several amounts for one period the smaller of each kind counts. A period that had a limit
    keeps its account, so what was used stays used.
    """
    wanted = _tightest(amounts)
    await lock_scope(conn, workspace_id=workspace_id, scope_id=scope_id)
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
                cost_nano=amount.cost_nano,
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
            cost_nano=amount.cost_nano,
        )
    if any(amount.dimension is not None for amount in wanted.values()):
        return await reattach(conn, workspace_id=workspace_id, scope_id=scope_id)
    await _flows_wake.run(conn, workspace_id=workspace_id, scope_id=scope_id)
    return await wake(conn, workspace_id=workspace_id, scope_id=scope_id)


async def reattach(conn: Connection, *, workspace_id: UUID, scope_id: UUID) -> list[UUID]:
    """Let open batches count for the dimensions that bind a scope now, and all look; whom to ring for."""
    for batch in await _scope_batches.all(conn, workspace_id=workspace_id, scope_id=scope_id):
        await attach_dimensions(conn, workspace_id=workspace_id, batch_id=batch.batch_id)
    await _flows_wake.run(conn, workspace_id=workspace_id, scope_id=scope_id)
    return await wake(conn, workspace_id=workspace_id, scope_id=scope_id)


async def wake(conn: Connection, *, workspace_id: UUID, scope_id: UUID) -> list[UUID]:
    """Let the resources that a scope binds be looked at again; those to ring for."""
    woken = await _ready_wake.all(conn, workspace_id=workspace_id, scope_id=scope_id)
    return [row.resource_id for row in woken]


async def attach_dimensions(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> None:
    """Let a batch's items count for the limits of their own values of dimensions."""
    await _flows_attach_dimensions.one(conn, workspace_id=workspace_id, batch_id=batch_id)


async def limits(conn: Connection, *, workspace_id: UUID, scope_ids: Sequence[UUID]) -> list[Limit]:
    """The limits that people gave scopes."""
    return await _limits_of.all(conn, workspace_id=workspace_id, scope_ids=list(scope_ids))


def tightest(amounts: Sequence[Amount]) -> list[Amount]:
    """What remains of several amounts where of those for one period the smaller counts."""
    return list(_tightest(amounts).values())


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
            cost_nano=_smaller(amount.cost_nano, held.cost_nano),
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


async def batch_scopes(conn: Connection, *, workspace_id: UUID, batch_id: UUID) -> list[UUID]:
    """The scopes whose limits bind a batch."""
    rows = await _batch_scopes.all(conn, workspace_id=workspace_id, batch_id=batch_id)
    return [row.scope_id for row in rows]


async def resource_scopes(conn: Connection, *, workspace_id: UUID, resource_id: UUID) -> list[UUID]:
    """The scopes whose limits bind every item of a resource, and values its batches count by."""
    rows = await _resource_scopes.all(conn, workspace_id=workspace_id, resource_id=resource_id)
    return [row.scope_id for row in rows]


async def connection_scopes(
    conn: Connection, *, workspace_id: UUID, connection_id: UUID
) -> list[UUID]:
    """A connection's scope, those of its models, and values its open batches count by."""
    rows = await _connection_scopes.all(
        conn, workspace_id=workspace_id, connection_id=connection_id
    )
    return [row.scope_id for row in rows]


async def api_key_scopes(conn: Connection, *, workspace_id: UUID, api_key_id: UUID) -> list[UUID]:
    """A key's scope, and values its open batches count by."""
    rows = await _api_key_scopes.all(conn, workspace_id=workspace_id, api_key_id=api_key_id)
    return [row.scope_id for row in rows]


async def named(
    conn: Connection,
    *,
    workspace_id: UUID,
    scope_ids: Sequence[UUID],
    batch_id: UUID | None = None,
) -> dict[UUID, NamedScope]:
    """What scopes are; values of dimensions as the batch has them, else as open batches have."""
    rows = await _scopes_named.all(
        conn, workspace_id=workspace_id, scope_ids=list(scope_ids), batch_id=batch_id
    )
    return {row.scope_id: row for row in rows}


async def usage(
    conn: Connection,
    *,
    workspace_id: UUID,
    scope_ids: Sequence[UUID],
    guard_s: float,
    with_reserved: bool,
) -> list[Usage]:
    """Every limit of scopes and where it stands; ``with_reserved`` also looks at what is in flight."""
    return await _limits_usage.all(
        conn,
        workspace_id=workspace_id,
        scope_ids=list(scope_ids),
        guard_s=guard_s,
        with_reserved=with_reserved,
    )


async def learned(
    conn: Connection, *, workspace_id: UUID, connection_id: UUID, resource_id: UUID | None = None
) -> list[Learned]:
    """What replies have taught of a connection and its models, or of one resource's model."""
    return await _models_learned.all(
        conn, workspace_id=workspace_id, connection_id=connection_id, resource_id=resource_id
    )


def value_scope_id(limit: Limit, value: str) -> UUID:
    """The scope that counts one value of a limit's dimension, as flows_attach_dimensions names it."""
    digest = md5(f"{limit.limit_id} {value}".encode(), usedforsecurity=False)
    return UUID(digest.hexdigest())


def value_of(dimension: str, *, source_ip: str | None, metadata: Mapping[str, object]) -> str:
    """What a batch is counted by; a batch without a value is counted with those that have none."""
    if dimension == SOURCE_IP:
        return source_ip or ""
    found = metadata.get(dimension.removeprefix(METADATA))
    match found:
        case None:
            return ""
        case bool():
            return "true" if found else "false"
        case str() | int() | float():
            return str(found)
        case _:
            return ""
