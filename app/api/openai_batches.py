"""``/v1/batches`` as OpenAI has it, and what Sluice can do beyond it.

A batch made here is like any other: the routes of completion batches show it too, by the UUID that
its id is made of, from the moment that its file was found valid. Batches made there are shown here.
"""

import hashlib
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Final, cast
from uuid import UUID

import msgspec
from litestar import Response, Router, get, post
from litestar.di import Provide
from litestar.params import PathParameter, QueryParameter
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.alias_generators import to_snake

from app import (
    batches,
    capacity,
    forecast,
    inputs,
    prices,
    queue,
    quotas,
    results,
    submissions,
    validator,
)
from app.access import Principal
from app.api import openai_operations as operations
from app.api import openai_wire
from app.api.auth import Caller, authenticate, batch_for, caller, require_resources
from app.api.batches import change_batch, mark_cancelled
from app.api.context import Context, Given
from app.api.described import Answer
from app.api.errors import AnyRequest
from app.api.openai_files import allowed, stored_file
from app.api.openai_wire import BatchesPage, BatchObject, ErrorAnswer, EstimateObject, ResultsPage
from app.api.query import number
from app.api.wire import Json, Name, Text, Whole
from app.api.wire_batches import BatchPatch, MaxCost, MaxTokens, Priority, Weight, duration
from app.db import Connection
from app.doorbell import EVENTS, WORK
from app.errors import ConflictError, NotFoundError, Problem, ValidationError
from app.files import File
from app.forecast import Plan
from app.ids import uuid7
from app.intake import Appraiser, NewBatch
from app.log import Log
from app.resources import Resource
from app.submissions import NewSubmission, Submitted
from app.validator import Reading

log = Log("api")

_MOST_BODY: Final = 1024 * 1024
_MOST_KEY: Final = 200
_MOST_PAIRS: Final = 16
_MOST_PAIR_KEY: Final = 64
_MOST_PAIR_VALUE: Final = 512
_RESULT_BYTES: Final = 16 * 1024 * 1024

BatchId = Annotated[str, PathParameter(name="batch_id", description="batch_…")]
Batch200 = Answer(BatchObject, description="The batch")
Refused = Answer(ErrorAnswer, description="Something is wrong with the request")
Missing = Answer(ErrorAnswer, description="There is no such batch")
Full = Answer(ErrorAnswer, description="The workspace's queue is full; see Retry-After")
Ended = Answer(ErrorAnswer, description="It is in a state that does not allow this")


# What is sent -------------------------------------------------------------------------------------


def _endpoint(value: str) -> str:
    if value not in inputs.NEEDS:
        raise ValueError(f"must be one of {', '.join(inputs.NEEDS)}")
    return value


def _pairs(value: object) -> object:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of texts")  # noqa: TRY004 - pydantic wants ValueError
    given = cast("dict[object, object]", value)
    if len(given) > _MOST_PAIRS:
        raise ValueError(f"must have at most {_MOST_PAIRS} pairs")
    for key, each in given.items():
        if not isinstance(each, str) or len(each) > _MOST_PAIR_VALUE:
            raise ValueError(f"must have values that are texts of at most {_MOST_PAIR_VALUE}")
        if len(str(key)) > _MOST_PAIR_KEY:
            raise ValueError(f"must have keys of at most {_MOST_PAIR_KEY} characters")
    return given


Endpoint = Annotated[str, AfterValidator(_endpoint)]
Metadata = Annotated[dict[Text, Text], BeforeValidator(_pairs)]
Length = Annotated[timedelta, BeforeValidator(duration)]


def _anchor(value: str) -> str:
    if value != "created_at":
        raise ValueError("must be created_at")
    return value


class OutputExpiry(openai_wire.Sent):
    """When output files are shown no more."""

    anchor: Annotated[str, AfterValidator(_anchor)]
    seconds: Annotated[Whole, Field(ge=3600, le=2_592_000)]


class Asked(openai_wire.Sent):
    """Which file, for which endpoint, and how urgent it is."""

    input_file_id: Text
    endpoint: Endpoint
    priority: Priority = 0
    weight: Weight = 1


class EstimateSent(Asked):
    """A batch that is not made."""

    completion_window: Length = timedelta(days=1)


class NewBatchSent(Asked):
    """A batch to make of a file."""

    completion_window: Length
    metadata: Metadata = Field(default_factory=dict)
    output_expires_after: OutputExpiry | None = None
    name: Name | None = None
    max_tokens: MaxTokens | None = None
    max_cost: MaxCost | None = None


class ChangeSent(openai_wire.Sent):
    """What steers a batch. What is absent stays; null removes a bound or the deadline."""

    priority: Priority = 0
    weight: Weight = 1
    completion_window: Length | None = None
    max_tokens: MaxTokens | None = None
    max_cost: MaxCost | None = None


class RetrySent(openai_wire.Sent):
    """What a batch gets for its next try."""

    completion_window: Length | None = None


# OpenAI's routes ----------------------------------------------------------------------------------


@post(
    "/",
    action="completion-batch:create",
    summary="Make a batch of a file",
    description="It is validated in the background: nothing of it runs before every line is valid. "
    "Completion windows from 1m to 90d; priority, weight, name, max_tokens and max_cost are Sluice's own. "
    "Idempotency-Key makes a repeat harmless.",
    status_code=200,
    operation_class=operations.CreateOperation,
    request_max_body_size=_MOST_BODY,
    responses={200: Batch200, 400: Refused, 404: Refused, 409: Ended, 429: Full},
)
async def create(request: AnyRequest, context: Given, caller: Caller) -> Response[bytes]:
    body = await request.body()
    wanted = openai_wire.sent(NewBatchSent, body)
    given = cast("Json", msgspec.json.decode(body))
    async with context.db.connection() as conn:
        file = await _input(conn, caller, wanted)
        # How many lines it has is not known yet: only a full queue is refused at once.
        await quotas.look(
            conn,
            workspace_id=caller.workspace_id,
            default=validator.quota_of(context.settings),
            added=quotas.Amounts(items=1, batches=1, bytes=0),
        )
    new = NewSubmission(
        workspace_id=caller.workspace_id,
        environment_id=caller.environment_id,
        input_file_id=file.file_id,
        endpoint=wanted.endpoint,
        completion_window=str(given["completion_window"]),
        window=wanted.completion_window,
        name=wanted.name,
        metadata=wanted.metadata,
        priority=wanted.priority,
        weight=wanted.weight,
        max_tokens=wanted.max_tokens,
        max_cost_nano=None if wanted.max_cost is None else round(wanted.max_cost * prices.NANO),
        output_expires_s=wanted.output_expires_after.seconds
        if wanted.output_expires_after is not None
        else None,
        source_ip=request.client.host if request.client is not None else None,
        idempotency_key=_idempotency_key(request),
        request_hash=hashlib.sha256(body).digest(),
        created_by_api_key_id=_key_id(caller),
    )
    async with context.db.connection() as conn:
        await submissions.prepare_day(conn, new)
    async with context.db.transaction() as conn:
        batch_id = await submissions.submit(conn, new)
    context.validator.kick()
    log.info("batch.submitted", batch=batch_id, file=file.file_id)
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, openai_wire.batch_name(batch_id))
    return openai_wire.answer(openai_wire.batch_object(batch))


@get(
    "/",
    action="completion-batch:list",
    summary="List batches",
    description="Newest first, however they were made.",
    responses={200: Answer(BatchesPage, description="A page of batches"), 400: Refused},
)
async def list_batches(
    *,
    context: Given,
    caller: Caller,
    after: Annotated[str | None, QueryParameter(description="last id of the page before")] = None,
    limit: Annotated[str | None, QueryParameter(description="1 to 100; default 20")] = None,
) -> Response[bytes]:
    most = number(limit, "limit", default=20, least=1, most=100)
    beyond = openai_wire.batch_id_of(after) if after is not None else None
    async with context.db.connection() as conn:
        rows = await submissions.page(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            api_key_id=_key_id(caller),
            allowed=allowed(caller),
            after=beyond,
            most=most + 1,
        )
    data = [openai_wire.batch_object(row) for row in rows[:most]]
    return openai_wire.answer(
        BatchesPage(
            data=data,
            has_more=len(rows) > most,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )
    )


@get(
    "/{batch_id:str}",
    action="completion-batch:get",
    summary="Read a batch",
    responses={200: Batch200, 404: Missing},
)
async def retrieve(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, batch_id)
    return openai_wire.answer(openai_wire.batch_object(batch))


@post(
    "/{batch_id:str}/cancel",
    action="completion-batch:cancel",
    summary="Cancel a batch",
    description="Nothing of it is sent any more; calls in flight are let finish and their answers "
    "kept. What was not executed is in the error file, as batch_cancelled.",
    status_code=200,
    responses={200: Batch200, 404: Missing, 409: Ended},
)
async def cancel(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, batch_id)
    async with context.db.transaction() as conn:
        # One that was accepted in this moment is a batch, and is cancelled as one.
        if not await submissions.cancel(
            conn, workspace_id=caller.workspace_id, batch_id=batch.batch_id
        ):
            status = await queue.cancel(
                conn, workspace_id=caller.workspace_id, batch_id=batch.batch_id
            )
            if status not in (None, "cancelled"):
                raise _ended(batch_id, status)
            if status is None and batch.submission == "failed":
                raise _ended(batch_id, "failed")
    log.info("batch.cancelled", batch=batch.batch_id)
    context.ringer.ring(EVENTS, [batch.batch_id])
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, batch_id)
        if batch.status is not None and batch.completed_at is None:
            shown = await batch_for(conn, caller, batch.batch_id)
            context.spawn(mark_cancelled(context, shown))
    return openai_wire.answer(openai_wire.batch_object(batch))


# Sluice's own -------------------------------------------------------------------------------------


@post(
    "/{batch_id:str}",
    action="completion-batch:update",
    summary="Steer a batch",
    description="What is absent stays as it is; null removes a bound or the deadline. Effective at "
    "the next claim. A batch that max_tokens or max_cost paused goes on when either is raised.",
    status_code=200,
    operation_class=operations.ChangeOperation,
    request_max_body_size=_MOST_BODY,
    responses={200: Batch200, 400: Refused, 404: Missing, 409: Ended},
)
async def change(
    request: AnyRequest, context: Given, caller: Caller, batch_id: BatchId
) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await _begun(conn, caller, batch_id)
    body = await request.body()
    wanted = openai_wire.sent(ChangeSent, body)
    if not wanted.model_fields_set:
        names = ", ".join(ChangeSent.model_fields)
        raise ValidationError(
            [Problem(path="body", message=f"changes nothing; send some of {names}")]
        )
    given = cast("Json", msgspec.json.decode(body))
    same = BatchPatch.model_validate(
        {name: given[name] for name in wanted.model_fields_set}, by_name=True
    )
    try:
        await change_batch(context, caller, batch.batch_id, same)
    except ValidationError as error:
        raise ValidationError(
            [replace(each, path=to_snake(each.path)) for each in error.problems]
        ) from None
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, batch_id)
    return openai_wire.answer(openai_wire.batch_object(batch))


@post(
    "/{batch_id:str}/pause",
    action="completion-batch:update",
    summary="Pause a batch",
    description="Nothing of it is begun until it is resumed; calls in flight are let finish.",
    status_code=200,
    responses={200: Batch200, 404: Missing, 409: Ended},
)
async def pause(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    return await _steered(context, caller, batch_id, pauses=True)


@post(
    "/{batch_id:str}/resume",
    action="completion-batch:update",
    summary="Resume a batch",
    description="The opposite of pause; harmless for a batch that is not paused.",
    status_code=200,
    responses={200: Batch200, 404: Missing, 409: Ended},
)
async def resume(context: Given, caller: Caller, batch_id: BatchId) -> Response[bytes]:
    return await _steered(context, caller, batch_id, pauses=False)


async def _steered(context: Context, key: Principal, name: str, *, pauses: bool) -> Response[bytes]:
    async with context.db.connection() as conn:
        batch = await _begun(conn, key, name)
    async with context.db.transaction() as conn:
        await batches.hold(conn, workspace_id=key.workspace_id, batch_id=batch.batch_id)
        woken: list[UUID] = []
        if pauses:
            await batches.pause(conn, workspace_id=key.workspace_id, batch_id=batch.batch_id)
        else:
            woken = await batches.resume(
                conn, workspace_id=key.workspace_id, batch_id=batch.batch_id
            )
    log.info("batch.changed", batch=batch.batch_id)
    context.ringer.ring(WORK, woken)
    async with context.db.connection() as conn:
        batch = await _batch(conn, key, name)
    return openai_wire.answer(openai_wire.batch_object(batch))


@post(
    "/{batch_id:str}/retry",
    action="completion-batch:retry",
    summary="Try failed items of a batch again",
    description="Answered ones stay as they are. Its error file begins anew, with another id. One "
    "whose deadline has passed needs a new completion_window, which counts from now.",
    status_code=200,
    operation_class=operations.RetryOperation,
    request_max_body_size=_MOST_BODY,
    responses={200: Batch200, 400: Refused, 404: Missing, 409: Ended},
)
async def retry(
    request: AnyRequest, context: Given, caller: Caller, batch_id: BatchId
) -> Response[bytes]:
    wanted = openai_wire.sent(RetrySent, await request.body())
    async with context.db.connection() as conn:
        batch = await _begun(conn, caller, batch_id)
    if batch.status == "cancelled":
        raise _ended(batch_id, "cancelled")
    is_late = batch.expires_at is not None and batch.expires_at <= batch.now
    if is_late and wanted.completion_window is None:
        raise ConflictError(
            "The batch's deadline has passed: give it a new completion_window.",
            code="BATCH_EXPIRED",
        )
    tried = 1
    while tried:
        async with context.db.transaction() as conn:
            tried = await _redrive(conn, caller, batch, wanted)
    log.info("batch.changed", batch=batch.batch_id)
    context.ringer.ring(WORK, batch.resource_ids)
    context.ringer.ring(EVENTS, [batch.batch_id])
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, batch_id)
    return openai_wire.answer(openai_wire.batch_object(batch))


async def _redrive(conn: Connection, key: Principal, batch: Submitted, wanted: RetrySent) -> int:
    """Put some failed items back, and the deadline off with the first of them; how many."""
    await capacity.lock_scope(conn, workspace_id=key.workspace_id, scope_id=batch.batch_id)
    # What fails again meanwhile stays failed: only what had ended when the caller asked.
    tried = await batches.redrive(
        conn, workspace_id=key.workspace_id, batch_id=batch.batch_id, before=batch.now
    )
    if tried and wanted.completion_window is not None:
        held = await batches.hold(conn, workspace_id=key.workspace_id, batch_id=batch.batch_id)
        deadline = await batches.clock(conn) + wanted.completion_window
        await batches.steer(
            conn,
            workspace_id=key.workspace_id,
            batch_id=batch.batch_id,
            to=replace(held, expires_at=deadline),
        )
    return tried


@get(
    "/{batch_id:str}/results",
    action="completion-batch:get",
    summary="Read results as they come",
    description="Lines of the output and the error file in the order of completion, after a cursor. "
    "While complete is false more will come.",
    responses={200: Answer(ResultsPage, description="A page of results"), 404: Missing},
)
async def list_results(
    *,
    context: Given,
    caller: Caller,
    batch_id: BatchId,
    after: Annotated[
        str | None, QueryParameter(description="next_cursor of the page before")
    ] = None,
    limit: Annotated[str | None, QueryParameter(description="1 to 1000; default 100")] = None,
) -> Response[bytes]:
    most = number(limit, "limit", default=100, least=1, most=1000)
    position = number(after, "after", default=0, least=0, most=2**53)
    async with context.db.connection() as conn:
        batch = await _batch(conn, caller, batch_id)
        owner = await results.owner_of(
            conn,
            workspace_id=caller.workspace_id,
            environment_id=caller.environment_id,
            batch_id=batch.batch_id,
        )
        found: list[results.ResultLine] = []
        is_last = owner is None
        size, want = 0, 10
        while owner is not None and len(found) < most and size < _RESULT_BYTES and not is_last:
            want = min(want, most - len(found))
            rows = await results.lines_after(conn, owner=owner, number=position, most=want)
            found += rows
            position = rows[-1].no if rows else position
            is_last = len(rows) < want
            size += sum(len(row.line) for row in rows)
            want = max(1, (_RESULT_BYTES - size) * len(found) // max(size, 1))
    # A batch that had ended before its lines were read has no others.
    is_over = batch.submission != "validating" and (
        batch.status is None or batch.completed_at is not None
    )
    return openai_wire.answer(
        openai_wire.results_page(
            found, cursor=position, has_more=not is_last, complete=is_last and is_over
        )
    )


@post(
    "/estimate",
    action="completion-batch:create",
    summary="Estimate a batch of a file",
    description="What create would make of it, without making it: tokens, cost at the present prices, time at the "
    "present limits, mistakes by line. No provider is called.",
    status_code=200,
    operation_class=operations.EstimateOperation,
    request_max_body_size=_MOST_BODY,
    responses={
        200: Answer(EstimateObject, description="What it would ask for, and for how long"),
        400: Refused,
        404: Refused,
    },
)
async def estimate(request: AnyRequest, context: Given, caller: Caller) -> Response[bytes]:
    wanted = openai_wire.sent(EstimateSent, await request.body())
    async with context.db.connection() as conn:
        file = await _input(conn, caller, wanted)
        reading, appraiser, plan = await _appraised(context, conn, caller, wanted, file)
    return openai_wire.answer(openai_wire.estimate_object(reading, appraiser.found, plan))


async def _appraised(
    context: Context, conn: Connection, key: Principal, wanted: EstimateSent, file: File
) -> tuple[Reading, Appraiser, Plan]:
    batch = NewBatch(
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        batch_id=uuid7(),
        type="async",
        endpoint=wanted.endpoint,
        priority=wanted.priority,
        weight=wanted.weight,
        expires_at=await batches.clock(conn) + wanted.completion_window,
    )
    limits = await capacity.limits(conn, workspace_id=key.workspace_id, scope_ids=[_key_id(key)])
    reading = Reading()
    resources: dict[UUID, Resource] = {}
    means: dict[UUID, float] = {}
    appraiser = Appraiser(
        batch,
        resources,
        most_item_bytes=context.settings.max_item_bytes,
        key_amounts=[limit.amount for limit in limits],
        output_means=means,
    )
    pieces = validator.read_lines(
        conn,
        workspace_id=key.workspace_id,
        file_id=file.file_id,
        endpoint=wanted.endpoint,
        most_item_bytes=context.settings.max_item_bytes,
    )
    async with aclosing(pieces):
        async for lines in pieces:
            items = await validator.resolve(
                conn,
                None,
                workspace_id=key.workspace_id,
                environment_id=key.environment_id,
                api_key_id=_key_id(key),
                lines=lines,
                reading=reading,
            )
            news = {r.resource_id: r for r in reading.models.values()}.keys() - resources.keys()
            if news:
                resources |= {r.resource_id: r for r in reading.models.values()}
                means |= await forecast.output_means(
                    conn, workspace_id=key.workspace_id, resource_ids=list(news)
                )
            await appraiser.add(items)
    plan = await forecast.of_new(
        conn,
        workspace_id=key.workspace_id,
        batch_id=batch.batch_id,
        api_key_id=_key_id(key),
        appraisal=appraiser.found,
        amounts=(),
        priority=batch.priority,
        weight=batch.weight,
        expires_at=batch.expires_at,
        source_ip=None,
        metadata={},
        clockwork=context.clockwork,
    )
    return reading, appraiser, plan


# What handlers share ------------------------------------------------------------------------------


async def _input(conn: Connection, key: Principal, wanted: Asked) -> File:
    """The file that a batch is to be made of. Raises NotFoundError or ValidationError."""
    file = await stored_file(conn, key, wanted.input_file_id)
    if file is None:
        raise NotFoundError(
            f"No such File object: {wanted.input_file_id[:100]}",
            details={"param": "input_file_id"},
        )
    if file.purpose != "batch":
        raise ValidationError(
            [
                Problem(
                    path="input_file_id",
                    message=f"has the purpose {file.purpose}; upload it with the purpose batch",
                )
            ]
        )
    return file


async def _batch(conn: Connection, key: Principal, name: str) -> Submitted:
    """A batch that the caller may see. Raises NotFoundError or ForbiddenError."""
    batch = await submissions.get(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        batch_id=openai_wire.batch_id_of(name),
    )
    if batch is None:
        raise openai_wire.no_batch(name)
    require_resources(key, batch.resource_ids)
    return batch


async def _begun(conn: Connection, key: Principal, name: str) -> Submitted:
    """The same of a batch whose file was accepted. Raises ConflictError too."""
    batch = await _batch(conn, key, name)
    if batch.status is None:
        raise _ended(name, batch.state)
    return batch


def _ended(name: str, state: str) -> ConflictError:
    return ConflictError(
        f"Batch '{name}' is {state}: this cannot be done with it.", code="INVALID_BATCH_STATE"
    )


def _key_id(caller: Principal) -> UUID:
    """The caller's key: users have no environment of their own, so only keys come here."""
    assert caller.api_key_id is not None
    return caller.api_key_id


def _idempotency_key(request: AnyRequest) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _MOST_KEY:
        raise ValidationError(
            [Problem(path="Idempotency-Key", message=f"must have 1 to {_MOST_KEY} characters")]
        )
    return key


router = Router(
    "/v1/batches",
    route_handlers=[
        create,
        estimate,
        list_batches,
        retrieve,
        change,
        cancel,
        pause,
        resume,
        retry,
        list_results,
    ],
    guards=[authenticate],
    dependencies={"caller": Provide(caller)},
    tags=["OpenAI batches"],
)
