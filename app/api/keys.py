"""``/v1/api-key`` and ``/v1/whoami``.

Only a key for all resources may create, change or see other keys: a confined one must not widen its
own reach. Nobody gives a key permissions that they lack themselves, or learns the value of one
that has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, delete, get, post, route
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation
from litestar.params import Body, PathParameter, QueryParameter

from app import access, api_keys, capacity, tenants
from app.access import Principal
from app.api import described, wire, wire_access, wire_capacity
from app.api.auth import (
    ANYONE,
    Caller,
    Visiting,
    authenticate,
    require_everything,
    require_grantable,
    tenant_caller,
    visitor,
)
from app.api.context import Given
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
    usage,
)
from app.api_keys import ApiKey
from app.db import Connection
from app.errors import ForbiddenError, NotFoundError, Problem, ValidationError
from app.log import Log

log = Log("api")

_MOST: Final = 1000

ApiKeyId = Annotated[UUID, PathParameter(name="apiKeyId")]

_EXAMPLE: Final = Example(
    summary="A key that only makes batches, with one resource",
    value={
        "name": "reporting",
        "enabled": True,
        "resources": ["0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d11"],
        "permissions": ["completion-batch:*"],
        "enforceCapacity": True,
        "capacity": [{"period": "day", "tokens": 1000000}],
    },
)


@post(
    "/api-key/{workspaceId:str}/{environmentId:str}",
    action="api-key:create",
    summary="Create an API key",
    description="The key itself is shown in this answer only (apiKeyValue). Without permissions it may"
    " do what its maker may; a key made by a member, the work of the environment.",
    status_code=201,
    responses={
        201: Answer(wire_access.ApiKeyBody, description="The key, with its value"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        403: Answer(ErrorBody, description="It would do more than its maker may"),
    },
)
async def create_key(
    context: Given,
    caller: Caller,
    data: Annotated[wire_access.ApiKeyCreate, Body(examples=[_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create API keys")
    permissions = _permissions(caller, data.permissions)
    async with context.db.transaction() as conn:
        await _require_known(conn, caller, data.resources)
        api_key_id, value = await api_keys.create(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            name=data.name,
            description=data.description,
            enabled=data.enabled,
            resources=data.resources,
            permissions=permissions,
            labels=data.labels or (),
            enforce_capacity=data.enforce_capacity,
            capacity_entries=wire_capacity.capacity_entries(data.capacity),
            amounts=wire_capacity.amounts(data.capacity),
            expires_at=data.expires_at,
            created_by=caller.actor_id,
        )
        made = await _key(conn, caller, api_key_id)
    log.info("key.created", api_key=api_key_id, by=caller.actor_id)
    return created(wire_access.api_key_body(made, value=value))


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}",
    action="api-key:list",
    summary="List API keys",
    description="Newest first. A further page begins with the last id of this one as cursor.",
    responses={200: Answer(list[wire_access.ApiKeyBody], description="Keys, masked")},
)
async def list_keys(
    context: Given,
    caller: Caller,
    cursor: Annotated[str | None, QueryParameter(description="apiKeyId of the last one")] = None,
) -> Response[bytes]:
    require_everything(caller, "list API keys")
    try:
        before = None if cursor is None else UUID(cursor)
    except ValueError:
        raise ValidationError([Problem(path="cursor", message="must be an apiKeyId")]) from None
    async with context.db.connection() as conn:
        found = await api_keys.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            before=before,
            most=_MOST,
        )
    return answer([wire_access.api_key_body(key) for key in found])


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}",
    action="api-key:get",
    summary="Read an API key",
    responses={200: Answer(wire_access.ApiKeyBody, description="The key, masked")},
)
async def read_key(context: Given, caller: Caller, api_key_id: ApiKeyId) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "read other API keys")
    async with context.db.connection() as conn:
        found = await _key(conn, caller, api_key_id)
    return answer(wire_access.api_key_body(found))


@get(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}/capacity-usage",
    action="api-key:get",
    summary="Where the limits of an API key stand",
    responses={200: Answer(wire_capacity.CapacityUsage, description="Scopes and their limits")},
)
async def key_usage(context: Given, caller: Caller, api_key_id: ApiKeyId) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "read other API keys")
    async with context.db.connection() as conn:
        await _key(conn, caller, api_key_id)
        scope_ids = await capacity.api_key_scopes(
            conn, workspace_id=caller.workspace_id, api_key_id=api_key_id
        )
        found = await usage(context, conn, caller, scope_ids)
    return answer(found)


@dataclass
class KeyChange(Operation):
    """Documents the body of a change, which is read by hand."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields(
                [],
                name=described.text,
                enabled=described.flag,
                expiresAt=described.moment,
                resources=described.texts,
                permissions=described.texts,
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
    action="api-key:update",
    summary="Change an API key",
    description=CHANGED,
    status_code=200,
    operation_class=KeyChange,
    responses={
        200: Answer(wire_access.ApiKeyBody, description="The key, masked"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        403: Answer(ErrorBody, description="It would do more than whoever changes it may"),
    },
)
async def change_key(
    request: AnyRequest, context: Given, caller: Caller, api_key_id: ApiKeyId
) -> Response[bytes]:
    require_everything(caller, "change API keys")
    async with context.db.connection() as conn:
        await _key(conn, caller, api_key_id)
    wanted = wire.changes(wire_access.ApiKeyPatch, wire.object_of(await request.body()))
    async with context.db.transaction() as conn:
        await api_keys.lock(conn, workspace_id=caller.workspace_id, api_key_id=api_key_id)
        held = await _key(conn, caller, api_key_id)
        to = wanted.applied(held)
        if to.permissions != held.permissions:  # sent as they are shown, they are no change
            _permissions(caller, to.permissions)
        await _require_known(conn, caller, wanted.resources)
        resources = await api_keys.change(
            conn,
            to=to,
            by=caller.actor_id,
            amounts=amounts_of(wanted.model_fields_set, to.capacity),
        )
    ring(context, resources, api_key=api_key_id)
    async with context.db.connection() as conn:
        return answer(wire_access.api_key_body(await _key(conn, caller, api_key_id)))


@dataclass
class KeyRotation(Operation):
    """Documents the body of a rotation, which may be absent."""

    def __post_init__(self) -> None:
        self.request_body = described.body(
            described.fields([], overlapSeconds=described.whole(0, 30 * 24 * 3600)),
            hour=Example(summary="Both values open for an hour", value={"overlapSeconds": 3600}),
        )
        self.request_body.required = False


@post(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}/rotate",
    action="api-key:rotate",
    summary="Give an API key a new value",
    description="The new value is shown in this answer only (apiKeyValue). The value of before opens for"
    " overlapSeconds more, at most 30 days; without them it opens nothing from now on.",
    status_code=200,
    operation_class=KeyRotation,
    responses={
        200: Answer(wire_access.ApiKeyBody, description="The key, with its new value"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
        403: Answer(ErrorBody, description="It may do more than whoever rotates it"),
    },
)
async def rotate_key(
    request: AnyRequest, context: Given, caller: Caller, api_key_id: ApiKeyId
) -> Response[bytes]:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "rotate other API keys")
    async with context.db.connection() as conn:
        await _key(conn, caller, api_key_id)
    body = await request.body()
    said = wire.object_of(body) if body.strip() else {}
    given = wire.changes(wire_access.Rotation, said) if said else wire_access.Rotation()
    async with context.db.transaction() as conn:
        await api_keys.lock(conn, workspace_id=caller.workspace_id, api_key_id=api_key_id)
        held = await _key(conn, caller, api_key_id)
        require_grantable(caller, held.permissions)
        value = await api_keys.rotate(
            conn,
            workspace_id=caller.workspace_id,
            api_key_id=api_key_id,
            overlap_s=given.overlap_seconds,
            by=caller.actor_id,
        )
        found = await _key(conn, caller, api_key_id)
    log.info("key.rotated", api_key=api_key_id, by=caller.actor_id)
    return answer(wire_access.api_key_body(found, value=value))


@delete(
    "/api-key/{workspaceId:str}/{environmentId:str}/{apiKeyId:str}",
    action="api-key:delete",
    summary="Delete an API key",
    description="It opens nothing from now on. Batches that it made go on within its limits and still"
    " name it as their creator.",
    status_code=204,
)
async def delete_key(context: Given, caller: Caller, api_key_id: ApiKeyId) -> None:
    if api_key_id != caller.api_key_id:
        require_everything(caller, "delete other API keys")
    async with context.db.transaction() as conn:
        deleted = await api_keys.delete(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            api_key_id=api_key_id,
            by=caller.actor_id,
        )
    if not deleted:
        raise _unknown(api_key_id)
    log.info("key.deleted", api_key=api_key_id, by=caller.actor_id)


def _permissions(caller: Principal, given: Sequence[str] | None) -> Sequence[str]:
    """What a key may do from now on. Raises ForbiddenError when its maker may not say so."""
    if given is None:
        if caller.role is None:
            return caller.permissions
        return access.EVERYTHING if caller.may("api-key:permit") else access.MEMBERS_KEY
    if not caller.may("api-key:permit"):
        raise ForbiddenError(
            "You may not say what an API key may do (api-key:permit); leave permissions out, or ask an"
            " owner of the workspace.",
            code="NOT_AUTHORIZED",
        )
    require_grantable(caller, given)
    return given


async def _require_known(conn: Connection, key: Principal, resources: Sequence[str]) -> None:
    """Refuse ids in an allowlist that are no resources of the environment."""
    for each in resources:
        if each == "*":
            continue
        found = await tenants.resource(
            conn,
            workspace_id=key.workspace_id,
            environment_id=key.environment_id,
            resource_id=UUID(each),
        )
        if found is None:
            raise NotFoundError(f"AI Resource {each} not found", code="AI_RESOURCE_NOT_FOUND")


async def _key(conn: Connection, caller: Principal, api_key_id: UUID) -> ApiKey:
    found = await api_keys.get(
        conn,
        workspace_id=caller.workspace_id,
        environment_id=caller.environment_id,
        api_key_id=api_key_id,
    )
    if found is None:
        raise _unknown(api_key_id)
    return found


def _unknown(api_key_id: UUID) -> NotFoundError:
    return NotFoundError(f"API key {api_key_id} not found", code="API_KEY_NOT_FOUND")


@get(
    "/whoami",
    action=ANYONE,
    summary="Who is calling",
    description="A key with the environment that it opens, or a user.",
    dependencies={"visitor": Provide(visitor)},
    responses={200: Answer(wire_access.WhoAmI, description="The caller")},
)
async def whoami(visitor: Visiting) -> Response[bytes]:
    if visitor.user is not None:
        return answer(wire_access.user_who_am_i(visitor.user))
    assert visitor.key is not None
    return answer(wire_access.key_who_am_i(visitor.key))


router = Router(
    "/v1",
    route_handlers=[
        create_key,
        list_keys,
        read_key,
        key_usage,
        change_key,
        rotate_key,
        delete_key,
        whoami,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    request_max_body_size=MOST_BODY,
    tags=["API keys"],
)
