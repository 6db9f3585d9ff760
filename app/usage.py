"""Usage, audit and error rates, straight from the attempts: what calls were made, and what came of them.

A call belongs to the moment when it ended. Questions are bounded by time and number, and by
``limit_time`` in how long Postgres may think about them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from app.db import Connection, NoRow, Query

Operator = Literal["eq", "neq", "in", "nin", "gt", "gte", "lt", "lte", "is_not"]
Aggregate = Literal["sum", "avg", "min", "max", "p90", "p95", "p99"]

AGGREGATES: Final[tuple[Aggregate, ...]] = ("sum", "avg", "min", "max", "p90", "p95", "p99")
OPERATORS: Final[tuple[Operator, ...]] = (
    "eq", "neq", "in", "nin", "gt", "gte", "lt", "lte", "is_not",
)  # fmt: skip

#: How long each stretch of time is, at least.
GRANULARITIES: Final = {
    "second": timedelta(seconds=1),
    "second_5": timedelta(seconds=5),
    "second_10": timedelta(seconds=10),
    "second_15": timedelta(seconds=15),
    "second_30": timedelta(seconds=30),
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
    "month": timedelta(days=28),
    "year": timedelta(days=365),
}
_EVERY: Final = {"month": "1 month", "year": "1 year"}

METRICS: Final = (
    "requestCount", "successCount", "errorCount", "promptTokens", "outputTokens", "totalTokens",
    "cachedTokens", "reasoningTokens", "tokensPerSecond", "requestDuration", "providerDuration",
    "gateDuration",
)  # fmt: skip

#: Dimensions that are ids of something with a name.
NAMED: Final = (
    "workspaceId", "environmentId", "connectionId", "resourceId", "apiKeyId", "batchId",
)  # fmt: skip
DIMENSIONS: Final = (
    *NAMED, "provider", "model", "requestId", "messageId", "failureReason", "statusCode",
    "correlationId", "sourceIp", "userId",
)  # fmt: skip
METADATA: Final = "metadata."


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whose calls, and when: from ``start`` to before ``until``. ``allowed``: of these resources."""

    workspace_id: UUID
    environment_id: UUID
    start: datetime
    until: datetime
    allowed: Sequence[UUID] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """A dimension's value must fit. ``wanted``: one value, or several for in and nin."""

    dimension: str
    operator: Operator
    wanted: Sequence[str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A metric of the calls of one stretch of time that share their dimensions' values (``key``)."""

    time: datetime
    key: dict[str, str | None]
    metric: str
    sum: float | None
    avg: float | None
    min: float | None
    max: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    def value(self, aggregate: Aggregate) -> float:
        """One of them; 0 where no call had this metric."""
        found = {
            "sum": self.sum,
            "avg": self.avg,
            "min": self.min,
            "max": self.max,
            "p90": self.p90,
            "p95": self.p95,
            "p99": self.p99,
        }[aggregate]
        return found or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """A call with what was asked and, if it decided its item, what came back; texts to the letter."""

    environment_id: UUID
    batch_id: UUID
    seq: int
    attempt: int
    outcome: str
    resource_id: UUID
    connection_id: UUID | None
    provider: str | None
    model: str | None
    api_key_id: UUID | None
    source_ip: str | None
    metadata: dict[str, Any]
    claimed_at: datetime
    started_at: datetime | None
    ended_at: datetime
    latency_ms: int | None
    status_code: int | None
    request_id: str | None
    error_code: str | None
    error_message: str | None
    input_tokens: int
    output_tokens: int
    vmx: dict[str, Any] | None
    request: str | None
    response: str | None
    headers: dict[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """Which calls an audit is to have; None: any."""

    connection_id: UUID | None = None
    resource_id: UUID | None = None
    batch_id: UUID | None = None
    model: str | None = None
    status_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRate:
    """Calls of the last minutes."""

    requests: int
    succeeded: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Time:
    time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _Name:
    id: UUID
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Total:
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    known: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Value:
    value: str


_cells = Query("usage", "usage_cells", Cell)
_times = Query("usage", "usage_times", _Time)
_zone = Query("usage", "usage_zone", _Known)
_names = Query("usage", "usage_names", _Name)
_limit_time = Query("usage", "usage_limit_time", NoRow)
_audit_count = Query("usage", "audit_count", _Total)
_audit_page = Query("usage", "audit_page", Audited)
_metadata_keys = Query("usage", "metadata_keys", _Key)
_metadata_values = Query("usage", "metadata_values", _Value)
_error_rate = Query("usage", "error_rate", ErrorRate)


async def limit_time(conn: Connection, *, seconds: float) -> None:
    """Let each statement of this transaction run for so long at most."""
    await _limit_time.run(conn, timeout_ms=str(int(seconds * 1000)))


async def knows_zone(conn: Connection, zone: str) -> bool:
    """Whether there is a time zone of this name."""
    return (await _zone.one(conn, zone=zone)).known


async def cells(
    conn: Connection,
    *,
    scope: Scope,
    granularity: str | None,
    zone: str,
    metrics: Sequence[str],
    dimensions: Sequence[str],
    filters: Sequence[Filter],
    percentiles: bool,
    most: int,
) -> list[Cell]:
    """Metrics per stretch of time (None: all of it) and dimensions; at most ``most``."""
    asked = {*dimensions, *(f.dimension for f in filters)}
    return await _cells.all(
        conn,
        workspace_id=scope.workspace_id,
        environment_id=scope.environment_id,
        start=scope.start,
        until=scope.until,
        allowed=None if scope.allowed is None else list(scope.allowed),
        granularity=granularity,
        zone=zone,
        metrics=list(metrics),
        dims=list(dimensions),
        filter_dims=sorted(asked - set(dimensions)),
        filters=Jsonb(
            [
                {"dim": f.dimension, "operator": f.operator, "wanted": list(f.wanted)}
                for f in filters
            ]
        ),
        reads_requests=any(d == "correlationId" or d.startswith(METADATA) for d in asked),
        percentiles=percentiles,
        most=most,
    )


async def times(conn: Connection, *, scope: Scope, granularity: str, zone: str) -> list[datetime]:
    """The beginnings of all stretches of time that a range touches."""
    every = _EVERY.get(granularity) or f"{GRANULARITIES[granularity].total_seconds():.0f} seconds"
    if granularity in ("day", "week"):
        every = f"{GRANULARITIES[granularity].days} days"
    rows = await _times.all(
        conn, start=scope.start, until=scope.until, zone=zone, step=granularity, every=every
    )
    return [row.time for row in rows]


async def names(conn: Connection, *, workspace_id: UUID, ids: Sequence[UUID]) -> dict[str, str]:
    """What things are called, by their ids as text."""
    rows = await _names.all(conn, workspace_id=workspace_id, ids=list(ids))
    return {str(row.id): row.name for row in rows}


async def audit(
    conn: Connection, *, scope: Scope, only: Only, skipped: int, most: int
) -> tuple[int, list[Audited]]:
    """How many calls fit, and a page of them, the latest first."""
    chosen: Mapping[str, object] = {
        "workspace_id": scope.workspace_id,
        "environment_id": scope.environment_id,
        "start": scope.start,
        "until": scope.until,
        "allowed": None if scope.allowed is None else list(scope.allowed),
        "connection_id": only.connection_id,
        "resource_id": only.resource_id,
        "batch_id": only.batch_id,
        "model": only.model,
        "status_code": only.status_code,
    }
    total = (await _audit_count.one(conn, **chosen)).total
    return total, await _audit_page.all(conn, **chosen, skipped=skipped, most=most)


async def metadata_keys(conn: Connection, *, scope: Scope) -> list[str]:
    """The first thousand fields of metadata of the batches of a time."""
    rows = await _metadata_keys.all(conn, **_placed(scope))
    return [row.key for row in rows]


async def metadata_values(conn: Connection, *, scope: Scope, key: str) -> list[str]:
    """The first thousand values of one of them."""
    rows = await _metadata_values.all(conn, **_placed(scope), key=key)
    return [row.value for row in rows]


def _placed(scope: Scope) -> dict[str, object]:
    return {
        "workspace_id": scope.workspace_id,
        "environment_id": scope.environment_id,
        "start": scope.start,
        "until": scope.until,
        "allowed": None if scope.allowed is None else list(scope.allowed),
    }


async def error_rate(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    resource_id: UUID,
    minutes: int,
    connection_id: UUID | None,
    model: str | None,
    status_code: int | None,
) -> ErrorRate:
    """The calls of a resource in the last minutes; failures with a certain status, if one is given."""
    return await _error_rate.one(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        resource_id=resource_id,
        minutes=minutes,
        connection_id=connection_id,
        model=model,
        status_code=status_code,
    )
