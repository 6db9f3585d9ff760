"""``/v1/completion-batch/…/deliveries``: what was told of a batch, to whom, and telling it again."""

from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, get, post
from litestar.di import Provide
from litestar.params import PathParameter, QueryParameter

from app import webhooks
from app.api import query, wire, wire_webhooks
from app.api.auth import Caller, authenticate, batch_for, tenant_caller
from app.api.context import Context, Given
from app.api.described import Answer
from app.api.errors import ErrorBody
from app.batches import Batch
from app.doorbell import EVENTS
from app.errors import ConflictError, NotFoundError
from app.log import Log
from app.webhooks import Status

log = Log("api")

_FIRST: Final = (-1, UUID(int=0))


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/deliveries",
    action="completion-batch:get",
    summary="List a batch's deliveries",
    description="To its callback and to the webhooks of its environment, in the order of the events, "
    "with every try.",
    responses={200: Answer(wire_webhooks.DeliveriesPage, description="A page of deliveries")},
)
async def list_deliveries(
    *,
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    status: Annotated[
        str | None, QueryParameter(description="only those PENDING, DELIVERED or DEAD")
    ] = None,
    limit: query.Limit = None,
    cursor: query.Cursor = None,
) -> Response[bytes]:
    most = query.number(limit, "limit", default=100, least=1, most=1000)
    after = _FIRST if cursor is None else _position(cursor)
    wanted = _status(status)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        rows = await webhooks.deliveries(
            conn,
            workspace_id=caller.workspace_id,
            batch_id=batch.batch_id,
            batch_day=batch.batch_day,
            after=after,
            status=wanted,
            most=most,
        )
    page = wire_webhooks.DeliveriesPage(
        data=[wire_webhooks.delivery_body(row) for row in rows],
        next_cursor=wire_webhooks.delivery_id(rows[-1]) if len(rows) == most else None,
    )
    return Response(wire.encode(page), media_type="application/json")


def _position(cursor: str) -> tuple[int, UUID]:
    found = wire_webhooks.parsed_delivery_id(cursor)
    if found is None:
        raise query.refuse("cursor", "must be a nextCursor of this list")
    return found[1], found[0]


def _status(value: str | None) -> Status | None:
    match value and value.lower():
        case None | "":
            return None
        case "pending" | "delivered" | "dead" as known:
            return known
        case _:
            raise query.refuse("status", "must be PENDING, DELIVERED or DEAD")


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/deliveries/{deliveryId:str}/redeliver",
    action="completion-batch:update",
    summary="Deliver again",
    description="Whatever became of it, with the same webhook-id and a fresh schedule of tries. An "
    "endpoint that was disabled is enabled.",
    status_code=200,
    responses={
        200: Answer(wire_webhooks.Redelivered, description="It is tried again now"),
        404: Answer(ErrorBody, description="There is no such delivery"),
        409: Answer(ErrorBody, description="Its endpoint was deleted"),
    },
)
async def redeliver(
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    delivery_id: Annotated[str, PathParameter(name="deliveryId")],
) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    named = wire_webhooks.parsed_delivery_id(delivery_id)
    again = 0
    if named is not None:
        endpoint_id, event_no = named
        again = await _redeliver(context, batch, endpoint_id, event_no)
    if not again:
        raise NotFoundError(f"Delivery {delivery_id[:100]} not found", code="DELIVERY_NOT_FOUND")
    return _redelivered(context, batch, again)


@post(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/deliveries/redeliver",
    action="completion-batch:update",
    summary="Deliver all again that were given up",
    description="Those of this batch that are DEAD, each with a fresh schedule of tries.",
    status_code=200,
    responses={200: Answer(wire_webhooks.Redelivered, description="They are tried again now")},
)
async def redeliver_dead(
    context: Given, caller: Caller, batch_id: query.BatchId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        endpoints = await webhooks.endpoints_of_dead(
            conn,
            workspace_id=batch.workspace_id,
            batch_id=batch.batch_id,
            batch_day=batch.batch_day,
        )
    again = 0
    for endpoint_id in endpoints:
        try:
            again += await _redeliver(context, batch, endpoint_id, None)
        except ConflictError:  # that endpoint was deleted; the others are not
            continue
    return _redelivered(context, batch, again)


async def _redeliver(
    context: Context, batch: Batch, endpoint_id: UUID, event_no: int | None
) -> int:
    """Let deliveries to one endpoint be tried again; how many. Raises ConflictError."""
    async with context.db.transaction() as conn:
        held = await webhooks.hold(conn, workspace_id=batch.workspace_id, endpoint_id=endpoint_id)
        if held is None or held.environment_id != batch.environment_id:
            raise ConflictError(
                "The endpoint of this delivery does not exist any more.",
                code="ENDPOINT_NOT_FOUND",
            )
        return await webhooks.redeliver(
            conn,
            held=held,
            batch_id=batch.batch_id,
            batch_day=batch.batch_day,
            event_no=event_no,
        )


def _redelivered(context: Context, batch: Batch, again: int) -> Response[bytes]:
    log.info("delivery.repeated", batch=batch.batch_id, deliveries=again)
    context.ringer.ring(EVENTS, [batch.batch_id])
    body = wire_webhooks.Redelivered(redelivered=again)
    return Response(wire.encode(body), media_type="application/json")


router = Router(
    "/v1/completion-batch",
    route_handlers=[list_deliveries, redeliver, redeliver_dead],
    guards=[authenticate],
    dependencies={"caller": Provide(tenant_caller)},
    tags=["Deliveries"],
)
