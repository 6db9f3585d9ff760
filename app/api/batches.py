"""``/v1/completion-batch``: create, estimate, read, list, steer, cancel, follow."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Final, cast
from uuid import UUID

from litestar import Response, Router, get, patch, post
from litestar.di import Provide
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import PathParameter, QueryParameter
from litestar.response import Stream
from msgspec import UNSET

from app import batches, capacity, forecast, queue, tenants
from app.api import (
    described,
    ingest,
    streams,
    wire,
    wire_batches,
    wire_capacity,
    wire_streams,
    wire_tenants,
)
from app.api.auth import Caller, authenticate, batch_for, credential, tenant_caller
from app.api.auth import caller as caller_of
from app.api.context import Context, Given
from app.api.errors import AnyRequest, ErrorBody
from app.api.streams import Standing, View
from app.batches import Batch, Status, Steering
from app.db import CONNECTION_ERRORS, Connection
from app.doorbell import EVENTS, WORK
from app.errors import ConflictError, NotFoundError, Problem, ValidationError
from app.ids import item_seq
from app.log import Log
from app.tenants import ApiKey

log = Log("api")

#: Documentation of an answer; made-up examples would be noise.
Answer = partial(ResponseSpec, generate_examples=False)

_SSE_HEADERS: Final = {
    "cache-control": "no-cache, no-transform",
    "connection": "keep-alive",
    "x-accel-buffering": "no",
}

_BOOLEANS: Final = {"true": True, "false": False}

BatchId = Annotated[UUID, PathParameter(name="batchId")]
ItemId = Annotated[UUID, PathParameter(name="itemId")]

# Query parameters come as text and are read by ourselves: a framework's idea of a boolean takes
# garbage for one, and the reference's takes it for false.
Switch = Annotated[str | None, QueryParameter(description="true or false")]
ItemsStatus = Annotated[str | None, QueryParameter(description="only items in this state")]
Cursor = Annotated[str | None, QueryParameter(description="nextCursor of the page before")]


def switch(value: str | None, name: str, *, default: bool) -> bool:
    """A boolean of the query, in any letter case."""
    if value is None:
        return default
    known = _BOOLEANS.get(value.lower())
    if known is None:
        raise ValidationError([Problem(path=name, message="must be true or false")])
    return known


def number(value: str | None, name: str, *, default: int, least: int, most: int) -> int:
    """A whole number of the query."""
    if value is None:
        return default
    digits = value.isascii() and value.isdecimal() and len(value) <= 18  # noqa: PLR2004 - fits bigint
    if not digits or not least <= int(value) <= most:
        raise ValidationError(
            [Problem(path=name, message=f"must be a whole number from {least} to {most}")]
        )
    return int(value)


def status_of(value: str | None, name: str) -> Status | None:
    """A state of the query, in any letter case."""
    if value is None:
        return None
    if value.lower() not in ("pending", "running", "completed", "failed", "cancelled"):
        raise ValidationError(
            [
                Problem(
                    path=name,
                    message="must be PENDING, RUNNING, COMPLETED, FAILED or CANCELLED",
                )
            ]
        )
    return cast("Status", value.lower())


def _seq(value: str | None, name: str) -> int:
    return number(value, name, default=0, least=0, most=batches.MOST_ITEMS)


_CREATE_EXAMPLE: Final[dict[str, object]] = {
    "type": "ASYNC",
    "name": "nightly summaries",
    "metadata": {"team": "search"},
    "priority": 0,
    "weight": 1,
    "completionWindow": "24h",
    "capacity": [{"period": "minute", "requests": 100, "tokens": 50000}],
    "items": [
        {
            "resourceId": "0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d11",
            "customId": "doc-1",
            "request": {
                "messages": [{"role": "user", "content": "Summarize this document: ..."}],
                "max_tokens": 200,
            },
        },
        {
            "resource": "gpt-4o-mini",
            "request": {"messages": [{"role": "user", "content": "Extract key points from: ..."}]},
        },
    ],
}


def _steering() -> dict[str, Schema]:
    """What may be said at creation and changed later."""
    return {
        "priority": described.whole(-100, 100),
        "weight": Schema(type=OpenAPIType.NUMBER, minimum=0.1, maximum=100),
        "capacity": described.capacity(),
        "completionWindow": Schema(
            type=OpenAPIType.STRING, description="from 1m to 90d, such as 30m, 24h or 7d"
        ),
        "expiresAt": described.moment,
    }


@dataclass
class ChangeOperation(Operation):
    """Documents the body of a change, which is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields([], isPaused=described.flag, **_steering()),
            hurry=Example(
                summary="Let it go first, and have until tomorrow",
                value={"priority": 10, "completionWindow": "24h"},
            ),
        )


@dataclass
class CreateOperation(Operation):
    """Documents the body, which is streamed and therefore no parameter of its handler."""

    def __post_init__(self) -> None:
        item = described.fields(
            ["request"],
            resourceId=Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.UUID),
            resource=Schema(
                type=OpenAPIType.STRING, description="name of the resource, instead of its id"
            ),
            request=Schema(
                type=OpenAPIType.OBJECT, description="parameters of OpenAI's chat completions"
            ),
            customId=described.text,
            maxAttempts=described.whole(1, 100),
        )
        self.request_body = described.body(
            described.fields(
                ["type", "items"],
                type=Schema(type=OpenAPIType.STRING, enum=["SYNC", "ASYNC"]),
                items=Schema(type=OpenAPIType.ARRAY, items=item, min_items=1),
                name=described.text,
                metadata=described.record,
                maxAttempts=described.whole(1, 100),
                idempotencyKey=described.text,
                **_steering(),
            ),
            **{
                "async": Example(summary="Poll for it", value=_CREATE_EXAMPLE),
                "sync": Example(summary="Stream it", value=_CREATE_EXAMPLE | {"type": "SYNC"}),
            },
        )


@post(
    "/{workspaceId:str}/{environmentId:str}",
    summary="Create a batch",
    description="ASYNC answers 201 with the batch; SYNC answers 200 with its stream of events.",
    status_code=201,
    operation_class=CreateOperation,
    request_max_body_size=None,  # checked while it is spooled, with a sentence that helps
    responses={
        200: Answer(
            wire_streams.StreamEvent, description="SYNC: events", media_type="text/event-stream"
        ),
        201: Answer(wire_batches.BatchBody, description="ASYNC: the batch"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        409: Answer(ErrorBody, description="The idempotency key was used otherwise"),
        413: Answer(ErrorBody, description="The request is too large"),
    },
)
async def create(
    *,
    request: AnyRequest,
    context: Given,
    caller: Caller,
    slim: Switch = None,
    strict: Switch = None,
) -> Response[bytes] | Stream:
    view = _view(slim, strict)
    created = await ingest.create_batch(context, request, caller)
    base = context.settings.base_path.rstrip("/")
    at = f"{base}/v1/completion-batch/{caller.workspace_id}/{caller.environment_id}"
    headers = {"location": f"{at}/{created.batch_id}"}
    if created.replayed:
        headers["idempotent-replayed"] = "true"
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, created.batch_id)
        if created.type == "sync":
            return _stream(context, request, batch, after=0, view=view, headers=headers)
        page, cursor = await streams.first_items(conn, batch)
    body = await asyncio.to_thread(
        wire.encode, wire_batches.batch_body(batch, items=page, items_next_cursor=cursor)
    )
    return Response(body, media_type="application/json", headers=headers, status_code=201)


@post(
    "/{workspaceId:str}/{environmentId:str}/estimate",
    summary="Estimate a batch",
    description="The same body as to create it; nothing of it is stored, no provider is called.",
    status_code=200,
    operation_class=CreateOperation,
    request_max_body_size=None,
    responses={
        200: Answer(
            wire_batches.EstimateBody, description="What it would ask for, and for how long"
        ),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        413: Answer(ErrorBody, description="The request is too large"),
    },
)
async def estimate(*, request: AnyRequest, context: Given, caller: Caller) -> Response[bytes]:
    found = await ingest.estimate_batch(context, request, caller)
    body = wire_batches.estimate_body(found.appraisal, found.plan, expires_at=found.expires_at)
    return Response(wire.encode(body), media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}",
    summary="List batches",
    description="Newest first, without their items.",
    responses={200: Answer(wire_batches.BatchesPage, description="A page of batches")},
)
async def list_batches(
    *,
    context: Given,
    caller: Caller,
    status: Annotated[str | None, QueryParameter(description="only batches in this state")] = None,
    limit: Annotated[str | None, QueryParameter(description="1 to 1000; default 100")] = None,
    cursor: Cursor = None,
) -> Response[bytes]:
    most = number(limit, "limit", default=100, least=1, most=1000)
    before = None
    if cursor is not None:
        try:
            before = UUID(cursor)
        except ValueError:
            raise ValidationError(
                [Problem(path="cursor", message="must be a nextCursor of this list")]
            ) from None
    async with context.db.connection() as conn:
        rows = await batches.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            before=before,
            status=status_of(status, "status"),
            most=most,
        )
        seen = await _visible(conn, caller, rows)
    page = wire_batches.BatchesPage(
        data=[wire_batches.batch_body(row) for row in seen],
        next_cursor=str(rows[-1].batch_id) if len(rows) == most else None,
    )
    return Response(wire.encode(page), media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}",
    summary="Read a batch",
    description="With at most the first 1,000 items (fewer when they are large) and a cursor, "
    "what it waits for, and when it will be done.",
    responses={200: Answer(wire_batches.BatchBody, description="The batch")},
)
async def read(
    *,
    context: Given,
    caller: Caller,
    batch_id: BatchId,
    includes_items: Annotated[str | None, QueryParameter(name="includesItems")] = None,
    includes_users: Annotated[str | None, QueryParameter(name="includesUsers")] = None,
    items_limit: Annotated[str | None, QueryParameter(name="itemsLimit")] = None,
    items_cursor: Annotated[str | None, QueryParameter(name="itemsCursor")] = None,
    items_status: Annotated[str | None, QueryParameter(name="itemsStatus")] = None,
) -> Response[bytes]:
    with_items = switch(includes_items, "includesItems", default=True)
    with_users = switch(includes_users, "includesUsers", default=True)
    most = number(items_limit, "itemsLimit", default=1000, least=1, most=1000)
    from_seq = _seq(items_cursor, "itemsCursor")
    status = status_of(items_status, "itemsStatus")
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        page: list[wire_batches.ItemBody] | None = None
        after: str | None = None
        if with_items:
            page, after = await streams.first_items(
                conn, batch, from_seq=from_seq, status=status, most=most
            )
        creator: wire_tenants.ApiKeyBody | None = None
        if with_users and batch.created_by_api_key_id is not None:
            key = await tenants.api_key_entity(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                api_key_id=batch.created_by_api_key_id,
            )
            creator = wire_tenants.api_key_body(key) if key else None
        outlook = await forecast.of_batch(conn, batch=batch, clockwork=context.clockwork)
    body = wire_batches.batch_body(
        batch,
        items=page,
        items_next_cursor=after,
        created_by=creator if with_users else UNSET,
        outlook=outlook,
    )
    encoded = await asyncio.to_thread(wire.encode, body) if page else wire.encode(body)
    return Response(encoded, media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/items",
    summary="List a batch's items",
    description="In the order of submission. A page of large items may hold fewer than its limit.",
    responses={200: Answer(wire_batches.ItemsPage, description="A page of items")},
)
async def list_items(
    *,
    context: Given,
    caller: Caller,
    batch_id: BatchId,
    limit: Annotated[str | None, QueryParameter(description="1 to 1000; default 100")] = None,
    cursor: Cursor = None,
    status: ItemsStatus = None,
) -> Response[bytes]:
    most = number(limit, "limit", default=100, least=1, most=1000)
    from_seq = _seq(cursor, "cursor")
    wanted = status_of(status, "status")
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        page, after = await streams.first_items(
            conn, batch, from_seq=from_seq, status=wanted, most=most
        )
    body = await asyncio.to_thread(
        wire.encode, wire_batches.ItemsPage(data=page, next_cursor=after)
    )
    return Response(body, media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/{itemId:str}",
    summary="Read an item",
    responses={200: Answer(wire_batches.ItemBody, description="The item")},
)
async def read_item(
    *, context: Given, caller: Caller, batch_id: BatchId, item_id: ItemId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        seq = item_seq(batch_id, item_id)
        found = [] if seq is None else await batches.items_numbered(conn, batch=batch, seqs=[seq])
    if not found:
        raise NotFoundError(
            f"Completion Batch Item {item_id} not found", code="COMPLETION_BATCH_ITEM_NOT_FOUND"
        )
    return Response(
        wire.encode(wire_batches.item_body(batch, found[0])), media_type="application/json"
    )


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/cancel",
    summary="Cancel a batch",
    description="Nothing of it is sent any more; calls in flight are let finish and kept.",
    status_code=200,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, cancelled"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def cancel(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, caller, batch_id)
    async with context.db.transaction() as conn:
        status = await queue.cancel(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
    if status not in (None, "cancelled"):
        raise ConflictError(
            f"Completion Batch {batch_id} has already ended: {status.upper()}",
            code="BATCH_ALREADY_ENDED",
            details={"status": status.upper()},
        )
    log.info("batch.cancelled", batch=batch_id)
    context.ringer.ring(EVENTS, [batch_id])
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    if not batch.is_finished:
        context.spawn(mark_cancelled(context, batch))
    return Response(wire.encode(wire_batches.batch_body(batch)), media_type="application/json")


@patch(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}",
    summary="Steer a batch",
    description="What is absent stays as it is; null removes limits or the deadline. Effective at "
    "the next claim; calls in flight are let finish.",
    operation_class=ChangeOperation,
    request_max_body_size=1024 * 1024,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def change(
    request: AnyRequest, context: Given, caller: Caller, batch_id: BatchId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, caller, batch_id)
    wanted = wire.changes(wire_batches.BatchPatch, wire.object_of(await request.body()))
    given = wanted.model_fields_set
    async with context.db.transaction() as conn:
        held = await batches.hold(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
        to = held
        if wanted.sets_deadline:
            now = await batches.clock(conn)
            deadline = wanted.deadline(now)
            if problems := wire_batches.problems_of_deadline(deadline, now):
                raise ValidationError(problems)
            to = replace(to, expires_at=deadline)
        if "priority" in given:
            to = replace(to, priority=wanted.priority)
        if "weight" in given:
            to = replace(to, weight=wanted.weight)
        if "capacity" in given:
            to = replace(to, capacity=wire_capacity.capacity_entries(wanted.capacity))
        resources = await _steer(
            conn, key=caller, batch_id=batch_id, held=held, to=to, wanted=wanted
        )
    return await _changed(context, caller, batch_id, resources)


async def _steer(
    conn: Connection,
    *,
    key: ApiKey,
    batch_id: UUID,
    held: Steering,
    to: Steering,
    wanted: wire_batches.BatchPatch,
) -> list[UUID]:
    resources: list[UUID] = []
    given = wanted.model_fields_set
    # First, while it is still out of the race: a batch that goes on enters where others are.
    if "is_paused" in given and wanted.is_paused:
        await batches.pause(conn, workspace_id=key.workspace_id, batch_id=batch_id)
    if to != held or "capacity" in given:
        resources = await batches.steer(
            conn,
            workspace_id=key.workspace_id,
            batch_id=batch_id,
            to=to,
            amounts=wire_capacity.amounts(wanted.capacity) if "capacity" in given else None,
        )
    if "is_paused" in given and not wanted.is_paused:
        resources = await batches.resume(conn, workspace_id=key.workspace_id, batch_id=batch_id)
    return resources


async def _changed(
    context: Context, key: ApiKey, batch_id: UUID, resources: Sequence[UUID]
) -> Response[bytes]:
    """Ring for what a committed change gives workers to do; the batch as it is now."""
    log.info("batch.changed", batch=batch_id)
    context.ringer.ring(WORK, resources)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, key, batch_id)
        outlook = await forecast.of_batch(conn, batch=batch, clockwork=context.clockwork)
    return Response(
        wire.encode(wire_batches.batch_body(batch, outlook=outlook)), media_type="application/json"
    )


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/pause",
    summary="Pause a batch",
    description="Nothing of it is begun until it is resumed; calls in flight are let finish.",
    status_code=200,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, paused"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def pause(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, caller, batch_id)
    async with context.db.transaction() as conn:
        await batches.hold(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
        await batches.pause(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
    return await _changed(context, caller, batch_id, [])


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/resume",
    summary="Resume a batch",
    description="The opposite of pause; harmless for a batch that is not paused.",
    status_code=200,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, going on"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def resume(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, caller, batch_id)
    async with context.db.transaction() as conn:
        await batches.hold(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
        resources = await batches.resume(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
    return await _changed(context, caller, batch_id, resources)


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/capacity-usage",
    summary="Where the limits of a batch stand",
    description="Those of its connections, models, resources, API key, of itself, and of its values "
    "of dimensions.",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def capacity_usage(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, caller, batch_id)
        scope_ids = await capacity.batch_scopes(
            conn, workspace_id=caller.workspace_id, batch_id=batch_id
        )
        scopes = await capacity.named(
            conn, workspace_id=caller.workspace_id, scope_ids=scope_ids, batch_id=batch_id
        )
        usage = await capacity.usage(
            conn,
            workspace_id=caller.workspace_id,
            scope_ids=scope_ids,
            guard_s=context.settings.guard_s,
            with_reserved=True,
        )
    return Response(
        wire.encode(wire_capacity.capacity_usage(scopes, usage)), media_type="application/json"
    )


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/events",
    summary="Follow a batch",
    description="Server-sent events from the beginning, or after Last-Event-ID or ?after=.",
    responses={
        200: Answer(wire_streams.StreamEvent, description="Events", media_type="text/event-stream"),
    },
)
async def follow(
    *,
    request: AnyRequest,
    context: Given,
    caller: Caller,
    batch_id: BatchId,
    after: Annotated[
        str | None, QueryParameter(description="number of the last event that was seen")
    ] = None,
    slim: Switch = None,
    strict: Switch = None,
) -> Stream:
    view = _view(slim, strict)
    # A browser reconnects with the address it began with, so the header is the newer one.
    last = request.headers.get("last-event-id") or None
    name = "after" if last is None else "Last-Event-ID"
    position = number(after if last is None else last, name, default=0, least=0, most=2**53)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    return _stream(context, request, batch, after=position, view=view)


def _view(slim: str | None, strict: str | None) -> View:
    return View(
        slim=switch(slim, "slim", default=False), strict=switch(strict, "strict", default=False)
    )


def _stream(
    context: Context,
    request: AnyRequest,
    batch: Batch,
    *,
    after: int,
    view: View,
    headers: dict[str, str] | None = None,
) -> Stream:
    async def check() -> None:
        await request.route_handler.authorize_connection(request)  # pyright: ignore[reportUnknownMemberType]
        async with context.db.connection() as conn:
            await batch_for(conn, await caller_of(request), batch.batch_id)

    standing = Standing(who=credential(request), check=check)
    return Stream(
        context.hub.follow(batch, after=after, view=view, standing=standing),
        media_type="text/event-stream",
        status_code=200,
        headers=_SSE_HEADERS | (headers or {}),
    )


async def _visible(conn: Connection, key: ApiKey, rows: Sequence[Batch]) -> list[Batch]:
    """Those batches whose resources are all within the key's allowlist."""
    if "*" in key.resources or not rows:
        return list(rows)
    used = await batches.resource_ids_of(
        conn, workspace_id=key.workspace_id, batch_ids=[row.batch_id for row in rows]
    )
    return [row for row in rows if all(key.may_use(r) for r in used.get(row.batch_id, ()))]


async def mark_cancelled(context: Context, batch: Batch) -> None:
    """Let rows and events of a cancelled batch follow; what is left over is maintenance's."""
    try:
        while True:
            async with context.db.transaction() as conn:
                marked = await queue.cancel_chunk(
                    conn,
                    workspace_id=batch.workspace_id,
                    batch_day=batch.batch_day,
                    batch_id=batch.batch_id,
                )
            if not marked:
                return
            context.ringer.ring(EVENTS, [batch.batch_id])
    except CONNECTION_ERRORS as error:
        log.warning("batch.marking_left", batch=batch.batch_id, error=type(error).__name__)


router = Router(
    "/v1/completion-batch",
    route_handlers=[
        create,
        estimate,
        list_batches,
        read,
        change,
        list_items,
        read_item,
        cancel,
        pause,
        resume,
        capacity_usage,
        follow,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    tags=["Completion batches"],
)
