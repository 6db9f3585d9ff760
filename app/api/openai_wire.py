"""OpenAI's objects and errors, as its SDK reads them: snake_case, times in Unix seconds.

Refusals are ``{"error": {"message", "type", "param", "code"}}``; handlers raise the same errors as
everywhere, `handlers` gives them this shape on the routes that have it. What Sluice adds to an object
is a further field, which the SDK keeps and does not mind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal, TypeVar, cast
from uuid import UUID

import msgspec
from litestar import Response
from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as PydanticError

from app.api import errors
from app.api.errors import AnyRequest, ErrorBody
from app.api.wire import Json, encode, object_of, problems_of
from app.batch_lines import LineError
from app.errors import NotFoundError, ValidationError
from app.files import File
from app.forecast import Plan
from app.ids import batch_file_id
from app.intake import Appraisal
from app.prices import NANO
from app.results import ResultFile, ResultLine
from app.submissions import Submitted
from app.validator import Reading

Model = TypeVar("Model", bound=BaseModel)

_FILE: Final = "file-"
_BATCH: Final = "batch_"
_HEX: Final = 32


# Ids ----------------------------------------------------------------------------------------------


def file_name(file_id: UUID) -> str:
    """A file's id on these routes."""
    return _FILE + file_id.hex


def batch_name(batch_id: UUID) -> str:
    """A batch's id on these routes; the digits are those of its UUID on the others."""
    return _BATCH + batch_id.hex


def file_id_of(name: str) -> UUID:
    """The file that an id names. Raises NotFoundError."""
    found = _uuid(name, _FILE)
    if found is None:
        raise no_file(name)
    return found


def batch_id_of(name: str) -> UUID:
    """The batch that an id names. Raises NotFoundError."""
    found = _uuid(name, _BATCH)
    if found is None:
        raise no_batch(name)
    return found


def _uuid(name: str, prefix: str) -> UUID | None:
    digits = name.removeprefix(prefix)
    try:
        return UUID(digits) if name.startswith(prefix) and len(digits) == _HEX else None
    except ValueError:
        return None


def no_file(name: str) -> NotFoundError:
    """The refusal for a file that there is not, or not any more."""
    return NotFoundError(f"No such File object: {name[:100]}", details={"param": "id"})


def no_batch(name: str) -> NotFoundError:
    """The refusal for a batch that there is not."""
    return NotFoundError(f"No batch found with id '{name[:100]}'.", details={"param": "id"})


# Answers ------------------------------------------------------------------------------------------


class FileObject(msgspec.Struct, kw_only=True, frozen=True):
    """A file. ``complete`` is false for an output file whose batch still runs: it grows."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    complete: bool = True


class FilesPage(msgspec.Struct, kw_only=True, frozen=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(msgspec.Struct, kw_only=True, frozen=True):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchErrors(msgspec.Struct, kw_only=True, frozen=True):
    """The first hundred mistakes of an input file."""

    object: Literal["list"] = "list"
    data: list[LineError]


class RequestCounts(msgspec.Struct, kw_only=True, frozen=True):
    """Lines of the input, of the output file and of the error file; and what is still to end."""

    total: int
    completed: int
    failed: int
    pending: int
    running: int
    cancelled: int


class InputDetails(msgspec.Struct, kw_only=True, frozen=True):
    """A part of input tokens."""

    cached_tokens: int


class OutputDetails(msgspec.Struct, kw_only=True, frozen=True):
    """A part of output tokens."""

    reasoning_tokens: int


class BatchUsage(msgspec.Struct, kw_only=True, frozen=True):
    """Tokens of answered requests so far, as the providers counted them."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class PauseReasonObject(msgspec.Struct, kw_only=True, frozen=True):
    """Why a batch was paused other than by people."""

    code: Literal["max_tokens_reached", "max_cost_reached"]
    message: str


class BatchObject(msgspec.Struct, kw_only=True, frozen=True):
    """A batch. From ``name`` on the fields are Sluice's own.

    ``cost`` and ``max_cost`` are in ``currency``; ``cost`` is null where no price was known.
    """

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None
    name: str | None
    priority: int
    weight: float
    is_paused: bool
    pause_reason: PauseReasonObject | None
    max_tokens: int | None
    max_cost: float | None
    cost: float | None
    currency: str | None


class BatchesPage(msgspec.Struct, kw_only=True, frozen=True):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ResultsPage(msgspec.Struct, kw_only=True, frozen=True):
    """Lines of output and error file; ``complete``: no others will follow ``next_cursor``."""

    object: Literal["list"] = "list"
    data: list[Json]
    has_more: bool
    next_cursor: str
    complete: bool


class CostObject(msgspec.Struct, kw_only=True, frozen=True):
    """Money."""

    amount: float
    currency: str


class EstimateObject(msgspec.Struct, kw_only=True, frozen=True):
    """What a batch would ask for. ``errors``: what would make it fail; then the sums lack those.

    ``cost`` is null where ``unpriced_models`` have no price, or where models are paid for in several
    currencies.
    """

    object: Literal["batch.estimate"] = "batch.estimate"
    requests: int
    errors: BatchErrors | None
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cost: CostObject | None
    unpriced_models: list[str]
    requests_ahead: int
    done_at: int | None
    seconds_left: int | None
    is_feasible: bool | None
    infeasible_reason: str | None


def results_page(
    lines: Sequence[ResultLine], *, cursor: int, has_more: bool, complete: bool
) -> ResultsPage:
    """Lines to the letter."""
    return ResultsPage(
        data=cast("list[Json]", [msgspec.Raw(each.line) for each in lines]),
        has_more=has_more,
        next_cursor=str(cursor),
        complete=complete,
    )


def estimate_object(reading: Reading, appraisal: Appraisal, plan: Plan) -> EstimateObject:
    """A dry run on the wire."""
    cost = plan.expected.cost
    errors = [
        *reading.errors,
        *(
            LineError(
                code="invalid_request",
                message=f"The body {each.reason}.",
                param="body",
                line=int(each.place or 0),
            )
            for each in appraisal.impossible
        ),
    ]
    return EstimateObject(
        requests=appraisal.items - appraisal.impossible_items,
        errors=BatchErrors(data=errors) if errors else None,
        input_tokens=plan.input_tokens,
        output_tokens=plan.output_tokens,
        total_tokens=plan.input_tokens + plan.output_tokens,
        cost=None if cost is None else CostObject(amount=cost.nano / NANO, currency=cost.currency),
        unpriced_models=list(plan.expected.unpriced),
        requests_ahead=plan.items_ahead,
        done_at=_seconds(plan.eta.at) if plan.eta is not None else None,
        seconds_left=math.ceil(plan.eta.seconds_left) if plan.eta is not None else None,
        is_feasible=False if errors else plan.is_feasible,
        infeasible_reason="the file has lines that are not valid" if errors else plan.why_not,
    )


def file_object(file: File) -> FileObject:
    """A stored file on the wire."""
    return FileObject(
        id=file_name(file.file_id),
        bytes=file.bytes,
        created_at=_seconds(file.created_at),
        expires_at=_seconds_or_none(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )


def result_file_object(file: ResultFile) -> FileObject:
    """A batch's own file on the wire."""
    return FileObject(
        id=file_name(file.file_id),
        bytes=file.bytes,
        created_at=_seconds(file.begun_at or file.owner.created_at),
        expires_at=_seconds_or_none(file.expires_at),
        filename=f"{batch_name(file.owner.batch_id)}_{file.kind}.jsonl",
        purpose="batch" if file.kind == "input" else "batch_output",
        complete=file.is_complete,
    )


def batch_object(batch: Submitted) -> BatchObject:
    """A batch on the wire."""
    state = batch.state
    ended_at = batch.completed_at
    decided_at = batch.decided_at
    finalizing_at = None
    if state == "completed":
        finalizing_at = ended_at
    elif state in ("finalizing", "expired"):
        finalizing_at = batch.expires_at
    began = batch.status is not None
    cancelled_early = batch.submission == "cancelled"
    return BatchObject(
        id=batch_name(batch.batch_id),
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors(data=msgspec.convert(batch.errors, list[LineError]))
        if batch.errors
        else None,
        input_file_id=file_name(batch.input_file_id or batch_file_id(batch.batch_id, "input")),
        completion_window=batch.completion_window or _window(batch),
        status=state,
        output_file_id=file_name(batch_file_id(batch.batch_id, "output"))
        if batch.output_lines
        else None,
        error_file_id=file_name(batch_file_id(batch.batch_id, "error", redrives=batch.redrives))
        if batch.error_lines
        else None,
        created_at=_seconds(batch.created_at),
        in_progress_at=_seconds_or_none((decided_at or batch.begun_at) if began else None),
        expires_at=_seconds_or_none(batch.expires_at),
        finalizing_at=_seconds_or_none(finalizing_at),
        completed_at=_seconds_or_none(ended_at if state == "completed" else None),
        failed_at=_seconds_or_none(decided_at if state == "failed" else None),
        expired_at=_seconds_or_none(ended_at if state == "expired" else None),
        cancelling_at=_seconds_or_none(decided_at if cancelled_early else batch.cancelled_at),
        cancelled_at=_seconds_or_none(
            decided_at if cancelled_early else ended_at if state == "cancelled" else None
        ),
        request_counts=RequestCounts(
            total=batch.total_items,
            completed=batch.completed,
            failed=batch.failed + batch.cancelled,
            pending=batch.pending,
            running=batch.running,
            cancelled=batch.cancelled,
        ),
        usage=_usage(batch) if began else None,
        metadata=_metadata(batch.metadata),
        name=batch.name,
        priority=batch.priority,
        weight=round(batch.weight, 3),
        is_paused=batch.is_paused,
        pause_reason=_pause_reason(batch),
        max_tokens=batch.max_tokens,
        max_cost=None if batch.max_cost_nano is None else batch.max_cost_nano / NANO,
        cost=None if batch.currency is None else batch.cost_nano / NANO,
        currency=batch.currency,
    )


def _pause_reason(batch: Submitted) -> PauseReasonObject | None:
    match batch.pause_reason:
        case None:
            return None
        case "max-tokens":
            return PauseReasonObject(
                code="max_tokens_reached",
                message=f"The next line does not fit max_tokens of {batch.max_tokens:,}; raise it with"
                f" POST /v1/batches/{batch_name(batch.batch_id)}, or cancel the batch.",
            )
        case "max-cost":
            return PauseReasonObject(
                code="max_cost_reached",
                message=f"The next line does not fit max_cost of {(batch.max_cost_nano or 0) / NANO:g}"
                f" {batch.currency}, of which {batch.cost_nano / NANO:g} are spent; raise it with"
                f" POST /v1/batches/{batch_name(batch.batch_id)}, or cancel the batch.",
            )


def _usage(batch: Submitted) -> BatchUsage:
    return BatchUsage(
        input_tokens=batch.input_tokens,
        input_tokens_details=InputDetails(cached_tokens=batch.cached_tokens),
        output_tokens=batch.output_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=batch.reasoning_tokens),
        total_tokens=batch.input_tokens + batch.output_tokens,
    )


def _metadata(given: Mapping[str, object]) -> dict[str, str] | None:
    """Texts only, as clients expect; a batch made on the other routes may hold any JSON."""
    if not given:
        return None
    return {k: v if isinstance(v, str) else encode(v).decode() for k, v in given.items()}


def _window(batch: Submitted) -> str:
    """The window of a batch that was made on the other routes; ``none`` without a deadline."""
    if batch.expires_at is None:
        return "none"
    seconds = round((batch.expires_at - batch.created_at).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


def _seconds_or_none(at: datetime | None) -> int | None:
    return None if at is None else _seconds(at)


def answer(value: msgspec.Struct, *, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    """An answer with an object; OpenAI's status for all that went well is 200."""
    return Response(
        encode(value),
        status_code=200,
        media_type="application/json",
        headers=dict(headers or {}),
    )


# Requests -----------------------------------------------------------------------------------------


class Sent(BaseModel):
    """What a client sends. Unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=False)


def sent(model: type[Model], body: bytes) -> Model:
    """What a body says. Raises ValidationError."""
    try:
        return model.model_validate(object_of(body or b"{}"))
    except PydanticError as error:
        raise ValidationError(problems_of(error)) from None


# Refusals -----------------------------------------------------------------------------------------


class ErrorObject(msgspec.Struct, kw_only=True, frozen=True):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, kw_only=True, frozen=True):
    """What every refusal of these routes looks like."""

    error: ErrorObject


_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES: Final = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "file_too_large",
    429: "rate_limit_exceeded",
}
_SERVER_ERROR: Final = 500


def _reshaped(
    made: Callable[[AnyRequest, Any], Response[bytes]],
) -> Callable[[AnyRequest, Any], Response[bytes]]:
    """The same refusal in OpenAI's shape; status and headers stay."""

    def refuse(request: AnyRequest, error: Exception) -> Response[bytes]:
        refused = made(request, error)
        told = msgspec.json.decode(refused.content, type=ErrorBody)
        status = refused.status_code or _SERVER_ERROR
        param = told.details.get("param")
        code = told.errorCode.lower()
        message = told.errorMessage
        if isinstance(error, ValidationError):
            first = error.problems[0]
            param = first.path
            code = "missing_required_parameter" if first.message == "is required" else "400"
            message = "; ".join(f"{p.path}: {p.message}" for p in error.problems)
        if code.isdecimal():
            code = _CODES.get(status, "server_error")
        body = ErrorAnswer(
            error=ErrorObject(
                message=message,
                type=_TYPES.get(
                    status,
                    "server_error" if status >= _SERVER_ERROR else "invalid_request_error",
                ),
                param=param if isinstance(param, str) else None,
                code=code,
            )
        )
        refused.content = encode(body)
        return refused

    return refuse


def handlers(prefix: str) -> dict[type[Exception], Callable[[AnyRequest, Any], Response[bytes]]]:
    """The handlers of every refusal: in OpenAI's shape below its routes, also where none is found."""
    roots = tuple(
        f"{prefix}/v1/{noun}"
        for noun in ("files", "batches", "webhook_endpoints", "webhook_event_types")
    )

    def chosen(
        made: Callable[[AnyRequest, Any], Response[bytes]],
    ) -> Callable[[AnyRequest, Any], Response[bytes]]:
        reshaped = _reshaped(made)

        def refuse(request: AnyRequest, error: Exception) -> Response[bytes]:
            is_ours = str(request.scope["path"]).startswith(roots)
            return (reshaped if is_ours else made)(request, error)

        return refuse

    return {kind: chosen(made) for kind, made in errors.HANDLERS.items()}
