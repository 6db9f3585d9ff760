"""``/v1/api-key`` and ``/v1/whoami``.

Only a key for all resources may create, change or see others: a confined one must not widen its own
reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, get, post, route
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation
from litestar.params import Body, PathParameter

from app import capacity, tenants
from app.api import described, wire, wire_capacity, wire_tenants
from app.api.auth import Caller, authenticate, caller, require_everything, tenant_caller
from app.api.context import Given
from app.api.errors import AnyRequest, ErrorBody
from app.api.owned import (
    CHANGED,
    CHANGING,
    MOST_BODY,
    Answer,
    amounts,
    answer,
    created,
    ring,
    usage,
)
from app.api.resources import resource_for
from app.db import Connection
from app.errors import NotFoundError
from app.tenants import ApiKey, ApiKeyEntity

ApiKeyId = Annotated[UUID, PathParameter(name="apiKeyId")]

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
        201: Answer(wire_tenants.ApiKeyBody, description="The key, with its value"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_api_key(
    context: Given,
    caller: Caller,
    data: Annotated[wire_tenants.ApiKeyCreate, Body(examples=[_KEY_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create API keys")
    async with context.db.transaction() as conn:
        await _require_known(conn, caller, data.resources)
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
            capacity_entries=wire_capacity.capacity_entries(data.capacity),
            amounts=wire_capacity.amounts(data.capacity),
            expires_at=data.expires_at,
        )
        made = await _api_key(conn, caller, api_key_id)
    return created(wire_tenants.api_key_body(made, value=value))


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}",
    summary="Read an API key",
    responses={200: Answer(wire_tenants.ApiKeyBody, description="The key, masked")},
)
async def read_api_key(context: Given, caller: Caller, api_key_id: ApiKeyId) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "read other API keys")
    async with context.db.connection() as conn:
        found = await _api_key(conn, caller, api_key_id)
    return answer(wire_tenants.api_key_body(found))


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}/capacity-usage",
    summary="Where the limits of an API key stand",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def api_key_usage(context: Given, caller: Caller, api_key_id: ApiKeyId) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "read other API keys")
    async with context.db.connection() as conn:
        await _api_key(conn, caller, api_key_id)
        scope_ids = await capacity.api_key_scopes(
            conn, workspace_id=caller.workspace_id, api_key_id=api_key_id
        )
        found = await usage(context, conn, caller, scope_ids)
    return answer(found)


@dataclass
class ApiKeyChange(Operation):
    """Documents the body of a change, which is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields(
                [],
                enabled=described.flag,
                expiresAt=described.moment,
                resources=described.texts,
                capacity=described.capacity(),
                enforceCapacity=described.flag,
                description=described.text,
                labels=described.texts,
            ),
            off=Example(summary="Let it open nothing any more", value={"enabled": False}),
        )


@route(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}",
    http_method=CHANGING,
    summary="Change an API key",
    description=CHANGED,
    status_code=200,
    operation_class=ApiKeyChange,
    responses={
        200: Answer(wire_tenants.ApiKeyBody, description="The key, masked"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def change_api_key(
    request: AnyRequest, context: Given, caller: Caller, api_key_id: ApiKeyId
) -> Response[bytes]:
    require_everything(caller, "change API keys")
    async with context.db.connection() as conn:
        await _api_key(conn, caller, api_key_id)
    given = wire.object_of(await request.body())
    async with context.db.transaction() as conn:
        await tenants.lock_api_key(conn, workspace_id=caller.workspace_id, api_key_id=api_key_id)
        held = await _api_key(conn, caller, api_key_id)
        fixed = wire_tenants.ApiKeyPatch.FIXED
        wire.require_fixed(fixed, given, wire_tenants.api_key_body(held))
        wanted = wire.changes(wire_tenants.ApiKeyPatch, given)
        to = wanted.applied(held)
        await _require_known(conn, caller, wanted.resources)
        resources = await tenants.change_api_key(
            conn, to=to, amounts=amounts(wanted.model_fields_set, to.capacity)
        )
    ring(context, resources, api_key=api_key_id)
    async with context.db.connection() as conn:
        return answer(wire_tenants.api_key_body(await _api_key(conn, caller, api_key_id)))


async def _require_known(conn: Connection, key: ApiKey, resources: Sequence[str]) -> None:
    """Refuse ids in an allowlist that are no resources of the environment."""
    for each in resources:
        if each != "*":
            await resource_for(conn, key, UUID(each))


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


# Who am I -----------------------------------------------------------------------------------------


@get(
    "/whoami",
    summary="What the key opens",
    dependencies={"caller": Provide(caller)},
    responses={200: Answer(wire_tenants.WhoAmI, description="The caller")},
)
async def whoami(caller: Caller) -> Response[bytes]:
    return answer(wire_tenants.who_am_i(caller))


router = Router(
    "/v1",
    route_handlers=[
        create_api_key,
        read_api_key,
        change_api_key,
        api_key_usage,
        whoami,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    request_max_body_size=MOST_BODY,
    tags=["Tenants"],
)
