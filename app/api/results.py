"""The items of a batch: pages of them, one with its calls, and all results as a file.

Results are read some hundred at a time, each in a statement of its own, so that any number is
written in bounded memory and no snapshot is held while a slow client reads.
"""

import asyncio
import csv
import io
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, Final, Literal

from litestar import Response, get
from litestar.params import QueryParameter
from litestar.response import Stream

from app import items
from app.api import pages, query, wire, wire_batches
from app.api.auth import Caller, batch_for
from app.api.context import Context, Given
from app.api.described import Answer
from app.api.errors import AnyRequest
from app.api.wire_batches import ItemBody, Shape
from app.batches import Batch, Status
from app.errors import NotFoundError
from app.ids import item_seq
from app.intake import MOST_ITEMS
from app.items import Item, Only
from app.replies import answer_text

Format = Literal["jsonl", "csv"]

_ENDED: Final[tuple[Status, ...]] = ("completed", "failed", "cancelled")
_PAGE: Final = 500
_PAGE_BYTES: Final = 2 * 1024 * 1024
_GZIP: Final = 16 + zlib.MAX_WBITS
_MEDIA: Final = {
    "jsonl": "application/jsonl",
    "csv": "text/csv; header=present",
}
_COLUMNS: Final = (
    "index", "customId", "itemId", "status", "answer", "errorCode", "errorMessage", "statusCode",
    "model", "provider", "promptTokens", "outputTokens", "attempts", "startedAt", "completedAt",
    "response",
)  # fmt: skip
#: A cell that begins with one of these may be taken for a formula by a spreadsheet.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/items",
    action="completion-batch:get",
    summary="List a batch's items",
    description="In the order of submission, or against it (order=desc). A page of large items may "
    "hold fewer than its limit.",
    responses={200: Answer(wire_batches.ItemsPage, description="A page of items")},
)
async def list_items(
    *,
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    limit: query.Limit = None,
    cursor: query.Cursor = None,
    status: query.ItemStates = None,
    error_code: query.ErrorCodes = None,
    order: Annotated[str | None, QueryParameter(description="asc (the default) or desc")] = None,
    response_format: query.ResponseFormat = None,
) -> Response[bytes]:
    most = query.number(limit, "limit", default=100, least=1, most=1000)
    start = query.seq(cursor, "cursor")
    only = Only(
        statuses=query.statuses(status, "status"), codes=query.codes(error_code, "errorCode")
    )
    back = query.one_of(order, "order", ("asc", "desc")) == "desc"
    shape = Shape(bare=query.is_bare(response_format))
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        page = await pages.read(
            conn, batch, start=start, only=only, most=most, back=back, shape=shape
        )
    body = await asyncio.to_thread(
        wire.encode, wire_batches.ItemsPage(data=page.items, next_cursor=page.cursor)
    )
    return Response(body, media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/{itemId:str}",
    action="completion-batch:get",
    summary="Read an item",
    responses={200: Answer(wire_batches.ItemBody, description="The item")},
)
async def read_item(
    *,
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    item_id: query.ItemId,
    includes_attempts: Annotated[
        str | None, QueryParameter(name="includesAttempts", description="true: with its calls")
    ] = None,
    response_format: query.ResponseFormat = None,
) -> Response[bytes]:
    with_attempts = query.switch(includes_attempts, "includesAttempts", default=False)
    shape = Shape(bare=query.is_bare(response_format))
    batch, item, calls = await _item(
        context, caller, batch_id, item_id, with_attempts=with_attempts
    )
    body = wire_batches.item_body(batch, item, shape=shape, attempts=calls)
    return Response(wire.encode(body), media_type="application/json")


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/{itemId:str}/attempts",
    action="completion-batch:get",
    summary="List an item's calls",
    description="Every call to a provider, oldest first: the account and model, times, tokens, and "
    "how it ended. One that is out is RUNNING.",
    responses={200: Answer(wire_batches.AttemptsBody, description="Its calls")},
)
async def attempts(
    *, context: Given, caller: Caller, batch_id: query.BatchId, item_id: query.ItemId
) -> Response[bytes]:
    _, _, calls = await _item(context, caller, batch_id, item_id, with_attempts=True)
    body = wire_batches.AttemptsBody(data=[wire_batches.attempt_body(each) for each in calls or ()])
    return Response(wire.encode(body), media_type="application/json")


async def _item(
    context: Context,
    caller: Caller,
    batch_id: query.BatchId,
    item_id: query.ItemId,
    *,
    with_attempts: bool,
) -> tuple[Batch, Item, list[items.Attempt] | None]:
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        seq = item_seq(batch_id, item_id)
        found = [] if seq is None else await items.numbered(conn, batch=batch, seqs=[seq])
        if not found:
            raise NotFoundError(
                f"Completion Batch Item {item_id} not found", code="COMPLETION_BATCH_ITEM_NOT_FOUND"
            )
        calls = None
        if with_attempts:
            calls = await items.attempts(conn, batch=batch, seq=found[0].seq)
    return batch, found[0], calls


@get(
    "/{workspaceId:str}/{environmentId:str}/{batchId:str}/results",
    action="completion-batch:get",
    summary="Download a batch's results",
    description="What has ended so far, in the order of submission: as JSON lines, each an item, or "
    "as CSV (RFC 4180). x-sluice-complete says whether nothing is missing; if something is, "
    "x-sluice-next is the `after` that brings it later, with some of what was here already.",
    responses={
        200: Answer(str, description="Results", media_type="application/jsonl"),
    },
)
async def results(
    *,
    request: AnyRequest,
    context: Given,
    caller: Caller,
    batch_id: query.BatchId,
    file_format: Annotated[
        str | None, QueryParameter(name="format", description="jsonl (the default) or csv")
    ] = None,
    status: query.ItemStates = None,
    error_code: query.ErrorCodes = None,
    after: Annotated[
        str | None, QueryParameter(description="only items with a higher index than this")
    ] = None,
    includes_requests: Annotated[
        str | None, QueryParameter(name="includesRequests", description="JSON lines with requests")
    ] = None,
    escape_formulas: Annotated[
        str | None,
        QueryParameter(
            name="escapeFormulas",
            description="true: an apostrophe before CSV cells that spreadsheets take for formulas",
        ),
    ] = None,
    response_format: query.ResponseFormat = None,
) -> Stream:
    form: Format = query.one_of(file_format, "format", ("jsonl", "csv")) or "jsonl"
    only = Only(
        statuses=query.statuses(status, "status") or _ENDED,
        codes=query.codes(error_code, "errorCode"),
    )
    start = query.number(after, "after", default=-1, least=-1, most=MOST_ITEMS) + 1
    shape = Shape(
        has_request=query.switch(includes_requests, "includesRequests", default=False),
        bare=query.is_bare(response_format) or form == "csv",
    )
    escaped = query.switch(escape_formulas, "escapeFormulas", default=False)
    async with context.db.connection() as conn:
        batch = await batch_for(conn, caller, batch_id)
        first_open = None if batch.is_finished else await items.first_open(conn, batch=batch)
    headers = {
        "content-disposition": f'attachment; filename="{batch_id}.{form}"',
        "vary": "accept-encoding",
        "x-sluice-complete": "true" if first_open is None else "false",
    }
    if first_open is not None:
        headers["x-sluice-next"] = str(first_open - 1)
    write = _csv_writer(batch, escaped=escaped) if form == "csv" else _json_lines
    parts = _parts(context, batch, start=start, only=only, shape=shape, write=write)
    if _accepts_gzip(request):
        headers["content-encoding"] = "gzip"
        parts = _compressed(parts)
    return Stream(parts, media_type=_MEDIA[form], headers=headers)


Write = Callable[[Sequence[ItemBody]], bytes]


async def _parts(
    context: Context, batch: Batch, *, start: int, only: Only, shape: Shape, write: Write
) -> AsyncGenerator[bytes]:
    at: int | None = start
    head = write([])
    if head:
        yield head
    while at is not None:
        async with context.db.connection() as conn:
            page = await pages.read(
                conn, batch, start=at, only=only, most=_PAGE, shape=shape, most_bytes=_PAGE_BYTES
            )
        at = page.after
        if page.items:
            yield await asyncio.to_thread(write, page.items)


async def _compressed(parts: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    compressor = zlib.compressobj(level=1, wbits=_GZIP)
    async for part in parts:
        if some := await asyncio.to_thread(compressor.compress, part):
            yield some
    yield compressor.flush()


def _accepts_gzip(request: AnyRequest) -> bool:
    for offer in request.headers.get("accept-encoding", "").lower().split(","):
        coding, _, weight = offer.partition(";")
        if coding.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _json_lines(bodies: Sequence[ItemBody]) -> bytes:
    # A line break in JSON is only ever between its tokens: stored texts may have some there.
    lines = (wire.encode(body).replace(b"\r", b" ").replace(b"\n", b" ") for body in bodies)
    return b"".join(line + b"\n" for line in lines)


def _csv_writer(batch: Batch, *, escaped: bool) -> Write:
    told = False

    def write(bodies: Sequence[ItemBody]) -> bytes:
        nonlocal told
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        if not told:
            writer.writerow(_COLUMNS)
            told = True
        for body in bodies:
            cells = _cells(batch, body)
            writer.writerow([_harmless(cell) for cell in cells] if escaped else cells)
        return text.getvalue().encode("utf-8", "replace")

    return write


def _cells(batch: Batch, body: ItemBody) -> list[object]:
    response = "" if body.response is None else wire.encode(body.response).decode()
    details = body.error_details
    return [
        body.index,
        body.custom_id or "",
        body.item_id,
        body.status,
        answer_text(batch.endpoint, response) if response else "",
        body.error_code or "",
        body.error_message or "",
        "" if details is None or details.status_code is None else details.status_code,
        body.model or "",
        body.provider or "",
        body.prompt_tokens,
        body.output_tokens,
        body.attempts,
        body.started_at or "",
        body.completed_at or "",
        response,
    ]


def _harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
