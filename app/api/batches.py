"""``/v1/completion-batch``: create, estimate, read, list, steer, cancel, try again, follow.

Its items and their results are in ``results``.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final
from uuid import UUID

import psycopg
from litestar import Response, Router, get, patch, post
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import QueryParameter

from app import (
    api_keys,
    batches,
    capacity,
    forecast,
    items,
    prices,
    queue,
    resources,
    webhooks,
    workspaces,
)
from app.access import Principal
from app.api import (
    described,
    erasure,
    ingest,
    outlet,
    pages,
    query,
    results,
    retries,
    wire,
    wire_access,
    wire_batches,
    wire_capacity,
    wire_streams,
)
from app.api.auth import Caller, authenticate, batch_for, credential, followed_batch, tenant_caller
from app.api.auth import caller as caller_of
from app.api.context import Context, Given
from app.api.described import Answer
from app.api.errors import AnyRequest, ErrorBody
from app.api.streams import Standing, View
from app.batches import Batch, Only, Steering
from app.db import CONNECTION_ERRORS, Connection
from app.doorbell import ABORTS, EVENTS, WORK
from app.errors import SecretError, ValidationError
from app.log import Log

log = Log("api")

_SSE_HEADERS: Final = {
    "cache-control": "no-cache, no-transform",
    "connection": "keep-alive",
    "x-accel-buffering": "no",
}

#: A cancel's rows follow for so long before it is answered; the rest after it.
_AT_ONCE_S: Final = 0.25

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

_CALLBACK_EXAMPLE: Final[dict[str, object]] = {
    "type": "CALLBACK",
    "callbackOptions": {
        "url": "https://your-app.com/batch-callback",
        "headers": {"X-API-Key": "your-secret-key"},
        "events": ["item_update", "batch_update"],
    },
}


def _steering() -> dict[str, Schema]:
    """What may be said at creation and changed later."""
    return {
        "priority": described.whole(-100, 100),
        "weight": Schema(type=OpenAPIType.NUMBER, minimum=0.1, maximum=100),
        "capacity": described.capacity(),
        "completionWindow": described.window,
        "expiresAt": described.moment,
        "maxTokens": Schema(
            type=OpenAPIType.INTEGER,
            minimum=1,
            description="the batch pauses when so many are used",
        ),
        "maxCost": Schema(
            type=OpenAPIType.NUMBER,
            exclusive_minimum=0,
            description="the batch pauses when so much is spent, in the currency of the prices",
        ),
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
                type=Schema(type=OpenAPIType.STRING, enum=["SYNC", "ASYNC", "CALLBACK"]),
                items=Schema(type=OpenAPIType.ARRAY, items=item, min_items=1),
                name=described.text,
                metadata=described.record,
                maxAttempts=described.whole(1, 100),
                timeoutMs=described.whole(100, 600_000),
                idempotencyKey=described.text,
                callbackOptions=described.callback_options(),
                **_steering(),
            ),
            **{
                "async": Example(summary="Poll for it", value=_CREATE_EXAMPLE),
                "sync": Example(summary="Stream it", value=_CREATE_EXAMPLE | {"type": "SYNC"}),
                "callback": Example(summary="Be told", value=_CREATE_EXAMPLE | _CALLBACK_EXAMPLE),
            },
        )


@post(
    "/{workspaceId:str}/{environmentId:str}",
    action="completion-batch:create",
    summary="Create a batch",
    description="ASYNC and CALLBACK answer 201 with the batch, CALLBACK with the secret that its "
    "messages are signed with if none was given; SYNC answers 200 with its stream of events.",
    status_code=201,
    operation_class=CreateOperation,
    request_max_body_size=None,  # checked while it is spooled, with a sentence that helps
    responses={
        200: Answer(
            wire_streams.StreamEvent, description="SYNC: events", media_type="text/event-stream"
        ),
        201: Answer(wire_batches.BatchBody, description="ASYNC, CALLBACK: the batch"),
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
    slim: query.Switch = None,
    strict: query.Switch = None,
) -> Response[bytes]:
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
        page = await pages.read(conn, batch)
        secret = await _minted_secret(context, conn, batch)
    told = wire_batches.batch_body(
        batch, items=page.items, items_next_cursor=page.cursor, minted_secret=secret
    )
    body = await asyncio.to_thread(wire.encode, told)
    return Response(body, media_type="application/json", headers=headers, status_code=201)


async def _minted_secret(context: Context, conn: Connection, batch: Batch) -> str | None:
    """The secret that was made for a callback; a repeated creation is told it again.

    None if it cannot be opened any more: then it stays masked.
    """
    if batch.type != "callback":
        return None
    endpoint = await webhooks.endpoint(
        conn,
        workspace_id=batch.workspace_id,
        environment_id=batch.environment_id,
        endpoint_id=batch.batch_id,
    )
    if endpoint is None:
        return None
    try:
        known = webhooks.open_(context.keyring, endpoint)
    except SecretError as error:
        log.warning("secret.unreadable", endpoint=endpoint.endpoint_id, reason=str(error))
        return None
    return known.secret if known.is_minted else None


@post(
    "/{workspaceId:str}/{environmentId:str}/estimate",
    action="completion-batch:create",
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
    action="completion-batch:list",
    summary="List batches",
    description="Newest first, without their items. All filters must fit. A page may hold fewer than "
    "its limit, of what the key may see; only a null nextCursor says that nothing follows.",
    responses={200: Answer(wire_batches.BatchesPage, description="A page of batches")},
)
async def list_batches(
    *,
    context: Given,
    caller: Caller,
    status: Annotated[
        str | None, QueryParameter(description="only batches in this state, or in these: A,B")
    ] = None,
    types: Annotated[
        str | None,
        QueryParameter(name="type", description="SYNC, ASYNC, CALLBACK, or some of them"),
    ] = None,
    name: Annotated[str | None, QueryParameter(description="a part of the name")] = None,
    created_after: Annotated[
        str | None, QueryParameter(name="createdAfter", description="created then or later")
    ] = None,
    created_before: Annotated[
        str | None, QueryParameter(name="createdBefore", description="created earlier")
    ] = None,
    resource: Annotated[
        str | None, QueryParameter(description="uses this resource: its id or its name")
    ] = None,
    api_key_id: Annotated[
        str | None, QueryParameter(name="apiKeyId", description="created with this key")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        QueryParameter(description="key=value: has this field of metadata; may be repeated"),
    ] = None,
    limit: query.Limit = None,
    cursor: query.Cursor = None,
) -> Response[bytes]:
    most = query.number(limit, "limit", default=100, least=1, most=1000)
    before = query.uuid(cursor, "cursor", "must be a nextCursor of this list")
    only = Only(
        statuses=query.statuses(status, "status"),
        types=query.types(types, "type"),
        name=query.text(name, "name"),
        created_from=query.moment(created_after, "createdAfter"),
        created_before=query.moment(created_before, "createdBefore"),
        api_key_id=query.uuid(api_key_id, "apiKeyId"),
        metadata=query.pairs(metadata, "metadata"),
    )
    async with context.db.connection() as conn:
        if resource is not None:
            only = replace(only, resource_id=await _resource_id(conn, caller, resource))
        rows = await batches.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            before=before,
            only=only,
            most=most,
        )
        seen = await _visible(conn, caller, rows)
    page = wire_batches.BatchesPage(
        data=[wire_batches.batch_body(row) for row in seen],
        next_cursor=str(rows[-1].batch_id) if len(rows) == most else None,
    )
    return Response(wire.encode(page), media_type="application/json")


async def _resource_id(conn: Connection, key: Principal, reference: str) -> UUID:
    """The resource of this id or name; an id that nothing bears any more finds what it once did."""
    try:
        return UUID(reference)
    except ValueError:
        name = query.text(reference, "resource") or ""
    found = await resources.named(
        conn, workspace_id=key.workspace_id, environment_id=key.environment_id, name=name
    )
    if found is None:
        raise query.refuse("resource", "there is no resource of this name")
    return found.resource_id


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}",
    action="completion-batch:get",
    summary="Read a batch",
    description="With at most the first 1,000 items (fewer when they are large) and a cursor, "
    "what it waits for, and when it will be done.",
    responses={200: Answer(wire_batches.BatchBody, description="The batch")},
)
async def read(
    *,
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    includes_items: Annotated[str | None, QueryParameter(name="includesItems")] = None,
    includes_users: Annotated[str | None, QueryParameter(name="includesUsers")] = None,
    items_limit: Annotated[str | None, QueryParameter(name="itemsLimit")] = None,
    items_cursor: Annotated[str | None, QueryParameter(name="itemsCursor")] = None,
    items_status: Annotated[str | None, QueryParameter(name="itemsStatus")] = None,
    response_format: query.ResponseFormat = None,
) -> Response[bytes]:
    with_items = query.switch(includes_items, "includesItems", default=True)
    with_users = query.switch(includes_users, "includesUsers", default=True)
    most = query.number(items_limit, "itemsLimit", default=1000, least=1, most=1000)
    start = query.seq(items_cursor, "itemsCursor")
    wanted = items.Only(statuses=query.statuses(items_status, "itemsStatus"))
    shape = wire_batches.Shape(bare=query.is_bare(response_format))
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        page: pages.Page | None = None
        if with_items:
            page = await pages.read(conn, batch, start=start, only=wanted, most=most, shape=shape)
        creators = await _creators(conn, batch) if with_users else None
        outlook = await forecast.of_batch(conn, batch=batch, clockwork=context.clockwork)
    body = wire_batches.batch_body(
        batch,
        items=None if page is None else page.items,
        items_next_cursor=None if page is None else page.cursor,
        creators=creators,
        outlook=outlook,
    )
    encoded = await asyncio.to_thread(wire.encode, body) if page else wire.encode(body)
    return Response(encoded, media_type="application/json")


async def _creators(conn: Connection, batch: Batch) -> wire_batches.Creators:
    """Who made a batch, also a key that was deleted and a user who is no member any more."""
    key: wire_access.ApiKeyBody | None = None
    if batch.created_by_api_key_id is not None:
        found = await api_keys.get(
            conn,
            workspace_id=batch.workspace_id,
            environment_id=batch.environment_id,
            api_key_id=batch.created_by_api_key_id,
            with_deleted=True,
        )
        key = wire_access.api_key_body(found) if found else None
    user: wire_access.UserBody | None = None
    if batch.created_by_user_id is not None:
        person = await workspaces.creator(
            conn,
            workspace_id=batch.workspace_id,
            batch_id=batch.batch_id,
            user_id=batch.created_by_user_id,
        )
        user = wire_access.user_body(person) if person else None
    return wire_batches.Creators(api_key=key, user=user)


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/cancel",
    action="completion-batch:cancel",
    summary="Cancel a batch",
    description="Nothing of it is begun any more. Calls in flight are let finish and their answers "
    "kept (running=finish), or cut (running=abort): then only their attempts are recorded. A "
    "cancel that is under way may be repeated, and changed to abort.",
    status_code=200,
    operation_class=retries.CancelOperation,
    request_max_body_size=1024 * 1024,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, cancelled"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def cancel(
    request: AnyRequest,
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    running: Annotated[
        str | None, QueryParameter(description="finish (the default) or abort calls in flight")
    ] = None,
) -> Response[bytes]:
    body = await request.body()
    wanted = wire.read(wire_batches.BatchCancel, wire.object_of(body) if body.strip() else {})
    chosen = query.one_of(running, "running", ("abort", "finish")) or wanted.running.lower()
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    if batch.is_finished:
        raise batches.ended(batch_id, batch.status)
    async with context.db.transaction() as conn:
        status = await queue.cancel(
            conn, workspace_id=caller.workspace_id, batch_id=batch_id, abort=chosen == "abort"
        )
    if status not in (None, "cancelled"):
        raise batches.ended(batch_id, status)
    log.info("batch.cancelled", batch=batch_id, running=chosen)
    if chosen == "abort":
        context.ringer.ring(ABORTS, [batch_id])
    context.ringer.ring(EVENTS, [batch_id])
    await _mark_first(context, batch)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    if not batch.is_finished:
        context.spawn(mark_cancelled(context, batch))
    return Response(wire.encode(wire_batches.batch_body(batch)), media_type="application/json")


@patch(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}",
    action="completion-batch:update",
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
    request: AnyRequest, context: Given, caller: Caller, batch_id: query.BatchId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, caller, batch_id)
    wanted = wire.changes(wire_batches.BatchPatch, wire.object_of(await request.body()))
    await change_batch(context, caller, batch_id, wanted)
    return await _shown(context, caller, batch_id)


async def change_batch(
    context: Context, key: Principal, batch_id: UUID, wanted: wire_batches.BatchPatch
) -> None:
    """Change a batch that the caller may see, and ring for what that gives workers to do.

    Raises ValidationError, and ConflictError when it has ended.
    """
    given = wanted.model_fields_set
    async with context.db.transaction() as conn:
        held = await batches.hold(conn, workspace_id=key.workspace_id, batch_id=batch_id)
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
        if "max_tokens" in given:
            to = replace(to, max_tokens=wanted.max_tokens)
        if "max_cost" in given:
            to = await _with_max_cost(conn, key=key, batch_id=batch_id, to=to, wanted=wanted)
        found = await _steer(conn, key=key, batch_id=batch_id, held=held, to=to, wanted=wanted)
    _changed(context, batch_id, found)


async def _with_max_cost(
    conn: Connection,
    *,
    key: Principal,
    batch_id: UUID,
    to: Steering,
    wanted: wire_batches.BatchPatch,
) -> Steering:
    if wanted.max_cost is None:
        return replace(to, max_cost_nano=None, currency=None)
    used = await batches.resource_ids(conn, workspace_id=key.workspace_id, batch_id=batch_id)
    currency = await prices.currency_of(conn, workspace_id=key.workspace_id, resource_ids=used)
    return replace(to, max_cost_nano=round(wanted.max_cost * prices.NANO), currency=currency)


async def _steer(
    conn: Connection,
    *,
    key: Principal,
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
            amounts=[
                *wire_capacity.stored_amounts(to.capacity),
                *batches.budget(to.max_tokens, to.max_cost_nano),
            ]
            if not given.isdisjoint({"capacity", "max_tokens", "max_cost"})
            else None,
        )
    # What paused it may not hold any more; if it does, it pauses again.
    is_raised = held.pause_reason is not None and not given.isdisjoint({"max_tokens", "max_cost"})
    if ("is_paused" in given and not wanted.is_paused) or (is_raised and "is_paused" not in given):
        resources = await batches.resume(conn, workspace_id=key.workspace_id, batch_id=batch_id)
    return resources


def _changed(context: Context, batch_id: UUID, resources: Sequence[UUID]) -> None:
    """Ring for what a committed change gives workers to do."""
    log.info("batch.changed", batch=batch_id)
    context.ringer.ring(WORK, resources)


async def _shown(context: Context, key: Principal, batch_id: UUID) -> Response[bytes]:
    """The batch as it is now."""
    async with context.db.connection() as conn:
        batch = await batch_for(conn, key, batch_id)
        outlook = await forecast.of_batch(conn, batch=batch, clockwork=context.clockwork)
    return Response(
        wire.encode(wire_batches.batch_body(batch, outlook=outlook)), media_type="application/json"
    )


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/pause",
    action="completion-batch:update",
    summary="Pause a batch",
    description="Nothing of it is begun until it is resumed; calls in flight are let finish.",
    status_code=200,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, paused"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def pause(context: Given, caller: Caller, batch_id: query.BatchId) -> Response[bytes]:
    return await _hold_or_go(context, caller, batch_id, pause=True)


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/resume",
    action="completion-batch:update",
    summary="Resume a batch",
    description="The opposite of pause; harmless for a batch that is not paused.",
    status_code=200,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, going on"),
        409: Answer(ErrorBody, description="It had already ended"),
    },
)
async def resume(context: Given, caller: Caller, batch_id: query.BatchId) -> Response[bytes]:
    return await _hold_or_go(context, caller, batch_id, pause=False)


async def _hold_or_go(
    context: Context, key: Principal, batch_id: UUID, *, pause: bool
) -> Response[bytes]:
    async with context.db.connection() as conn:
        await batch_for(conn, key, batch_id)
    resources: list[UUID] = []
    async with context.db.transaction() as conn:
        await batches.hold(conn, workspace_id=key.workspace_id, batch_id=batch_id)
        if pause:
            await batches.pause(conn, workspace_id=key.workspace_id, batch_id=batch_id)
        else:
            resources = await batches.resume(conn, workspace_id=key.workspace_id, batch_id=batch_id)
    _changed(context, batch_id, resources)
    return await _shown(context, key, batch_id)


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/retry",
    action="completion-batch:retry",
    summary="Try items of a batch again",
    description="Those that failed; or chosen ones, those with certain errors, or also those that "
    "were cancelled. Their failures count anew; a batch that had ended goes on.",
    status_code=200,
    operation_class=retries.RetryOperation,
    request_max_body_size=4 * 1024 * 1024,
    responses={
        200: Answer(wire_batches.RetryBody, description="How many, and the batch"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        409: Answer(ErrorBody, description="It was cancelled, or its deadline has passed"),
    },
)
async def retry(
    request: AnyRequest, context: Given, caller: Caller, batch_id: query.BatchId
) -> Response[bytes]:
    body = await request.body()
    wanted = wire.read(wire_batches.BatchRetry, wire.object_of(body) if body.strip() else {})
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        redrive = await retries.plan(conn, batch, wanted)
        begun = await batches.clock(conn)
    await retries.prolong(context.db, batch, wanted, now=begun)
    retried = await retries.carry_out(context, batch, redrive, before=begun)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    log.info("batch.retried", batch=batch_id, items=retried)
    answer = wire_batches.RetryBody(retried=retried, batch=wire_batches.batch_body(batch))
    return Response(wire.encode(answer), media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/capacity-usage",
    action="completion-batch:get",
    summary="Where the limits of a batch stand",
    description="Those of its connections, models, resources, API key, of itself, and of its values "
    "of dimensions.",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def capacity_usage(
    context: Given, caller: Caller, batch_id: query.BatchId
) -> Response[bytes]:
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
    action="completion-batch:get",
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
    batch_id: query.BatchId,
    after: Annotated[
        str | None, QueryParameter(description="number of the last event that was seen")
    ] = None,
    slim: query.Switch = None,
    strict: query.Switch = None,
) -> Response[bytes]:
    view = _view(slim, strict)
    # A browser reconnects with the address it began with, so the header is the newer one.
    last = request.headers.get("last-event-id") or None
    name = "after" if last is None else "Last-Event-ID"
    position = query.number(after if last is None else last, name, default=0, least=0, most=2**53)
    batch = await followed_batch(context, caller, batch_id)
    return _stream(context, request, batch, after=position, view=view)


def _view(slim: str | None, strict: str | None) -> View:
    return View(
        slim=query.switch(slim, "slim", default=False),
        strict=query.switch(strict, "strict", default=False),
    )


def _stream(
    context: Context,
    request: AnyRequest,
    batch: Batch,
    *,
    after: int,
    view: View,
    headers: dict[str, str] | None = None,
) -> Response[bytes]:
    async def check() -> None:
        await request.route_handler.authorize_connection(request)  # pyright: ignore[reportUnknownMemberType] - Litestar's
        await followed_batch(context, await caller_of(request), batch.batch_id)

    standing = Standing(who=credential(request), check=check)
    to = outlet.of(request.scope)
    return outlet.Streamed(
        lambda: context.hub.follow(batch, to, after=after, view=view, standing=standing),
        media_type="text/event-stream",
        headers=_SSE_HEADERS | (headers or {}),
    )


async def _visible(conn: Connection, key: Principal, rows: Sequence[Batch]) -> list[Batch]:
    """Those batches whose resources are all within the key's allowlist."""
    if "*" in key.resources or not rows:
        return list(rows)
    used = await batches.resource_ids_of(
        conn,
        workspace_id=key.workspace_id,
        batch_ids=[row.batch_id for row in rows],
        reader_id=key.api_key_id,
    )
    return [row for row in rows if all(key.may_use(r) for r in used.get(row.batch_id, ()))]


async def _mark_first(context: Context, batch: Batch) -> None:
    """Let the first rows follow a cancel before it is answered: calls to be cut, small batches."""
    until = asyncio.get_running_loop().time() + _AT_ONCE_S
    while asyncio.get_running_loop().time() < until:
        if not await _mark_some(context, batch):
            return


async def mark_cancelled(context: Context, batch: Batch) -> None:
    """Let rows and events of a cancelled batch follow; what is left over is maintenance's."""
    try:
        while await _mark_some(context, batch):
            pass
    except CONNECTION_ERRORS as error:
        log.warning("batch.marking_left", batch=batch.batch_id, error=type(error).__name__)


async def _mark_some(context: Context, batch: Batch) -> int:
    try:
        async with context.db.transaction() as conn:
            marked = await queue.cancel_chunk(
                conn,
                workspace_id=batch.workspace_id,
                batch_day=batch.batch_day,
                batch_id=batch.batch_id,
            )
    except psycopg.errors.DeadlockDetected:
        return 1  # another verb was in the way; try again
    if marked:
        context.ringer.ring(EVENTS, [batch.batch_id])
    return marked


router = Router(
    "/v1/completion-batch",
    route_handlers=[
        create,
        estimate,
        list_batches,
        read,
        change,
        erasure.erase_batch,
        erasure.erase_item,
        results.list_items,
        results.results,
        results.read_item,
        results.attempts,
        cancel,
        retry,
        pause,
        resume,
        capacity_usage,
        follow,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    tags=["Completion batches"],
)
