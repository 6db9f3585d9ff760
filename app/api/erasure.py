"""Erasing prompts and answers of what has ended; its facts stay."""

from typing import Final

from litestar import Response, delete

from app import batches, items, retention
from app.api import query, wire, wire_batches
from app.api.auth import Caller, batch_for
from app.api.context import Given
from app.api.described import Answer
from app.api.errors import ErrorBody
from app.errors import ConflictError, NotFoundError
from app.ids import item_seq
from app.log import Log
from app.retention import Going

log = Log("api")

#: Transactions of an erasure that its caller waits for; maintenance does the rest.
_STEPS: Final = 20


@delete(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/texts",
    action="completion-batch:erase",
    summary="Erase a batch's prompts and answers",
    description="For good. Counts, tokens, costs and errors stay; request and response read null. Of a "
    "large batch the last of them follow within minutes.",
    status_code=200,
    responses={
        200: Answer(wire_batches.BatchBody, description="The batch, without texts"),
        409: Answer(ErrorBody, description="It has not ended yet"),
    },
)
async def erase_batch(context: Given, caller: Caller, batch_id: query.BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    if not batch.is_finished:
        raise ConflictError(
            f"Completion Batch {batch_id} has not ended; cancel it first, or wait.",
            code="BATCH_NOT_ENDED",
        )
    async with context.db.transaction() as conn:
        await retention.request_erasure(conn, workspace_id=caller.workspace_id, batch_id=batch_id)
    going = Going(workspace_id=caller.workspace_id, batch_day=batch.batch_day, batch_id=batch_id)
    await retention.erase_batch(context.db, batch=going, most_steps=_STEPS)
    log.info("batch.erased", batch=batch_id)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
    return Response(wire.encode(wire_batches.batch_body(batch)), media_type="application/json")


@delete(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/{itemId:str}/texts",
    action="completion-batch:erase",
    summary="Erase an item's prompt and answer",
    description="For good. Its facts stay; request and response read null.",
    status_code=200,
    responses={
        200: Answer(wire_batches.ItemBody, description="The item, without texts"),
        409: Answer(ErrorBody, description="It has not ended yet"),
    },
)
async def erase_item(
    *, context: Given, caller: Caller, batch_id: query.BatchId, item_id: query.ItemId
) -> Response[bytes]:
    async with context.db.transaction() as conn:
        batch = await batch_for(conn, caller, batch_id)
        seq = item_seq(batch_id, item_id)
        found = [] if seq is None else await items.numbered(conn, batch=batch, seqs=[seq])
        if not found:
            raise NotFoundError(
                f"Completion Batch Item {item_id} not found", code="COMPLETION_BATCH_ITEM_NOT_FOUND"
            )
        if found[0].status not in batches.TERMINAL:
            raise ConflictError(
                f"Completion Batch Item {item_id} has not ended; its request may still be sent.",
                code="ITEM_NOT_ENDED",
            )
        await retention.erase_items(
            conn,
            workspace_id=caller.workspace_id,
            batch_day=batch.batch_day,
            batch_id=batch_id,
            seqs=[found[0].seq],
        )
        found = await items.numbered(conn, batch=batch, seqs=[found[0].seq])
    log.info("batch.erased", batch=batch_id, item=item_id)
    body = wire_batches.item_body(batch, found[0])
    return Response(wire.encode(body), media_type="application/json")
