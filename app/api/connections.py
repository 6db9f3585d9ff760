"""``/v1/ai-connection`` and ``/v1/ai-provider``.

Only a key for all resources may create, change, see or test connections: a confined one must not
widen its own reach.
"""

from dataclasses import dataclass
from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, delete, get, post, route
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation
from litestar.params import Body, PathParameter, QueryParameter

from app import capacity, connections, resources
from app.access import Principal
from app.api import described, query, wire, wire_capacity, wire_connections
from app.api.auth import Caller, authenticate, require_everything, tenant_caller
from app.api.context import Context, Given
from app.api.errors import AnyRequest, ErrorBody
from app.api.owned import (
    CHANGED,
    CHANGING,
    MOST_BODY,
    MOST_PAGE,
    Answer,
    amounts_of,
    answer,
    created,
    cursor_of,
    ring,
    ring_cancelled,
    unique,
    usage,
)
from app.connections import ProviderConnection, Route
from app.db import Connection
from app.errors import ConflictError, NotFoundError, Problem, SecretError, ValidationError
from app.presets import PROVIDERS
from app.probe import Finding, probe

ConnectionId = Annotated[UUID, PathParameter(name="connectionId")]
Limit = Annotated[str | None, QueryParameter(description=f"1 to {MOST_PAGE}; default 100")]
Cursor = Annotated[str | None, QueryParameter(description="nextCursor of the page before")]
Force = Annotated[
    str | None, QueryParameter(description="true: cancel open batches, and drop what refers to it")
]

_EXAMPLE: Final = Example(
    summary="A server that speaks OpenAI's protocol",
    value={
        "name": "local vLLM",
        "provider": "openai-compatible",
        "baseUrl": "http://127.0.0.1:8000/v1",
        "apiKey": "sk-…",
        "capacity": [{"period": "minute", "requests": 500, "tokens": 200000, "enabled": True}],
    },
)


@get(
    "/ai-provider",
    action="ai-provider:list",
    summary="List the providers that are known by name",
    description="With the form of a connection's config as JSON Schema; the format of secrets is "
    '"secret". Any other server that speaks OpenAI\'s protocol is openai-compatible.',
    responses={200: Answer(wire_connections.ProvidersBody, description="The providers")},
)
async def list_providers() -> Response[bytes]:
    found = [wire_connections.provider_body(each) for each in PROVIDERS.values()]
    return answer(wire_connections.ProvidersBody(data=found))


@post(
    "/ai-connection/{workspaceId:str}/{environmentId:str}",
    action="ai-connection:create",
    summary="Create a connection",
    status_code=201,
    responses={
        201: Answer(wire_connections.ConnectionBody, description="The connection, secrets masked"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_connection(
    context: Given,
    caller: Caller,
    data: Annotated[wire_connections.ConnectionCreate, Body(examples=[_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create connections")
    _require_allowed(context, data.address)
    async with context.db.transaction() as conn:
        with unique("connections_name_unique", data.name, "AI_CONNECTION_ALREADY_EXISTS"):
            connection_id = await connections.create(
                conn,
                keyring=context.keyring,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                name=data.name,
                provider=data.provider,
                base_url=data.address,
                secret=data.secret,
                timeout_ms=data.timeout_ms or context.settings.default_timeout_ms,
                description=data.description,
                headers=data.headers,
                allowed_models=data.allowed_models,
                capacity_entries=wire_capacity.capacity_entries(data.capacity),
                amounts=wire_capacity.amounts(data.capacity),
                concurrency=data.concurrency,
                created_by=caller.actor_id,
            )
        made = await _body(conn, caller, await connection_for(conn, caller, connection_id))
    return created(made)


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}",
    action="ai-connection:list",
    summary="List connections",
    description="Oldest first.",
    responses={200: Answer(wire_connections.ConnectionsBody, description="A page of connections")},
)
async def list_connections(
    *,
    context: Given,
    caller: Caller,
    name: Annotated[str | None, QueryParameter(description="only that of this name")] = None,
    limit: Limit = None,
    cursor: Cursor = None,
) -> Response[bytes]:
    require_everything(caller, "read connections")
    most = query.number(limit, "limit", default=100, least=1, most=MOST_PAGE)
    async with context.db.connection() as conn:
        rows = await connections.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            after=cursor_of(cursor),
            name=name,
            most=most,
        )
        found = [await _body(conn, caller, row) for row in rows]
    return answer(
        wire_connections.ConnectionsBody(
            data=found,
            next_cursor=str(rows[-1].connection_id) if len(rows) == most else None,
        )
    )


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}",
    action="ai-connection:get",
    summary="Read a connection",
    responses={200: Answer(wire_connections.ConnectionBody, description="The connection")},
)
async def read_connection(
    context: Given, caller: Caller, connection_id: ConnectionId
) -> Response[bytes]:
    require_everything(caller, "read connections")
    async with context.db.connection() as conn:
        found = await connection_for(conn, caller, connection_id)
        body = await _body(conn, caller, found)
    return answer(body)


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}/capacity-usage",
    action="ai-connection:get",
    summary="Where the limits of a connection and its models stand",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def connection_usage(
    context: Given, caller: Caller, connection_id: ConnectionId
) -> Response[bytes]:
    require_everything(caller, "read connections")
    async with context.db.connection() as conn:
        await connection_for(conn, caller, connection_id)
        scope_ids = await capacity.connection_scopes(
            conn, workspace_id=caller.workspace_id, connection_id=connection_id
        )
        found = await usage(context, conn, caller, scope_ids)
    return answer(found)


@dataclass
class ConnectionChange(Operation):
    """Documents the body of a change, which is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields(
                [],
                name=described.text,
                baseUrl=described.text,
                apiKey=described.text,
                config=described.fields([], apiKey=described.text, baseUrl=described.text),
                capacity=described.capacity(),
                concurrency=described.whole(1, 1_000_000),
                timeoutMs=described.whole(100, 600_000),
                description=described.text,
                headers=described.record,
                allowedModels=described.texts,
            ),
            more=Example(
                summary="The provider allows more now",
                value={"capacity": [{"period": "minute", "requests": 1000}], "concurrency": 50},
            ),
            secret=Example(summary="A new key", value={"config": {"apiKey": "sk-…"}}),
        )


@route(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}",
    action="ai-connection:update",
    http_method=CHANGING,
    summary="Change a connection",
    description=f"{CHANGED} A secret that is absent, or begins with ****, stays.",
    status_code=200,
    operation_class=ConnectionChange,
    responses={
        200: Answer(wire_connections.ConnectionBody, description="The connection, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        409: Answer(ErrorBody, description="Resources name models that would not be allowed"),
    },
)
async def change_connection(
    request: AnyRequest, context: Given, caller: Caller, connection_id: ConnectionId
) -> Response[bytes]:
    require_everything(caller, "change connections")
    async with context.db.connection() as conn:
        await connection_for(conn, caller, connection_id)
    given = wire.object_of(await request.body())
    async with context.db.transaction() as conn:
        await connections.lock(conn, workspace_id=caller.workspace_id, connection_id=connection_id)
        held = await connection_for(conn, caller, connection_id)
        fixed = wire_connections.ConnectionPatch.FIXED
        wire.require_fixed(fixed, given, wire_connections.connection_body(held, []))
        wanted = wire.changes(wire_connections.ConnectionPatch, given)
        to = wanted.applied(held, default_timeout_ms=context.settings.default_timeout_ms)
        if to.base_url != held.base_url:
            _require_allowed(context, to.base_url)
        await _require_models(conn, to)
        with unique("connections_name_unique", to.name, "AI_CONNECTION_ALREADY_EXISTS"):
            woken = await connections.change(
                conn,
                held=held,
                to=to,
                amounts=amounts_of(wanted.model_fields_set, to.capacity),
                updated_by=caller.actor_id,
            )
        if wanted.says_secret:
            await connections.set_secret(
                conn,
                keyring=context.keyring,
                workspace_id=caller.workspace_id,
                connection_id=connection_id,
                secret=wanted.secret,
            )
    ring(context, woken, connection=connection_id)
    async with context.db.connection() as conn:
        changed = await connection_for(conn, caller, connection_id)
        return answer(await _body(conn, caller, changed))


def _require_allowed(context: Context, base_url: str) -> None:
    """Refuse an address of a network that is not for users to call."""
    if (problem := context.settings.provider_guard.problem(base_url)) is not None:
        raise ValidationError([Problem(path="baseUrl", message=problem)])


async def _require_models(conn: Connection, to: ProviderConnection) -> None:
    """Refuse to disallow a model that a resource names."""
    if to.allowed_models is None:
        return
    used = await connections.models(
        conn, workspace_id=to.workspace_id, connection_id=to.connection_id
    )
    lacking = [each for each in used if not to.allows(each.model)]
    if lacking:
        named = sorted({f"'{each.name}' ({each.model})" for each in lacking})
        raise ConflictError(
            f"Resources name models that allowedModels would not have: {', '.join(named[:20])}. "
            "Change or delete them first.",
            code="AI_CONNECTION_MODELS_IN_USE",
            details={"resources": sorted({str(each.resource_id) for each in lacking})[:100]},
        )


@delete(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}",
    action="ai-connection:delete",
    summary="Delete a connection and its resources",
    description="Refused (409) while batches that use it are open, or resources elsewhere fall back "
    "or route to it; ?force=true cancels those batches and takes it out of those resources. What was "
    "answered stays readable.",
    status_code=204,
    responses={
        409: Answer(ErrorBody, description="It is in use; details names batches or resources"),
    },
)
async def delete_connection(
    context: Given, caller: Caller, connection_id: ConnectionId, force: Force = None
) -> None:
    require_everything(caller, "delete connections")
    forced = query.switch(force, "force", default=False)
    async with context.db.transaction() as conn:
        await connection_for(conn, caller, connection_id)
        cancelled = await resources.delete_connection(
            conn, workspace_id=caller.workspace_id, connection_id=connection_id, force=forced
        )
    ring(context, [], connection=connection_id)
    ring_cancelled(context, cancelled)


@post(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}/test",
    action="ai-connection:test",
    summary="Test a connection",
    description="Makes one small call, beside the queue and counted by no limit, and says what is "
    "wrong. Asks the model of the body ({model}), or one that the connection is known to have.",
    status_code=200,
    responses={
        200: Answer(wire_connections.TestBody, description="What was found, also if it is bad"),
        400: Answer(ErrorBody, description="Nobody knows which model to ask"),
    },
)
async def try_connection(
    request: AnyRequest, context: Given, caller: Caller, connection_id: ConnectionId
) -> Response[bytes]:
    require_everything(caller, "test connections")
    async with context.db.connection() as conn:
        held = await connection_for(conn, caller, connection_id)
        known = await connections.models(
            conn, workspace_id=caller.workspace_id, connection_id=connection_id
        )
    body = await request.body()
    asked = wire_connections.ConnectionTest()
    if body:
        asked = wire.read(wire_connections.ConnectionTest, wire.object_of(body))
    candidates = [asked.model, *(held.allowed_models or []), *(each.model for each in known)]
    model = next((each for each in candidates if each), None)
    if model is None:
        message = "is required: the connection has no resource yet that names one"
        raise ValidationError([Problem(path="model", message=message)])
    if not held.allows(model):
        message = "is not one of the connection's allowedModels"
        raise ValidationError([Problem(path="model", message=message)])
    return answer(await tested(context, _route(held, model)))


def _route(of: ProviderConnection, model: str) -> Route:
    """Where a call that belongs to no resource goes."""
    return Route(
        resource_id=of.connection_id,
        connection_id=of.connection_id,
        model=model,
        default_args={},
        provider=of.provider,
        base_url=of.base_url,
        secret_key_id=of.secret_key_id,
        secret=of.secret,
        headers=of.headers,
        allowed_models=of.allowed_models,
        timeout_ms=of.timeout_ms,
        config_at=of.updated_at,
    )


async def tested(context: Context, where: Route) -> wire_connections.TestBody:
    """What one real call finds, on the wire. No database connection is held meanwhile."""
    try:
        secret = connections.open_secret(context.keyring, where)
    except SecretError:
        finding = Finding(
            ok=False,
            code="secret_unreadable",
            message="The connection's key cannot be opened with SLUICE_SECRET_KEY.",
            remedy="Enter the key again, or let the operator add the key that sealed it.",
            status_code=None,
            latency_ms=0,
            request_id=None,
        )
    else:
        finding = await probe(
            where,
            secret=secret,
            timeout_s=context.settings.probe_timeout_s,
            guard=context.settings.provider_guard,
        )
    return wire_connections.TestBody(
        ok=finding.ok,
        code=finding.code,
        message=finding.message,
        remedy=finding.remedy,
        model=where.model,
        base_url=where.base_url,
        status_code=finding.status_code,
        latency_ms=finding.latency_ms,
        request_id=finding.request_id,
        prompt_tokens=finding.input_tokens,
        output_tokens=finding.output_tokens,
    )


async def _body(
    conn: Connection, key: Principal, found: ProviderConnection
) -> wire_connections.ConnectionBody:
    taught = await capacity.learned(
        conn, workspace_id=key.workspace_id, connection_id=found.connection_id
    )
    return wire_connections.connection_body(found, taught)


async def connection_for(
    conn: Connection, key: Principal, connection_id: UUID
) -> ProviderConnection:
    """A connection of the caller's environment. Raises NotFoundError."""
    found = await connections.get(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        connection_id=connection_id,
    )
    if found is None:
        raise NotFoundError(
            f"AI Connection {connection_id} not found", code="AI_CONNECTION_NOT_FOUND"
        )
    return found


router = Router(
    "/v1",
    route_handlers=[
        Router("/", route_handlers=[list_providers]),
        Router(
            "/",
            route_handlers=[
                create_connection,
                list_connections,
                read_connection,
                change_connection,
                delete_connection,
                try_connection,
                connection_usage,
            ],
            dependencies={"caller": Provide(tenant_caller)},
        ),
    ],
    guards=[authenticate],
    request_max_body_size=MOST_BODY,
    tags=["Connections"],
)
