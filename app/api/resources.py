"""``/v1/ai-resource``.

Only a key for all resources may create, change, delete or test these; a confined one sees its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, delete, get, post, route
from litestar.di import Provide
from litestar.openapi.spec import Example, Operation
from litestar.params import Body, PathParameter, QueryParameter

from app import api_keys, capacity, connections, forecast, resources
from app.access import Principal
from app.api import described, query, wire, wire_capacity, wire_connections, wire_resources
from app.api.auth import (
    Caller,
    authenticate,
    require_everything,
    require_resources,
    tenant_caller,
)
from app.api.connections import Cursor, Force, Limit, connection_for, tested
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
    shows,
    unique,
    usage,
)
from app.api.wire_resources import ResourcePatch
from app.connections import ProviderConnection
from app.db import Connection
from app.errors import NotFoundError, Problem, ValidationError
from app.resources import ModelAt, Resource

ResourceId = Annotated[UUID, PathParameter(name="resourceId")]

_EXAMPLE: Final = Example(
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
_FALLBACK_EXAMPLE: Final = Example(
    summary="Long prompts go elsewhere, and another account helps out",
    value={
        "name": "assistant",
        "model": {"model": "small", "connectionId": "0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d11"},
        "useFallback": True,
        "fallbackModels": [
            {"model": "large", "connectionId": "0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d12"}
        ],
        "fallbackOn": {"exhausted": True, "statusCodes": [401, 403, 404], "throttledMs": 60000},
        "routing": {
            "conditions": [
                {
                    "if": [{"expression": "tokens.input", "comparator": "GT", "value": 8000}],
                    "action": "CALL_MODEL",
                    "then": {
                        "model": "large",
                        "connectionId": "0199d3f2-7c1e-7a52-b6a1-3f4f0c3a9d12",
                    },
                }
            ]
        },
    },
)


@post(
    "/ai-resource/{workspaceId:str}/{environmentId:str}",
    action="ai-resource:create",
    summary="Create a resource",
    status_code=201,
    responses={
        201: Answer(wire_resources.ResourceBody, description="The resource"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def create_resource(
    context: Given,
    caller: Caller,
    data: Annotated[wire_resources.ResourceCreate, Body(examples=[_EXAMPLE, _FALLBACK_EXAMPLE])],
) -> Response[bytes]:
    require_everything(caller, "create resources")
    _require_rules(data)
    async with context.db.transaction() as conn:
        await _require_models(conn, caller, data, own=data.model.at)
        with unique("resources_name_unique", data.name, "AI_RESOURCE_ALREADY_EXISTS"):
            resource_id = await resources.create(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                connection_id=data.model.connection_id,
                name=data.name,
                model=data.model.model,
                description=data.description,
                default_args=data.default_args,
                capacity_entries=wire_capacity.capacity_entries(data.capacity),
                amounts=wire_capacity.amounts(data.capacity),
                enforce_capacity=data.enforce_capacity is not False,
                timeout_ms=data.timeout_ms,
                concurrency=data.concurrency,
                choices=data.choices(),
                created_by=caller.actor_id,
            )
        await _assign(conn, caller, resource_id, data.assign_api_keys or [])
        made = await _bodies(context, conn, caller, [await resource_for(conn, caller, resource_id)])
    return created(made[0])


async def _assign(
    conn: Connection, key: Principal, resource_id: UUID, api_key_ids: Sequence[UUID]
) -> None:
    """Let keys use a resource. Raises NotFoundError naming those that there are not."""
    if not api_key_ids:
        return
    allowed = await api_keys.allow(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        resource_id=resource_id,
        api_key_ids=api_key_ids,
    )
    missing = sorted({str(i) for i in api_key_ids} - {str(i) for i in allowed})
    if missing:
        raise NotFoundError(
            f"API keys not found: {', '.join(missing[:20])}", code="API_KEY_NOT_FOUND"
        )


@get(
    "/ai-resource/{workspaceId:str}/{environmentId:str}",
    action="ai-resource:list",
    summary="List resources",
    description="Oldest first; a confined key sees those that it may use.",
    responses={200: Answer(wire_resources.ResourcesBody, description="A page of resources")},
)
async def list_resources(
    *,
    context: Given,
    caller: Caller,
    connection_id: Annotated[
        UUID | None,
        QueryParameter(name="connectionId", description="only those on this connection"),
    ] = None,
    name: Annotated[str | None, QueryParameter(description="only that of this name")] = None,
    limit: Limit = None,
    cursor: Cursor = None,
) -> Response[bytes]:
    most = query.number(limit, "limit", default=100, least=1, most=MOST_PAGE)
    everything = "*" in caller.resources
    async with context.db.connection() as conn:
        rows = await resources.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            after=cursor_of(cursor),
            connection_id=connection_id,
            name=name,
            among=None if everything else [UUID(each) for each in caller.resources],
            most=most,
        )
        found = await _bodies(context, conn, caller, rows)
    return answer(
        wire_resources.ResourcesBody(
            data=found,
            next_cursor=str(rows[-1].resource_id) if len(rows) == most else None,
        )
    )


@get(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}",
    action="ai-resource:get",
    summary="Read a resource",
    responses={200: Answer(wire_resources.ResourceBody, description="The resource")},
)
async def read_resource(context: Given, caller: Caller, resource_id: ResourceId) -> Response[bytes]:
    async with context.db.connection() as conn:
        require_resources(caller, [resource_id])
        found = await resource_for(conn, caller, resource_id)
        bodies = await _bodies(context, conn, caller, [found])
    return answer(bodies[0])


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
        await resource_for(conn, caller, resource_id)
        scope_ids = await capacity.resource_scopes(
            conn, workspace_id=caller.workspace_id, resource_id=resource_id
        )
        found = await usage(context, conn, caller, scope_ids)
    return answer(found)


@dataclass
class ResourceChange(Operation):
    """Documents the body of a change, which is read by hand."""

    def __post_init__(self) -> None:
        model = described.fields(
            ["model", "connectionId"],
            model=described.text,
            connectionId=described.text,
            provider=described.text,
        )
        self.request_body = described.body(
            described.fields(
                [],
                name=described.text,
                model=model,
                capacity=described.capacity(),
                enforceCapacity=described.flag,
                concurrency=described.whole(1, 1_000_000),
                timeoutMs=described.whole(100, 600_000),
                description=described.text,
                defaultArgs=described.record,
                useFallback=described.flag,
                fallbackModels=described.several(model),
                fallbackOn=described.record,
                secondaryModels=described.several(model),
                routing=described.record,
                assignApiKeys=described.texts,
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
    description=f"{CHANGED} Batches know the fallbacks and rules of the time they were created.",
    status_code=200,
    operation_class=ResourceChange,
    responses={
        200: Answer(wire_resources.ResourceBody, description="The resource, changed"),
        400: Answer(ErrorBody, description="Something is wrong with the request"),
    },
)
async def change_resource(
    request: AnyRequest, context: Given, caller: Caller, resource_id: ResourceId
) -> Response[bytes]:
    require_everything(caller, "change resources")
    async with context.db.connection() as conn:
        before = await resource_for(conn, caller, resource_id)
    wanted = wire.changes(ResourcePatch, wire.object_of(await request.body()))
    _require_rules(wanted)
    named = {each.at.connection_id for _, each in wanted.models()}
    targets = {each.connection_id for each in wanted.rules()[0].targets}
    async with context.db.transaction() as conn:
        await resources.lock(
            conn,
            workspace_id=caller.workspace_id,
            resource_id=resource_id,
            connection_ids={before.connection_id} | named | targets,
        )
        held = await resource_for(conn, caller, resource_id)
        to = wanted.applied(held)
        await _require_models(conn, caller, wanted, own=to.at)
        alternates = {
            each.resource_id: each
            for each in await resources.alternates(
                conn, workspace_id=caller.workspace_id, owner_ids=[resource_id]
            )
        }
        with unique("resources_name_unique", to.name, "AI_RESOURCE_ALREADY_EXISTS"):
            woken = await resources.change(
                conn,
                held=held,
                to=to,
                choices=wanted.choices(held, alternates),
                amounts=amounts_of(wanted.model_fields_set, to.capacity),
                updated_by=caller.actor_id,
            )
        await _assign(conn, caller, resource_id, wanted.assign_api_keys or [])
    ring(context, woken, resource=resource_id)
    async with context.db.connection() as conn:
        changed = await resource_for(conn, caller, resource_id)
        bodies = await _bodies(context, conn, caller, [changed])
    return answer(bodies[0])


@delete(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}",
    action="ai-resource:delete",
    summary="Delete a resource",
    description="Refused (409) while batches that use it are open; ?force=true cancels them. It is "
    "taken out of the allowlists of keys. What was answered stays readable.",
    status_code=204,
    responses={409: Answer(ErrorBody, description="Batches are open; details names them")},
)
async def delete_resource(
    context: Given, caller: Caller, resource_id: ResourceId, force: Force = None
) -> None:
    require_everything(caller, "delete resources")
    forced = query.switch(force, "force", default=False)
    async with context.db.transaction() as conn:
        await resource_for(conn, caller, resource_id)
        cancelled = await resources.delete(
            conn, workspace_id=caller.workspace_id, resource_id=resource_id, force=forced
        )
    ring(context, [], resource=resource_id)
    ring_cancelled(context, cancelled)


@post(
    "/ai-resource/{workspaceId:str}/{environmentId:str}/{resourceId:str}/test",
    action="ai-resource:test",
    summary="Test a resource",
    description="Makes one small call with its model and arguments, beside the queue and counted by "
    "no limit, and says what is wrong. ?fallback=0 tests the first of its fallbacks instead.",
    status_code=200,
    responses={200: Answer(wire_connections.TestBody, description="What was found")},
)
async def try_resource(
    context: Given,
    caller: Caller,
    resource_id: ResourceId,
    fallback: Annotated[
        str | None, QueryParameter(description="place of a fallback, from 0")
    ] = None,
) -> Response[bytes]:
    require_everything(caller, "test resources")
    async with context.db.connection() as conn:
        found = await resource_for(conn, caller, resource_id)
        asked = resource_id
        if fallback is not None:
            most = len(found.fallback_ids) - 1
            if most < 0:
                raise ValidationError([Problem(path="fallback", message="there is none")])
            place = query.number(fallback, "fallback", default=0, least=0, most=most)
            asked = found.fallback_ids[place]
        where = await connections.route(conn, workspace_id=caller.workspace_id, resource_id=asked)
    assert where is not None  # its resource was there, on this very connection
    return answer(await tested(context, where))


def _require_rules(wanted: ResourcePatch) -> None:
    """Refuse rules with mistakes, each named by its path."""
    _, problems = wanted.rules()
    if problems:
        raise ValidationError(problems)


async def _require_models(
    conn: Connection, key: Principal, wanted: ResourcePatch, *, own: ModelAt
) -> None:
    """Refuse models that their connections do not have or allow, and alternates that are none."""
    known: dict[UUID, ProviderConnection] = {}
    problems: list[Problem] = []
    seen: set[tuple[str, ModelAt]] = set()
    models = [(path, each.at, each.provider) for path, each in wanted.models()]
    for target in wanted.rules()[0].targets:
        at = ModelAt(model=target.model, connection_id=target.connection_id)
        models.append(("routing", at, target.provider))
    for path, at, provider in models:
        on = known.get(at.connection_id)
        if on is None:
            on = known[at.connection_id] = await connection_for(conn, key, at.connection_id)
        if not on.allows(at.model):
            problems.append(
                Problem(
                    path=f"{path}.model", message="is not one of the connection's allowedModels"
                )
            )
        if provider not in (None, on.provider):
            problems.append(
                Problem(
                    path=f"{path}.provider",
                    message=f"differs from the connection's, which is {on.provider}",
                )
            )
        if path.startswith("fallbackModels"):
            if at == own:
                problems.append(Problem(path=path, message="is the resource's own model"))
            if (path.partition("[")[0], at) in seen:
                problems.append(Problem(path=path, message="is listed twice"))
        seen.add((path.partition("[")[0], at))
    if problems:
        raise ValidationError(problems)


async def _bodies(
    context: Context, conn: Connection, key: Principal, found: Sequence[Resource]
) -> list[wire_resources.ResourceBody]:
    alternates = {
        each.resource_id: each
        for each in await resources.alternates(
            conn, workspace_id=key.workspace_id, owner_ids=[each.resource_id for each in found]
        )
    }
    bodies: list[wire_resources.ResourceBody] = []
    for each in found:
        taught = await capacity.learned(
            conn,
            workspace_id=key.workspace_id,
            connection_id=each.connection_id,
            resource_id=each.resource_id,
        )
        waiting = await forecast.of_resource(
            conn,
            workspace_id=key.workspace_id,
            resource_id=each.resource_id,
            clockwork=context.clockwork,
        )
        if waiting is not None and waiting.scope is not None and not shows(key, waiting.scope):
            waiting = replace(waiting, scope=None, limit=None)
        bodies.append(wire_resources.resource_body(each, alternates, taught, waiting))
    return bodies


async def resource_for(conn: Connection, key: Principal, resource_id: UUID) -> Resource:
    """A resource of the caller's environment. Raises NotFoundError."""
    found = await resources.get(
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
        create_resource,
        list_resources,
        read_resource,
        change_resource,
        delete_resource,
        try_resource,
        resource_usage,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    request_max_body_size=MOST_BODY,
    tags=["Resources"],
)
