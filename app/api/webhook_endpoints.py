"""``/v1/webhook_endpoints`` and ``/v1/webhook_event_types``, as OpenAI's SDK speaks them.

The tenant is the caller's key's workspace and environment. An endpoint is told of the end of every batch
of its environment, whichever API made it.
"""

from typing import Annotated, Final

from litestar import Response, Router, delete, get, post
from litestar.di import Provide
from litestar.params import JSONBody, PathParameter, QueryParameter

from app import batches, webhooks, workspaces
from app.access import Principal
from app.addresses import Guard
from app.api import auth, query, wire, wire_webhooks
from app.api.auth import Caller, authenticate, require_everything
from app.api.context import Given
from app.api.described import Answer
from app.api.errors import AnyRequest
from app.api.openai_wire import ErrorAnswer
from app.courier import Courier, Message
from app.db import Connection
from app.errors import NotFoundError, Problem, RequestError, SecretError, ValidationError
from app.ids import uuid7
from app.log import Log
from app.webhooks import EVENT_TYPES, Endpoint

log = Log("api")

EndpointId = Annotated[str, PathParameter(name="webhookEndpointId")]

#: One refusal that is described is taken for the shape of all of a route's; see documentation.
WRONG: Final = Answer(ErrorAnswer, description="Something is wrong with the request")

_MANAGE = "manage webhook endpoints"


@post(
    "/webhook_endpoints",
    action="webhook-endpoint:create",
    summary="Create a webhook endpoint",
    description="The answer is the only one, but for a rotation, that shows the signing secret.",
    status_code=200,
    responses={
        200: Answer(wire_webhooks.EndpointBody, description="The endpoint and its secret"),
        400: WRONG,
    },
)
async def create(
    context: Given, caller: Caller, data: JSONBody[wire_webhooks.EndpointCreate]
) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    _check_url(context.settings.callback_guard, data.url)
    new, secret = webhooks.standing(
        context.keyring,
        workspace_id=caller.workspace_id,
        environment_id=caller.environment_id,
        name=data.name,
        url=data.url,
        event_types=data.event_types,
    )
    async with context.db.transaction() as conn:
        await workspaces.hold_environment(
            conn, workspace_id=caller.workspace_id, environment_id=caller.environment_id
        )
        await webhooks.add(conn, new)
    log.info("settings.changed", endpoint=new.endpoint_id)
    async with context.db.connection() as conn:
        made = await _found(conn, caller, wire_webhooks.wire_endpoint_id(new.endpoint_id))
    return _answer(wire_webhooks.endpoint_body(made, secret=secret))


@get(
    "/webhook_endpoints",
    action="webhook-endpoint:list",
    summary="List webhook endpoints",
    description="Newest first.",
    responses={
        200: Answer(wire_webhooks.EndpointsPage, description="A page of endpoints"),
        400: WRONG,
    },
)
async def list_endpoints(
    *,
    context: Given,
    caller: Caller,
    after: Annotated[
        str | None, QueryParameter(description="id of the last one of the page before")
    ] = None,
    limit: Annotated[str | None, QueryParameter(description="1 to 100; default 20")] = None,
) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    most = query.number(limit, "limit", default=20, least=1, most=100)
    before = None if after is None else wire_webhooks.parsed_endpoint_id(after)
    if after is not None and before is None:
        raise query.refuse("after", "must be the id of an endpoint")
    async with context.db.connection() as conn:
        rows = await webhooks.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            before=before,
            most=most + 1,
        )
    shown = [wire_webhooks.endpoint_body(row) for row in rows[:most]]
    return _answer(
        wire_webhooks.EndpointsPage(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(rows) > most,
        )
    )


@get(
    "/webhook_endpoints/{webhookEndpointId:str}",
    action="webhook-endpoint:get",
    summary="Read a webhook endpoint",
    responses={
        200: Answer(wire_webhooks.EndpointBody, description="The endpoint"),
        400: WRONG,
    },
)
async def read(context: Given, caller: Caller, endpoint_id: EndpointId) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    async with context.db.connection() as conn:
        found = await _found(conn, caller, endpoint_id)
    return _answer(wire_webhooks.endpoint_body(found))


@post(
    "/webhook_endpoints/{webhookEndpointId:str}",
    action="webhook-endpoint:update",
    summary="Change a webhook endpoint",
    description="What is absent stays. One that was disabled is told of what happens from now on.",
    status_code=200,
    responses={
        200: Answer(wire_webhooks.EndpointBody, description="The endpoint, changed"),
        400: WRONG,
    },
)
async def change(
    context: Given,
    caller: Caller,
    endpoint_id: EndpointId,
    data: JSONBody[wire_webhooks.EndpointPatch],
) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    given = data.model_fields_set
    if "url" in given:
        _check_url(context.settings.callback_guard, data.url)
    async with context.db.transaction() as conn:
        held = await _held(conn, caller, endpoint_id)
        await webhooks.change(
            conn,
            held=held,
            name=data.name if "name" in given else held.name,
            url=data.url if "url" in given else held.url,
            event_types=data.event_types if "event_types" in given else held.event_types,
        )
    log.info("settings.changed", endpoint=held.endpoint_id)
    async with context.db.connection() as conn:
        found = await _found(conn, caller, endpoint_id)
    return _answer(wire_webhooks.endpoint_body(found))


@delete(
    "/webhook_endpoints/{webhookEndpointId:str}",
    action="webhook-endpoint:delete",
    summary="Delete a webhook endpoint",
    description="What waits to be sent to it is given up; what was sent stays on record.",
    status_code=200,
    responses={
        200: Answer(wire_webhooks.EndpointDeleted, description="It is gone"),
        400: WRONG,
    },
)
async def remove(context: Given, caller: Caller, endpoint_id: EndpointId) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    async with context.db.transaction() as conn:
        held = await _held(conn, caller, endpoint_id)
        await webhooks.delete(conn, held=held)
    log.info("settings.changed", endpoint=held.endpoint_id)
    return _answer(wire_webhooks.EndpointDeleted(id=endpoint_id))


@post(
    "/webhook_endpoints/{webhookEndpointId:str}/rotate_secret",
    action="webhook-endpoint:rotate",
    summary="Give a webhook endpoint a new secret",
    description="With keep_old_secret_active_for_24_hours messages carry both signatures for a day.",
    status_code=200,
    responses={
        200: Answer(wire_webhooks.EndpointBody, description="The endpoint and its secret"),
        400: WRONG,
    },
)
async def rotate_secret(
    request: AnyRequest, context: Given, caller: Caller, endpoint_id: EndpointId
) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    body = await request.body()
    given = wire.object_of(body) if body else {}
    wanted = wire_webhooks.rotation(given)
    overlap_s = webhooks.OVERLAP_S if wanted.keep_old_secret_active_for_24_hours else 0.0
    async with context.db.transaction() as conn:
        held = await _held(conn, caller, endpoint_id)
        secret = await webhooks.rotate(conn, context.keyring, held=held, overlap_s=overlap_s)
    log.info("settings.changed", endpoint=held.endpoint_id)
    async with context.db.connection() as conn:
        found = await _found(conn, caller, endpoint_id)
    return _answer(wire_webhooks.endpoint_body(found, secret=secret))


@post(
    "/webhook_endpoints/{webhookEndpointId:str}/test",
    action="webhook-endpoint:test",
    summary="Send a sample event to a webhook endpoint",
    description="Now, once, of a batch that there is not. Its answer's status is told.",
    status_code=200,
    responses={
        200: Answer(wire_webhooks.EndpointTested, description="What the receiver answered"),
        400: Answer(ErrorAnswer, description="There was no answer"),
    },
)
async def test(
    context: Given,
    caller: Caller,
    endpoint_id: EndpointId,
    data: JSONBody[wire_webhooks.EndpointTest],
) -> Response[bytes]:
    require_everything(caller, _MANAGE)
    async with context.db.connection() as conn:
        found = await _found(conn, caller, endpoint_id)
        now = await batches.clock(conn)
    try:
        known = webhooks.open_(context.keyring, found)
    except SecretError as error:
        log.warning("secret.unreadable", endpoint=found.endpoint_id, reason=str(error))
        raise RequestError(
            "The endpoint's secret cannot be opened any more; give it a new one (rotate_secret).",
            code="SECRET_UNREADABLE",
        ) from None
    event_id = f"evt_{uuid7().hex}"
    courier = Courier(
        guard=context.settings.callback_guard,
        timeout_s=context.settings.delivery_timeout_s,
        most=1,
    )
    try:
        receipt = await courier.post(
            Message(
                url=found.url,
                message_id=event_id,
                body=wire_webhooks.sample_body(event_id, data.event_type, now),
                secrets=[known.secret],
            )
        )
    finally:
        await courier.close()
    if receipt.status_code is None:
        raise RequestError(
            f"The test event was not answered: {receipt.error_message}",
            code="WEBHOOK_TEST_FAILED",
            details={"errorCode": receipt.error_code},
        )
    return _answer(
        wire_webhooks.EndpointTested(
            event_type=data.event_type,
            status_code=receipt.status_code,
            webhook_endpoint_id=endpoint_id,
        )
    )


@get(
    "/webhook_event_types",
    action="webhook-endpoint:list",
    summary="List the types of webhook events",
    responses={200: Answer(wire_webhooks.EventTypes, description="The types"), 400: WRONG},
)
async def event_types(caller: Caller) -> Response[bytes]:
    del caller  # any key may read this
    return _answer(wire_webhooks.EventTypes(data=list(EVENT_TYPES)))


def _check_url(guard: Guard, url: str) -> None:
    if (problem := guard.problem(url)) is not None:
        raise ValidationError([Problem(path="url", message=problem)])


async def _found(conn: Connection, key: Principal, text: str) -> Endpoint:
    endpoint_id = wire_webhooks.parsed_endpoint_id(text)
    found = None
    if endpoint_id is not None:
        found = await webhooks.endpoint(
            conn,
            workspace_id=key.workspace_id,
            environment_id=key.environment_id,
            endpoint_id=endpoint_id,
        )
    if found is None or found.batch_id is not None:
        raise NotFoundError(
            f"Webhook endpoint {text[:100]} not found", code="WEBHOOK_ENDPOINT_NOT_FOUND"
        )
    return found


async def _held(conn: Connection, key: Principal, text: str) -> Endpoint:
    """The same, locked until the commit."""
    found = await _found(conn, key, text)
    held = await webhooks.hold(conn, workspace_id=key.workspace_id, endpoint_id=found.endpoint_id)
    return held or await _found(conn, key, text)


def _answer(body: object) -> Response[bytes]:
    return Response(wire.encode(body), media_type="application/json")


router = Router(
    "/v1",
    route_handlers=[
        create,
        list_endpoints,
        read,
        change,
        remove,
        rotate_secret,
        test,
        event_types,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(auth.caller)},
    tags=["Webhooks"],
)
