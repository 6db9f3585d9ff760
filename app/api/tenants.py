"""``/v1/ai-connection`` and ``/v1/ai-resource``.

Only a key for all resources may create, change or see these: a confined one must not widen its own
reach.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, get, post, route
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation
from litestar.params import Body, PathParameter

from app import capacity, forecast, tenants
from app.access import Principal
from app.api import described, wire, wire_capacity, wire_tenants
from app.api.auth import (
    Caller,
    authenticate,
    require_everything,
    require_resources,
    tenant_caller,
)
from app.api.context import Context, Given
from app.api.errors import AnyRequest, ErrorBody
from app.api.limited import (
    CHANGED,
    CHANGING,
    MOST_BODY,
    Answer,
    amounts_of,
    answer,
    created,
    ring,
    shows,
    unique,
    usage,
)
from app.db import Connection
from app.errors import NotFoundError, Problem, ValidationError
from app.tenants import ProviderConnection, Resource

_COMPATIBLE: Final = "openai-compatible"

ConnectionId = Annotated[UUID, PathParameter(name="connectionId")]
ResourceId = Annotated[UUID, PathParameter(name="resourceId")]


# Connections --------------------------------------------------------------------------------------

_CONNECTION_EXAMPLE: Final = Example(
    summary="A server that speaks OpenAI's protocol",
    value={
        "name": "local vLLM",
        "provider": "openai-compatible",
        "baseUrl": "http://127.0.0.1:8000/v1",
        "apiKey": "sk-…",
        "capacity": [{"period": "minute", "requests": 500, "tokens": 200000, "enabled": True}],
    },
)


@post(
    "/ai-connection/{workspaceId:str}/{environmentId:str}",
    action="ai-connection:create",
    summary="Create a connection",
    status_code=201,
    responses={
        201: Answer(wire_tenants.ConnectionBody, description="The connection, secrets masked"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_connection(
    context: Given,
    caller: Caller,
    data: Annotated[wire_tenants.ConnectionCreate, Body(examples=[_CONNECTION_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create connections")
    async with context.db.transaction() as conn:
        with unique("connections_name_unique", data.name, "AI_CONNECTION_ALREADY_EXISTS"):
            connection_id = await tenants.create_connection(
                conn,
                keyring=context.keyring,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                name=data.name,
                provider=data.provider,
                base_url=_base_url_of(data),
                secret=data.api_key or (data.config.api_key if data.config else None) or None,
                timeout_ms=data.timeout_ms or context.settings.default_timeout_ms,
                description=data.description,
                headers=data.headers,
                allowed_models=data.allowed_models,
                capacity_entries=wire_capacity.capacity_entries(data.capacity),
                amounts=wire_capacity.amounts(data.capacity),
                concurrency=data.concurrency,
            )
        made = await _connection_body(conn, caller, connection_id)
    return created(made)


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}",
    action="ai-connection:get",
    summary="Read a connection",
    responses={200: Answer(wire_tenants.ConnectionBody, description="The connection")},
)
async def read_connection(
    context: Given,
    caller: Caller,
    connection_id: ConnectionId,
) -> Response[bytes]:
    require_everything(caller, "read connections")
    async with context.db.connection() as conn:
        found = await _connection_body(conn, caller, connection_id)
    return answer(found)


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}/capacity-usage",
    action="ai-connection:get",
    summary="Where the limits of a connection and its models stand",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def connection_usage(
    context: Given,
    caller: Caller,
    connection_id: ConnectionId,
) -> Response[bytes]:
    require_everything(caller, "read connections")
    async with context.db.connection() as conn:
        await _connection(conn, caller, connection_id)
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
        )


@route(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}",
    action="ai-connection:update",
    http_method=CHANGING,
    summary="Change a connection",
    description=CHANGED,
    status_code=200,
    operation_class=ConnectionChange,
    responses={
        200: Answer(wire_tenants.ConnectionBody, description="The connection, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def change_connection(
    request: AnyRequest, context: Given, caller: Caller, connection_id: ConnectionId
) -> Response[bytes]:
    require_everything(caller, "change connections")
    async with context.db.connection() as conn:
        await _connection(conn, caller, connection_id)
    given = wire.object_of(await request.body())
    async with context.db.transaction() as conn:
        await tenants.lock_connection(
            conn, workspace_id=caller.workspace_id, connection_id=connection_id
        )
        held = await _connection(conn, caller, connection_id)
        fixed = wire_tenants.ConnectionPatch.FIXED
        wire_tenants.require_fixed(fixed, given, wire_tenants.connection_body(held, []))
        wanted = wire.changes(wire_tenants.ConnectionPatch, given)
        to = wanted.applied(held, default_timeout_ms=context.settings.default_timeout_ms)
        resources = await tenants.change_connection(
            conn, held=held, to=to, amounts=amounts_of(wanted.model_fields_set, to.capacity)
        )
    ring(context, resources, connection=connection_id)
    async with context.db.connection() as conn:
        return answer(await _connection_body(conn, caller, connection_id))


def _base_url_of(data: wire_tenants.ConnectionCreate) -> str:
    given = data.base_url or (data.config.base_url if data.config else None)
    if given is not None:
        return given
    preset = tenants.PROVIDERS.get(data.provider)
    if preset is not None:
        return preset
    known = ", ".join(sorted(tenants.PROVIDERS))
    if data.provider == _COMPATIBLE:
        raise ValidationError(
            [Problem(path="baseUrl", message=f"is required, or a provider out of {known}")]
        )
    raise ValidationError(
        [
            Problem(
                path="provider",
                message=f"is none of {known}; give its baseUrl, with provider {_COMPATIBLE}",
            )
        ]
    )


async def _connection_body(
    conn: Connection, key: Principal, connection_id: UUID
) -> wire_tenants.ConnectionBody:
    found = await _connection(conn, key, connection_id)
    taught = await capacity.learned(
        conn, workspace_id=key.workspace_id, connection_id=connection_id
    )
    return wire_tenants.connection_body(found, taught)


async def _connection(conn: Connection, key: Principal, connection_id: UUID) -> ProviderConnection:
    found = await tenants.connection(
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


# Resources ----------------------------------------------------------------------------------------

_RESOURCE_EXAMPLE: Final = Example(
    summary="A model with limits of its own",
    value={
        "name": "gpt-4o-mini",
        "model": {
            "provider": "openai",
            "model": "gpt-4o-mini",
            "connectionId": "0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d11",
        },
        "capacity": [{"period": "minute", "requests": 100}],
        "enforceCapacity": True,
    },
)


@post(
    "/ai-resource/{workspaceId:str}/{environmentId:str}",
    action="ai-resource:create",
    summary="Create a resource",
    status_code=201,
    responses={
        201: Answer(wire_tenants.ResourceBody, description="The resource"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_resource(
    context: Given,
    caller: Caller,
    data: Annotated[wire_tenants.ResourceCreate, Body(examples=[_RESOURCE_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create resources")
    async with context.db.transaction() as conn:
        on = await _connection(conn, caller, data.model.connection_id)
        if on.allowed_models is not None and data.model.model not in on.allowed_models:
            raise ValidationError(
                [
                    Problem(
                        path="model.model", message="is not one of the connection's allowedModels"
                    )
                ]
            )
        if data.model.provider not in (None, on.provider):
            raise ValidationError(
                [
                    Problem(
                        path="model.provider",
                        message=f"differs from the connection's, which is {on.provider}",
                    )
                ]
            )
        with unique("resources_name_unique", data.name, "AI_RESOURCE_ALREADY_EXISTS"):
            resource_id = await tenants.create_resource(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                connection_id=on.connection_id,
                name=data.name,
                model=data.model.model,
                description=data.description,
                default_args=data.default_args,
                capacity_entries=wire_capacity.capacity_entries(data.capacity),
                amounts=wire_capacity.amounts(data.capacity),
                enforce_capacity=data.enforce_capacity is not False,
                timeout_ms=data.timeout_ms,
                concurrency=data.concurrency,
            )
        wanted = data.assign_api_keys or []
        if wanted:
            allowed = await tenants.allow_api_keys(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                resource_id=resource_id,
                api_key_ids=wanted,
            )
            missing = sorted({str(i) for i in wanted} - {str(i) for i in allowed})
            if missing:
                raise NotFoundError(
                    f"API keys not found: {', '.join(missing[:20])}", code="API_KEY_NOT_FOUND"
                )
        made = await _resource_body(context, conn, caller, resource_id)
    return created(made)


@get(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}",
    action="ai-resource:get",
    summary="Read a resource",
    responses={200: Answer(wire_tenants.ResourceBody, description="The resource")},
)
async def read_resource(context: Given, caller: Caller, resource_id: ResourceId) -> Response[bytes]:
    async with context.db.connection() as conn:
        require_resources(caller, [resource_id])
        found = await _resource_body(context, conn, caller, resource_id)
    return answer(found)


@get(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}/capacity-usage",
    action="ai-resource:get",
    summary="Where the limits of a resource stand",
    description="Its own, and those of its model and its connection.",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def resource_usage(
    context: Given, caller: Caller, resource_id: ResourceId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        require_resources(caller, [resource_id])
        await _resource(conn, caller, resource_id)
        scope_ids = await capacity.resource_scopes(
            conn, workspace_id=caller.workspace_id, resource_id=resource_id
        )
        found = await usage(context, conn, caller, scope_ids)
    return answer(found)


@dataclass
class ResourceChange(Operation):
    """Documents the body of a change, which is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields(
                [],
                capacity=described.capacity(),
                enforceCapacity=described.flag,
                concurrency=described.whole(1, 1_000_000),
                timeoutMs=described.whole(100, 600_000),
                description=described.text,
                defaultArgs=described.record,
            ),
            less=Example(
                summary="Ten calls at once, and no limit of its own",
                value={"concurrency": 10, "capacity": None},
            ),
        )


@route(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}",
    action="ai-resource:update",
    http_method=CHANGING,
    summary="Change a resource",
    description=CHANGED,
    status_code=200,
    operation_class=ResourceChange,
    responses={
        200: Answer(wire_tenants.ResourceBody, description="The resource, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def change_resource(
    request: AnyRequest, context: Given, caller: Caller, resource_id: ResourceId
) -> Response[bytes]:
    require_everything(caller, "change resources")
    async with context.db.connection() as conn:
        await _resource(conn, caller, resource_id)
    given = wire.object_of(await request.body())
    async with context.db.transaction() as conn:
        await tenants.lock_resource(conn, workspace_id=caller.workspace_id, resource_id=resource_id)
        held = await _resource(conn, caller, resource_id)
        fixed = wire_tenants.ResourcePatch.FIXED
        wire_tenants.require_fixed(fixed, given, wire_tenants.resource_body(held, [], None))
        wanted = wire.changes(wire_tenants.ResourcePatch, given)
        to = wanted.applied(held)
        resources = await tenants.change_resource(
            conn, held=held, to=to, amounts=amounts_of(wanted.model_fields_set, to.capacity)
        )
    ring(context, resources, resource=resource_id)
    async with context.db.connection() as conn:
        return answer(await _resource_body(context, conn, caller, resource_id))


async def _resource_body(
    context: Context, conn: Connection, key: Principal, resource_id: UUID
) -> wire_tenants.ResourceBody:
    found = await _resource(conn, key, resource_id)
    taught = await capacity.learned(
        conn,
        workspace_id=key.workspace_id,
        connection_id=found.connection_id,
        resource_id=resource_id,
    )
    waiting = await forecast.of_resource(
        conn,
        workspace_id=key.workspace_id,
        resource_id=resource_id,
        clockwork=context.clockwork,
    )
    if waiting is not None and waiting.scope is not None and not shows(key, waiting.scope):
        waiting = replace(waiting, scope=None, limit=None)
    return wire_tenants.resource_body(found, taught, waiting)


async def _resource(conn: Connection, key: Principal, resource_id: UUID) -> Resource:
    found = await tenants.resource(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        resource_id=resource_id,
    )
    if found is None:
        raise NotFoundError(f"AI Resource {resource_id} not found", code="AI_RESOURCE_NOT_FOUND")
    return found


router = Router(
    "/v1",
    route_handlers=[
        create_connection,
        read_connection,
        change_connection,
        connection_usage,
        create_resource,
        read_resource,
        change_resource,
        resource_usage,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    request_max_body_size=MOST_BODY,
    tags=["Tenants"],
)
