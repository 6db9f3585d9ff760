"""``/v1/request-usage``, ``/v1/request-audit`` and error rates, as the reference asks for them.

Metrics, dimensions and operators are checked against the words of ``app.usage``; a caller's text is
only ever a value.
"""

import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, Literal, cast
from uuid import UUID

import msgspec
import psycopg
from litestar import Response, Router, get, post
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import PathParameter, QueryParameter
from pydantic import BeforeValidator, Field, field_validator

from app import batches, tenants, usage
from app.access import Principal
from app.api import described, query, wire
from app.api.auth import Caller, authenticate, require_resources, tenant_caller
from app.api.context import Context, Given
from app.api.described import Answer
from app.api.errors import AnyRequest, ErrorBody
from app.api.wire import Json, Sent, Text, Whole, instant, instant_or_none
from app.db import Connection
from app.errors import NotFoundError, Problem, RequestError, ValidationError
from app.ids import item_id
from app.usage import AGGREGATES, DIMENSIONS, METADATA, METRICS, NAMED, Aggregate, Filter, Scope

_MOST_CELLS: Final = 50_000
_MOST_TIMES: Final = 10_000
_MOST_DIMENSIONS: Final = 8
_MOST_FILTERS: Final = 20
_MOST_VALUES: Final = 1000
_MOST_SKIPPED: Final = 100_000
_WHOLE: Final = re.compile(r"\d{1,18}")
_ORDERED: Final = frozenset({"gt", "gte", "lt", "lte"})
_OF_MANY: Final = frozenset({"in", "nin"})
_OF_NULL: Final = frozenset({"eq", "neq", "is_not"})

#: What the reference's older clients call the same metric.
_OTHER_NAMES: Final = {"completionTokens": "outputTokens"}


class TooSlowError(RequestError):
    """A question that takes Postgres longer than it may think."""

    status: ClassVar[int] = 400


# Requests -----------------------------------------------------------------------------------------


class _Range(Sent):
    start: Annotated[datetime, BeforeValidator(wire.moment)]
    end: Annotated[datetime, BeforeValidator(wire.moment)]


class _Field(Sent):
    operator: Literal["eq", "neq", "in", "nin", "gt", "gte", "lt", "lte", "is_not"]
    value: Any = None

    @property
    def values(self) -> list[object]:
        """What is compared with: one value, or several."""
        return cast("list[object]", self.value) if isinstance(self.value, list) else [self.value]


class _Filter(Sent):
    date_range: _Range
    fields: dict[str, _Field] = Field(default_factory=dict[str, _Field])


class _Order(Sent):
    field: str
    direction: Literal["asc", "desc"] = "asc"


class UsageQuery(Sent):
    """What of usage is wanted."""

    granularity: str | None = None
    time_zone: Text = "UTC"
    agg: dict[str, str] = Field(min_length=1)
    dimensions: list[str] = Field(default_factory=list[str], max_length=_MOST_DIMENSIONS)
    limit: Annotated[Whole, Field(ge=1, le=_MOST_CELLS)] | None = None
    filter: _Filter
    order_by: list[_Order] | dict[str, Literal["asc", "desc"]] | None = None

    @field_validator("granularity")
    @classmethod
    def _known_granularity(cls, value: str | None) -> str | None:
        if value is not None and value not in usage.GRANULARITIES:
            raise ValueError(f"must be one of {', '.join(usage.GRANULARITIES)}")
        return value

    @property
    def order(self) -> list[tuple[str, bool]]:
        """Fields to sort by, and whether downwards."""
        if isinstance(self.order_by, dict):
            return [(name, way == "desc") for name, way in self.order_by.items()]
        return [(each.field, each.direction == "desc") for each in self.order_by or ()]


def _problems(wanted: UsageQuery, most_days: int) -> list[Problem]:
    """What is wrong beyond shapes."""
    when = wanted.filter.date_range
    return [
        *_wrong_metrics(wanted),
        *_wrong_dimensions(wanted),
        *_wrong_filters(wanted),
        *_wrong_range(when.start, when.end, most_days=most_days, granularity=wanted.granularity),
    ]


def _wrong_metrics(wanted: UsageQuery) -> Iterator[Problem]:
    for metric, aggregate in wanted.agg.items():
        path = f"agg.{metric[:100]}"
        if _OTHER_NAMES.get(metric, metric) not in METRICS:
            yield Problem(path=path, message=f"is no metric; there are {', '.join(METRICS)}")
        if aggregate not in AGGREGATES:
            yield Problem(path=path, message=f"must be one of {', '.join(AGGREGATES)}")


def _wrong_dimensions(wanted: UsageQuery) -> Iterator[Problem]:
    named = [(f"dimensions[{n}]", d) for n, d in enumerate(wanted.dimensions)]
    named += [(f"filter.fields.{d[:100]}", d) for d in wanted.filter.fields]
    known = f"there are {', '.join(DIMENSIONS)} and {METADATA}<key>"
    for path, dimension in named:
        key = dimension.removeprefix(METADATA)
        if dimension not in DIMENSIONS and (key == dimension or not key or not key.isprintable()):
            yield Problem(path=path, message=f"is no dimension; {known}")
    columns = {"time", *wanted.agg, *wanted.dimensions}
    for name, _ in wanted.order:
        if name not in columns:
            message = f"must be of what is asked for: {', '.join(sorted(columns))}"
            yield Problem(path="orderBy", message=message)


def _wrong_filters(wanted: UsageQuery) -> Iterator[Problem]:
    if len(wanted.filter.fields) > _MOST_FILTERS:
        yield Problem(path="filter.fields", message=f"must be at most {_MOST_FILTERS}")
    for dimension, field in wanted.filter.fields.items():
        message = _wrong_number(field)
        for value in field.values:
            message = message or _wrong_value(field.operator, value)
        if message is not None:
            yield Problem(path=f"filter.fields.{dimension[:100]}.value", message=message)


def _wrong_number(field: _Field) -> str | None:
    if field.operator in _OF_MANY:
        if not isinstance(field.value, list) or not 0 < len(field.values) <= _MOST_VALUES:
            return f"must be an array of 1 to {_MOST_VALUES:,} values"
    elif isinstance(field.value, list):
        return "must be one value"
    return None


def _wrong_value(operator: str, value: object) -> str | None:
    if value is None:
        return None if operator in _OF_NULL else "must not be null"
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "must be text or a whole number"
    if not str(value).isprintable():
        return "has characters that cannot be looked for"
    if operator in _ORDERED and not _WHOLE.fullmatch(str(value)):
        return "must be a whole number"
    return None


def _wrong_range(
    start: datetime, end: datetime, *, most_days: int, granularity: str | None = None
) -> list[Problem]:
    message = None
    if end <= start:
        message = "must be later than start"
    elif end - start > timedelta(days=most_days):
        message = f"must be at most {most_days} days after start (SLUICE_USAGE_DAYS)"
    elif granularity and (end - start) / usage.GRANULARITIES[granularity] > _MOST_TIMES:
        message = (
            f"is more than {_MOST_TIMES:,} times a {granularity} later; ask for less, or coarser"
        )
    return [] if message is None else [Problem(path="filter.dateRange.end", message=message)]


# Answers ------------------------------------------------------------------------------------------


class AuditEntry(wire.Answer, kw_only=True, frozen=True):
    """A call to a provider, with its texts."""

    type: Literal["COMPLETION_BATCH"]
    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    item_id: UUID
    attempt: int
    correlation_id: str
    request_id: str | None
    timestamp: str
    started_at: str | None
    outcome: str
    connection_id: UUID | None
    resource_id: UUID
    api_key_id: UUID | None
    source_ip: str | None
    provider: str | None
    model: str | None
    status_code: int | None
    duration: int | None
    failure_reason: str | None
    error_message: str | None
    prompt_tokens: int
    output_tokens: int
    completion_tokens: int
    total_tokens: int
    metadata: Json
    request_payload: Json | None
    response_data: Json | None
    response_headers: dict[str, str] | None


class AuditPage(wire.Answer, kw_only=True, frozen=True):
    """A page of calls, the latest first; ``total`` is of all pages."""

    total: int
    page_index: int
    page_size: int
    data: list[AuditEntry]


class ErrorRateBody(wire.Answer, kw_only=True, frozen=True):
    """``errorRate`` in percent."""

    error_rate: float
    total_success: int
    total_failed: int
    total_requests: int


def _entry(workspace_id: UUID, call: usage.Audited) -> AuditEntry:
    own = call.vmx or {}
    return AuditEntry(
        type="COMPLETION_BATCH",
        workspace_id=workspace_id,
        environment_id=call.environment_id,
        batch_id=call.batch_id,
        item_id=item_id(call.batch_id, call.seq),
        attempt=call.attempt,
        correlation_id=own.get("correlationId") or str(call.batch_id),
        request_id=call.request_id,
        timestamp=instant(call.ended_at),
        started_at=instant_or_none(call.started_at),
        outcome=call.outcome.upper(),
        connection_id=call.connection_id,
        resource_id=call.resource_id,
        api_key_id=call.api_key_id,
        source_ip=call.source_ip,
        provider=call.provider,
        model=call.model,
        status_code=call.status_code,
        duration=call.latency_ms,
        failure_reason=call.error_code,
        error_message=call.error_message,
        prompt_tokens=call.input_tokens,
        output_tokens=call.output_tokens,
        completion_tokens=call.output_tokens,
        total_tokens=call.input_tokens + call.output_tokens,
        metadata=call.metadata | (own.get("metadata") or {}),
        request_payload=_verbatim(call.request),
        response_data=_verbatim(call.response),
        response_headers=call.headers,
    )


def _verbatim(text: str | None) -> Json | None:
    return None if text is None else cast("Json", cast("object", msgspec.Raw(text.encode())))


# Routes -------------------------------------------------------------------------------------------


@asynccontextmanager
async def _thinking(context: Context) -> AsyncGenerator[Connection]:
    """A transaction whose statements have so long and no longer. Raises TooSlowError."""
    seconds = context.settings.usage_timeout_s
    try:
        async with context.db.transaction() as conn:
            await usage.limit_time(conn, seconds=seconds)
            yield conn
    except psycopg.errors.QueryCanceled:
        raise TooSlowError(
            f"This takes longer than {seconds:g} s (SLUICE_USAGE_TIMEOUT_S); ask for a shorter time.",
            code="QUERY_TOO_SLOW",
        ) from None


def _allowed(key: Principal) -> list[UUID] | None:
    """The resources whose calls a key may see; None: all."""
    return None if "*" in key.resources else [UUID(r) for r in key.resources]


@dataclass
class UsageOperation(Operation):
    """Documents the body, which is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields(
                ["agg", "filter"],
                granularity=described.words(*usage.GRANULARITIES),
                timeZone=described.text,
                agg=Schema(
                    type=OpenAPIType.OBJECT,
                    properties={name: described.words(*AGGREGATES) for name in METRICS},
                ),
                dimensions=described.texts,
                limit=described.whole(1, _MOST_CELLS),
                filter=described.fields(
                    ["dateRange"],
                    dateRange=described.fields(
                        ["start", "end"], start=described.moment, end=described.moment
                    ),
                    fields=described.record,
                ),
                orderBy=described.record,
            ),
            daily=Example(
                summary="Tokens per day and model",
                value={
                    "granularity": "day",
                    "timeZone": "Europe/Berlin",
                    "agg": {"totalTokens": "sum", "requestCount": "sum", "providerDuration": "p95"},
                    "dimensions": ["model", "resourceId"],
                    "filter": {
                        "dateRange": {
                            "start": "2026-01-01T00:00:00Z",
                            "end": "2026-01-08T00:00:00Z",
                        },
                        "fields": {"statusCode": {"operator": "lt", "value": 500}},
                    },
                },
            ),
        )


@post(
    ["/request-usage/{workspaceId:str}/{environmentId:str}",
     "/completion-usage/{workspaceId:str}/{environmentId:str}"],
    action="request-usage:get",
    summary="Ask for usage",
    description="Metrics of calls, per stretch of time and per values of dimensions. Times without "
    "calls are there with zeros. The end of the range is exclusive.",
    status_code=200,
    operation_class=UsageOperation,
    request_max_body_size=1024 * 1024,
    responses={
        200: Answer(list[dict[str, object]], description="A row per time and values"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)  # fmt: skip
async def request_usage(request: AnyRequest, context: Given, caller: Caller) -> Response[bytes]:
    wanted = wire.read(UsageQuery, wire.object_of(await request.body()))
    if problems := _problems(wanted, context.settings.usage_days):
        raise ValidationError(problems)
    scope = _scope(caller, wanted.filter.date_range.start, wanted.filter.date_range.end)
    async with _thinking(context) as conn:
        if not await usage.knows_zone(conn, wanted.time_zone):
            raise query.refuse("timeZone", "is no time zone, such as UTC or Europe/Berlin")
        cells = await usage.cells(
            conn,
            scope=scope,
            granularity=wanted.granularity,
            zone=wanted.time_zone,
            metrics=sorted({_OTHER_NAMES.get(metric, metric) for metric in wanted.agg}),
            dimensions=wanted.dimensions,
            filters=[_filter(name, each) for name, each in wanted.filter.fields.items()],
            percentiles=any(aggregate.startswith("p") for aggregate in wanted.agg.values()),
            most=_MOST_CELLS + 1,
        )
        times = [scope.start]
        if wanted.granularity is not None:
            times = await usage.times(
                conn, scope=scope, granularity=wanted.granularity, zone=wanted.time_zone
            )
        rows = _rows(wanted, cells, times)
        names = await usage.names(
            conn, workspace_id=caller.workspace_id, ids=_ids(wanted.dimensions, cells)
        )
    return Response(
        wire.encode([_shown(wanted, row, names) for row in rows]), media_type="application/json"
    )


def _scope(key: Principal, start: datetime, until: datetime) -> Scope:
    return Scope(
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        start=start,
        until=until,
        allowed=_allowed(key),
    )


def _filter(dimension: str, field: _Field) -> Filter:
    return Filter(
        dimension=dimension,
        operator=field.operator,
        wanted=[None if value is None else str(value) for value in field.values],
    )


@dataclass(frozen=True, slots=True)
class _Row:
    time: datetime
    key: dict[str, str | None]
    values: dict[str, float]


def _rows(wanted: UsageQuery, cells: Sequence[usage.Cell], times: Sequence[datetime]) -> list[_Row]:
    """One row per time and values, gaps filled with zeros, in order, as many as are wanted."""
    keys: dict[tuple[tuple[str, str | None], ...], dict[str, str | None]] = {
        tuple(sorted(cell.key.items(), key=str)): cell.key for cell in cells
    }
    if not keys and not wanted.dimensions:
        keys = {(): {}}
    if len(cells) > _MOST_CELLS or len(keys) * len(times) > _MOST_CELLS:
        raise query.refuse(
            "dimensions",
            f"would make more than {_MOST_CELLS:,} rows; ask for fewer dimensions, or coarser times",
        )
    known = {
        (cell.time, tuple(sorted(cell.key.items(), key=str)), cell.metric): cell for cell in cells
    }
    rows: list[_Row] = []
    for time in times:
        for mark, key in keys.items():
            values: dict[str, float] = {}
            for metric, aggregate in wanted.agg.items():
                cell = known.get((time, mark, _OTHER_NAMES.get(metric, metric)))
                values[metric] = 0.0 if cell is None else cell.value(cast("Aggregate", aggregate))
            rows.append(_Row(time, key, values))
    for name, downwards in reversed(wanted.order):
        rows.sort(key=lambda row, name=name: _rank(row, name), reverse=downwards)
    return rows[: wanted.limit]


def _rank(row: _Row, name: str) -> tuple[float, str]:
    if name == "time":
        return row.time.timestamp(), ""
    if name in row.values:
        return row.values[name], ""
    return 0.0, row.key.get(name) or ""


def _ids(dimensions: Sequence[str], cells: Sequence[usage.Cell]) -> list[UUID]:
    named = [d for d in dimensions if d in NAMED]
    return sorted({UUID(value) for cell in cells for d in named if (value := cell.key.get(d))})


def _shown(wanted: UsageQuery, row: _Row, names: dict[str, str]) -> dict[str, object]:
    shown: dict[str, object] = {"time": instant(row.time)}
    for metric, value in row.values.items():
        shown[metric] = int(value) if value.is_integer() else round(value, 3)
    for dimension in wanted.dimensions:
        value = row.key.get(dimension)
        if dimension in NAMED:
            label = names.get(value or "", value)
            shown[dimension] = {"value": value, "label": label, "displayName": label}
        elif dimension == "statusCode":
            shown[dimension] = None if value is None else int(value)
        else:
            shown[dimension] = value
    return shown


StartDate = Annotated[
    str | None, QueryParameter(name="startDate", description="default: a day before endDate")
]
EndDate = Annotated[
    str | None, QueryParameter(name="endDate", description="exclusive; default: now")
]


async def _asked_time(
    context: Context, key: Principal, start: str | None, end: str | None, *, days: int
) -> Scope:
    begin, until = query.moment(start, "startDate"), query.moment(end, "endDate")
    if until is None:
        async with context.db.connection() as conn:
            until = await batches.clock(conn)
    begin = begin or until - timedelta(days=days)
    if problems := _wrong_range(begin, until, most_days=context.settings.usage_days):
        raise ValidationError([Problem(path="endDate", message=problems[0].message)])
    return _scope(key, begin, until)


@get(
    ["/request-audit/{workspaceId:str}/{environmentId:str}",
     "/completion-audit/{workspaceId:str}/{environmentId:str}"],
    action="request-audit:list",
    summary="List calls",
    description="Every call to a provider with its request and, where it decided its item, the "
    "reply. The latest first.",
    responses={200: Answer(AuditPage, description="A page of calls")},
)  # fmt: skip
async def request_audit(
    *,
    context: Given,
    caller: Caller,
    kind: Annotated[
        str | None, QueryParameter(name="type", description="COMPLETION_BATCH, which all are")
    ] = None,
    connection_id: Annotated[str | None, QueryParameter(name="connectionId")] = None,
    resource_id: Annotated[str | None, QueryParameter(name="resourceId")] = None,
    batch_id: Annotated[str | None, QueryParameter(name="batchId")] = None,
    model: Annotated[str | None, QueryParameter()] = None,
    status_code: Annotated[str | None, QueryParameter(name="statusCode")] = None,
    start_date: StartDate = None,
    end_date: EndDate = None,
    page_index: Annotated[str | None, QueryParameter(name="pageIndex")] = None,
    page_size: Annotated[
        str | None, QueryParameter(name="pageSize", description="1 to 100; default 20")
    ] = None,
) -> Response[bytes]:
    query.one_of(kind, "type", ("completion_batch",))
    size = query.number(page_size, "pageSize", default=20, least=1, most=100)
    index = query.number(page_index, "pageIndex", default=0, least=0, most=_MOST_SKIPPED // size)
    only = usage.Only(
        connection_id=query.uuid(connection_id, "connectionId"),
        resource_id=query.uuid(resource_id, "resourceId"),
        batch_id=query.uuid(batch_id, "batchId"),
        model=query.text(model, "model"),
        status_code=_status(status_code),
    )
    scope = await _asked_time(context, caller, start_date, end_date, days=1)
    async with _thinking(context) as conn:
        total, calls = await usage.audit(
            conn, scope=scope, only=only, skipped=index * size, most=size
        )
    page = AuditPage(
        total=total,
        page_index=index,
        page_size=size,
        data=[_entry(caller.workspace_id, call) for call in calls],
    )
    return Response(wire.encode(page), media_type="application/json")


def _status(value: str | None) -> int | None:
    if value is None or value.lower() == "any":
        return None
    return query.number(value, "statusCode", default=0, least=100, most=599)


@get(
    ["/request-audit/{workspaceId:str}/{environmentId:str}/metadata-keys",
     "/completion-audit/{workspaceId:str}/{environmentId:str}/metadata-keys"],
    action="request-audit:list",
    summary="List fields of metadata",
    description="Those of the batches of a time, by default of the last 30 days; at most 1,000.",
    responses={200: Answer(list[str], description="Their names")},
)  # fmt: skip
async def metadata_keys(
    *, context: Given, caller: Caller, start_date: StartDate = None, end_date: EndDate = None
) -> Response[bytes]:
    scope = await _asked_time(context, caller, start_date, end_date, days=30)
    async with _thinking(context) as conn:
        found = await usage.metadata_keys(conn, scope=scope)
    return Response(wire.encode(found), media_type="application/json")


@get(
    ["/request-audit/{workspaceId:str}/{environmentId:str}/metadata-values/{key:str}",
     "/completion-audit/{workspaceId:str}/{environmentId:str}/metadata-values/{key:str}"],
    action="request-audit:list",
    summary="List values of a field of metadata",
    description="In the batches of a time, by default of the last 30 days; at most 1,000.",
    responses={200: Answer(list[str], description="The values as text")},
)  # fmt: skip
async def metadata_values(
    *,
    context: Given,
    caller: Caller,
    key: Annotated[str, PathParameter(name="key")],
    start_date: StartDate = None,
    end_date: EndDate = None,
) -> Response[bytes]:
    name = query.text(key, "key") or ""
    scope = await _asked_time(context, caller, start_date, end_date, days=30)
    async with _thinking(context) as conn:
        found = await usage.metadata_values(conn, scope=scope, key=name)
    return Response(wire.encode(found), media_type="application/json")


@get(
    "/completion-metric/{workspaceId:str}/{environmentId:str}/{resourceId:str}/error-rate",
    action="request-usage:get",
    summary="Read a resource's error rate",
    description="Of the calls that ended in the last `window` minutes.",
    responses={200: Answer(ErrorRateBody, description="The rate in percent, and the numbers")},
)
async def error_rate(
    *,
    context: Given,
    caller: Caller,
    resource_id: Annotated[UUID, PathParameter(name="resourceId")],
    window: Annotated[
        str | None, QueryParameter(description="minutes, 1 to 1440; default 10")
    ] = None,
    status_code: Annotated[
        str | None,
        QueryParameter(
            name="statusCode", description="any (the default), or count only failures with it"
        ),
    ] = None,
    connection_id: Annotated[str | None, QueryParameter(name="aiConnectionId")] = None,
    model: Annotated[str | None, QueryParameter()] = None,
) -> Response[bytes]:
    minutes = query.number(window, "window", default=10, least=1, most=1440)
    async with _thinking(context) as conn:
        known = await tenants.resource(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            resource_id=resource_id,
        )
        if known is None:
            raise NotFoundError(
                f"AI Resource {resource_id} not found", code="AI_RESOURCE_NOT_FOUND"
            )
        require_resources(caller, [resource_id])
        found = await usage.error_rate(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            resource_id=resource_id,
            minutes=minutes,
            connection_id=query.uuid(connection_id, "aiConnectionId"),
            model=query.text(model, "model"),
            status_code=_status(status_code),
        )
    rate = 100 * found.failed / found.requests if found.requests else 0.0
    body = ErrorRateBody(
        error_rate=round(rate, 2),
        total_success=found.succeeded,
        total_failed=found.failed,
        total_requests=found.requests,
    )
    return Response(wire.encode(body), media_type="application/json")


router = Router(
    "/v1",
    route_handlers=[request_usage, request_audit, metadata_keys, metadata_values, error_rate],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    tags=["Usage and audit"],
)
