"""``/v1/ai-connection``, ``/v1/ai-resource``, ``/v1/api-key`` and ``/v1/whoami``.

Only a key for all resources may create or see these: a confined one must not widen its own reach.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Final
from uuid import UUID

import psycopg
from litestar import Response, Router, get, post
from litestar.di import Provide
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, PathParameter

from app import capacity, forecast, tenants
from app.api import wire
from app.api.auth import (
    Caller,
    authenticate,
    caller,
    require_everything,
    require_resources,
    tenant_caller,
)
from app.api.context import Context, Given
from app.api.errors import ErrorBody
from app.capacity import NamedScope
from app.db import Connection
from app.errors import NotFoundError, Problem, RequestError, ValidationError
from app.tenants import ApiKey, ApiKeyEntity, ProviderConnection, Resource

#: Documentation of an answer; made-up examples would be noise.
Answer = partial(ResponseSpec, generate_examples=False)

_MOST_BODY: Final = 1024 * 1024
_COMPATIBLE: Final = "openai-compatible"


@contextmanager
def _unique(constraint: str, name: str, code: str) -> Generator[None]:
    """Translate the refusal of a name that is taken."""
    try:
        yield
    except psycopg.errors.UniqueViolation as error:
        if error.diag.constraint_name != constraint:
            raise
        raise RequestError(
            f"The name '{name}' is already taken in this environment.", code=code
        ) from None


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
    summary="Create a connection",
    status_code=201,
    responses={
        201: Answer(wire.ConnectionBody, description="The connection, secrets masked"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_connection(
    context: Given,
    caller: Caller,
    data: Annotated[wire.ConnectionCreate, Body(examples=[_CONNECTION_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create connections")
    async with context.db.transaction() as conn:
        with _unique("connections_name_unique", data.name, "AI_CONNECTION_ALREADY_EXISTS"):
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
                capacity_entries=wire.capacity_entries(data.capacity),
                amounts=wire.amounts(data.capacity),
                concurrency=data.concurrency,
            )
        made = await _connection_body(conn, caller, connection_id)
    return _created(made)


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}",
    summary="Read a connection",
    responses={200: Answer(wire.ConnectionBody, description="The connection")},
)
async def read_connection(
    context: Given,
    caller: Caller,
    connection_id: Annotated[UUID, PathParameter(name="connectionId")],
) -> Response[bytes]:
    require_everything(caller, "read connections")
    async with context.db.connection() as conn:
        found = await _connection_body(conn, caller, connection_id)
    return _answer(found)


@get(
    "/ai-connection/{workspaceId:str}/{environmentId:str}/{connectionId:str}/capacity-usage",
    summary="Where the limits of a connection and its models stand",
    responses={200: Answer(wire.CapacityUsage, description="Scopes and their limits")},
)
async def connection_usage(
    context: Given,
    caller: Caller,
    connection_id: Annotated[UUID, PathParameter(name="connectionId")],
) -> Response[bytes]:
    require_everything(caller, "read connections")
    async with context.db.connection() as conn:
        await _connection(conn, caller, connection_id)
        scope_ids = await capacity.connection_scopes(
            conn, workspace_id=caller.workspace_id, connection_id=connection_id
        )
        found = await _usage(context, conn, caller, scope_ids)
    return _answer(found)


def _base_url_of(data: wire.ConnectionCreate) -> str:
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
    conn: Connection, key: ApiKey, connection_id: UUID
) -> wire.ConnectionBody:
    found = await _connection(conn, key, connection_id)
    taught = await capacity.learned(
        conn, workspace_id=key.workspace_id, connection_id=connection_id
    )
    return wire.connection_body(found, taught)


async def _connection(conn: Connection, key: ApiKey, connection_id: UUID) -> ProviderConnection:
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
    summary="Create a resource",
    status_code=201,
    responses={
        201: Answer(wire.ResourceBody, description="The resource"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_resource(
    context: Given,
    caller: Caller,
    data: Annotated[wire.ResourceCreate, Body(examples=[_RESOURCE_EXAMPLE])],
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
        with _unique("resources_name_unique", data.name, "AI_RESOURCE_ALREADY_EXISTS"):
            resource_id = await tenants.create_resource(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                connection_id=on.connection_id,
                name=data.name,
                model=data.model.model,
                description=data.description,
                default_args=data.default_args,
                capacity_entries=wire.capacity_entries(data.capacity),
                amounts=wire.amounts(data.capacity),
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
    return _created(made)


@get(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}",
    summary="Read a resource",
    responses={200: Answer(wire.ResourceBody, description="The resource")},
)
async def read_resource(
    context: Given, caller: Caller, resource_id: Annotated[UUID, PathParameter(name="resourceId")]
) -> Response[bytes]:
    async with context.db.connection() as conn:
        require_resources(caller, [resource_id])
        found = await _resource_body(context, conn, caller, resource_id)
    return _answer(found)


@get(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}/capacity-usage",
    summary="Where the limits of a resource stand",
    description="Its own, and those of its model and its connection.",
    responses={200: Answer(wire.CapacityUsage, description="Scopes and their limits")},
)
async def resource_usage(
    context: Given, caller: Caller, resource_id: Annotated[UUID, PathParameter(name="resourceId")]
) -> Response[bytes]:
    async with context.db.connection() as conn:
        require_resources(caller, [resource_id])
        await _resource(conn, caller, resource_id)
        scope_ids = await capacity.resource_scopes(
            conn, workspace_id=caller.workspace_id, resource_id=resource_id
        )
        found = await _usage(context, conn, caller, scope_ids)
    return _answer(found)


async def _resource_body(
    context: Context, conn: Connection, key: ApiKey, resource_id: UUID
) -> wire.ResourceBody:
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
    if waiting is not None and waiting.scope is not None and not _shows(key, waiting.scope):
        waiting = replace(waiting, scope=None, limit=None)
    return wire.resource_body(found, taught, waiting)


def _shows(key: ApiKey, scope: NamedScope) -> bool:
    """Whether a caller may know of it: a confined key not of others' batches, keys and addresses."""
    if "*" in key.resources or scope.scope_id == key.api_key_id:
        return True
    return scope.kind in ("connection", "model", "resource")


async def _resource(conn: Connection, key: ApiKey, resource_id: UUID) -> Resource:
    found = await tenants.resource(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        resource_id=resource_id,
    )
    if found is None:
        raise NotFoundError(f"AI Resource {resource_id} not found", code="AI_RESOURCE_NOT_FOUND")
    return found


# Api keys -----------------------------------------------------------------------------------------

_KEY_EXAMPLE: Final = Example(
    summary="A key for one resource",
    value={
        "name": "reporting",
        "enabled": True,
        "resources": ["0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d11"],
        "enforceCapacity": True,
        "capacity": [{"period": "day", "tokens": 1000000}],
    },
)


@post(
    "/api-key/{workspaceId:str}/{environmentId:str}",
    summary="Create an API key",
    description="The key itself is shown in this answer only (apiKeyValue).",
    status_code=201,
    responses={
        201: Answer(wire.ApiKeyBody, description="The key, with its value"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_api_key(
    context: Given,
    caller: Caller,
    data: Annotated[wire.ApiKeyCreate, Body(examples=[_KEY_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create API keys")
    async with context.db.transaction() as conn:
        for each in data.resources:
            if each != "*":
                await _resource(conn, caller, UUID(each))
        api_key_id, value = await tenants.create_api_key(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            name=data.name,
            description=data.description,
            enabled=data.enabled,
            resources=data.resources,
            labels=data.labels or (),
            enforce_capacity=data.enforce_capacity,
            capacity_entries=wire.capacity_entries(data.capacity),
            amounts=wire.amounts(data.capacity),
            expires_at=data.expires_at,
        )
        made = await _api_key(conn, caller, api_key_id)
    return _created(wire.api_key_body(made, value=value))


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}",
    summary="Read an API key",
    responses={200: Answer(wire.ApiKeyBody, description="The key, masked")},
)
async def read_api_key(
    context: Given, caller: Caller, api_key_id: Annotated[UUID, PathParameter(name="apiKeyId")]
) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "read other API keys")
    async with context.db.connection() as conn:
        found = await _api_key(conn, caller, api_key_id)
    return _answer(wire.api_key_body(found))


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}/capacity-usage",
    summary="Where the limits of an API key stand",
    responses={200: Answer(wire.CapacityUsage, description="Scopes and their limits")},
)
async def api_key_usage(
    context: Given, caller: Caller, api_key_id: Annotated[UUID, PathParameter(name="apiKeyId")]
) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "read other API keys")
    async with context.db.connection() as conn:
        await _api_key(conn, caller, api_key_id)
        scope_ids = await capacity.api_key_scopes(
            conn, workspace_id=caller.workspace_id, api_key_id=api_key_id
        )
        found = await _usage(context, conn, caller, scope_ids)
    return _answer(found)


async def _api_key(conn: Connection, key: ApiKey, api_key_id: UUID) -> ApiKeyEntity:
    found = await tenants.api_key_entity(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        api_key_id=api_key_id,
    )
    if found is None:
        raise NotFoundError(f"API key {api_key_id} not found", code="API_KEY_NOT_FOUND")
    return found


async def _usage(
    context: Context, conn: Connection, key: ApiKey, scope_ids: Sequence[UUID]
) -> wire.CapacityUsage:
    named = await capacity.named(conn, workspace_id=key.workspace_id, scope_ids=scope_ids)
    scopes = {scope_id: scope for scope_id, scope in named.items() if _shows(key, scope)}
    usage = await capacity.usage(
        conn,
        workspace_id=key.workspace_id,
        scope_ids=scope_ids,
        guard_s=context.settings.guard_s,
        with_reserved=True,
    )
    return wire.capacity_usage(scopes, usage)


# Who am I -----------------------------------------------------------------------------------------


@get(
    "/whoami",
    summary="What the key opens",
    dependencies={"caller": Provide(caller)},
    responses={200: Answer(wire.WhoAmI, description="The caller")},
)
async def whoami(caller: Caller) -> Response[bytes]:
    return _answer(wire.who_am_i(caller))


def _answer(body: object, status: int = 200) -> Response[bytes]:
    return Response(wire.encode(body), media_type="application/json", status_code=status)


def _created(body: object) -> Response[bytes]:
    return _answer(body, 201)


router = Router(
    "/v1",
    route_handlers=[
        create_connection,
        read_connection,
        connection_usage,
        create_resource,
        read_resource,
        resource_usage,
        create_api_key,
        read_api_key,
        api_key_usage,
        whoami,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    request_max_body_size=_MOST_BODY,
    tags=["Tenants"],
)
