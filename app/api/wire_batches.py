"""Batches and their items on the wire."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, cast
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from app.api.wire import (
    MASK,
    Answer,
    Flag,
    Json,
    Keyed,
    Moment,
    Name,
    Sent,
    Text,
    Whole,
    instant,
    instant_or_none,
)
from app.api.wire_access import ApiKeyBody, UserBody
from app.api.wire_capacity import (
    Capacity,
    EtaBody,
    LimitRef,
    WaitingBody,
    eta_body,
    limit_ref,
    waiting_body,
)
from app.batches import Batch, Status
from app.errors import Problem
from app.forecast import Outlook, Plan
from app.ids import item_id
from app.intake import Appraisal
from app.items import Attempt, Item
from app.prices import NANO

WireStatus = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]
WireType = Literal["SYNC", "ASYNC", "CALLBACK"]
WireOutcome = Literal[
    "RUNNING", "ANSWERED", "REJECTED", "THROTTLED", "UNREACHABLE", "LOST", "UNSENT", "IMPOSSIBLE"
]

#: Why items ended that another try may bring an answer for.
_RETRYABLE: Final = frozenset({"exhausted", "crashed", "expired"})


# Answers ------------------------------------------------------------------------------------------


class ErrorDetails(Answer, kw_only=True, frozen=True):
    """More about a failure: what the provider said, and whether another try may help."""

    status_code: int | None
    type: str | None
    code: str | None
    param: str | None
    retryable: bool


class AttemptBody(Answer, kw_only=True, frozen=True):
    """One call of an item. Tokens are those charged: true ones where known, else reserved."""

    attempt: int
    outcome: WireOutcome
    resource_id: UUID
    resource: str | None
    connection_id: UUID | None
    provider: str | None
    model: str | None
    claimed_at: str
    started_at: str | None
    completed_at: str | None
    duration_ms: int | None
    status_code: int | None
    provider_request_id: str | None
    error_code: str | None
    error_message: str | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    reasoning_tokens: int | None


class AttemptsBody(Answer, kw_only=True, frozen=True):
    """Every call of an item, oldest first."""

    data: list[AttemptBody]


class ItemBody(Answer, kw_only=True, frozen=True):
    """An item. ``outputTokens`` and ``completionTokens`` are the same number.

    ``response`` is the provider's reply: ``data``, its body as it came, and ``headers``, its x- ones;
    with responseFormat=openai that body alone. Both read null once they were erased. ``attempts``
    counts the calls; ``calls`` (if asked for) tells of each.
    """

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    item_id: UUID
    index: int
    custom_id: str | None
    resource_id: UUID
    status: WireStatus
    request: Json | UnsetType | None = UNSET
    response: Json | None
    correlation_id: str
    model: str | None
    provider: str | None
    connection_id: UUID | None
    estimated_prompt_tokens: int
    prompt_tokens: int
    output_tokens: int
    completion_tokens: int
    total_tokens: int
    error_code: str | None
    error_message: str | None
    error_details: ErrorDetails | None
    retry_count: int
    attempts: int
    max_attempts: int
    next_attempt_at: str | None
    created_at: str
    started_at: str | None
    completed_at: str | None
    calls: list[AttemptBody] | UnsetType = UNSET


class PauseReasonBody(Answer, kw_only=True, frozen=True):
    """Why a batch was paused other than by people."""

    code: Literal["MAX_TOKENS_REACHED", "MAX_COST_REACHED"]
    message: str


class BatchBody(Answer, kw_only=True, frozen=True):
    """A batch. ``totalOutputTokens`` and ``totalCompletionTokens`` are the same number.

    ``waitingFor`` and ``eta`` are part of a single batch's answer only.
    """

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    timestamp: str
    type: WireType
    status: WireStatus
    name: str | None
    metadata: Json
    priority: int
    weight: float
    is_paused: bool
    max_attempts: int | None
    timeout_ms: int | None
    idempotency_key: str | None
    pause_reason: PauseReasonBody | None
    max_tokens: int | None
    max_cost: float | None
    total_cost: float | None
    currency: str | None
    texts_erased: bool
    expires_at: str | None
    expired_at: str | None
    waiting_for: WaitingBody | UnsetType | None = UNSET
    eta: EtaBody | UnsetType | None = UNSET
    callback_options: Json | None
    capacity: list[Json] | None
    total_items: int
    pending: int
    running: int
    completed: int
    failed: int
    cancelled: int
    completed_percentage: float
    total_estimated_prompt_tokens: int
    total_prompt_tokens: int
    total_output_tokens: int
    total_completion_tokens: int
    error_message: str | None
    created_at: str
    updated_at: str
    started_at: str | None
    completed_at: str | None
    created_by_user_id: UUID | None
    created_by_api_key_id: UUID | None
    created_by_user: UserBody | UnsetType | None = UNSET
    created_by_api_key: ApiKeyBody | UnsetType | None = UNSET
    items: list[ItemBody] | UnsetType = UNSET
    items_next_cursor: str | UnsetType | None = UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Creators:
    """Who made a batch: one of them, or neither."""

    api_key: ApiKeyBody | None
    user: UserBody | None


class RetryBody(Answer, kw_only=True, frozen=True):
    """How many items were put back in line, and the batch as it is then."""

    retried: int
    batch: BatchBody


class ItemsPage(Answer, kw_only=True, frozen=True):
    """Items in the order asked for; ``nextCursor`` is null on the last page."""

    data: list[ItemBody]
    next_cursor: str | None


class BatchesPage(Answer, kw_only=True, frozen=True):
    """Batches, newest first; ``nextCursor`` is null on the last page."""

    data: list[BatchBody]
    next_cursor: str | None


def _verbatim(text: str) -> Json:
    """Stored JSON as a value that is encoded to the letter."""
    return cast("Json", cast("object", msgspec.Raw(text.encode())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How items are shown. ``bare``: the provider's reply alone as their response."""

    has_request: bool = True
    bare: bool = False


USUAL: Final = Shape()


def item_body(
    batch: Batch,
    item: Item,
    *,
    status: Status | None = None,
    shape: Shape = USUAL,
    attempts: Sequence[Attempt] | None = None,
) -> ItemBody:
    """An item on the wire.

    ``status``: show it as it was in this state, for the event that brought it there.
    """
    shown = status or item.status
    ended = shown in ("completed", "failed", "cancelled")
    answered = shown == "completed"
    failed = shown == "failed"
    prompt_tokens = (item.input_tokens or 0) if answered else 0
    output_tokens = (item.output_tokens or 0) if answered else 0
    correlation_id = (item.vmx or {}).get("correlationId") or str(item.batch_id)
    return ItemBody(
        workspace_id=item.workspace_id,
        environment_id=batch.environment_id,
        batch_id=item.batch_id,
        item_id=item_id(item.batch_id, item.seq),
        index=item.seq,
        custom_id=item.custom_id,
        resource_id=item.resource_id,
        status=_status(shown),
        request=_verbatim(item.request) if shape.has_request else UNSET,
        response=_response(item, correlation_id, bare=shape.bare if answered else None),
        correlation_id=correlation_id,
        model=item.model if answered else None,
        provider=item.provider if answered else None,
        connection_id=item.connection_id if answered else None,
        estimated_prompt_tokens=item.estimated_input_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        completion_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
        error_code=item.error_code if failed else None,
        error_message=item.error_message if failed else None,
        error_details=_error_details(item) if failed else None,
        retry_count=item.failures,
        attempts=item.attempt,
        max_attempts=item.max_attempts,
        next_attempt_at=instant(item.visible_at)
        if shown == "pending" and item.status == "pending" and item.attempt
        else None,
        created_at=instant(item.created_at),
        started_at=instant_or_none(item.claimed_at),
        completed_at=instant_or_none(item.ended_at) if ended else None,
        calls=UNSET if attempts is None else [attempt_body(each) for each in attempts],
    )


def _response(item: Item, correlation_id: str, *, bare: bool | None) -> Json | None:
    """The provider's reply; ``bare`` None: there is none to show."""
    if bare is None or item.response is None:
        return None
    if bare:
        return _verbatim(item.response)
    ours = {
        "x-vmx-request-id": item.request_id,
        "x-vmx-correlation-id": correlation_id,
        "x-vmx-model": item.model,
        "x-vmx-provider": item.provider,
        "x-vmx-connection-id": None if item.connection_id is None else str(item.connection_id),
    }
    told = {name: value for name, value in ours.items() if value is not None}
    return {"data": _verbatim(item.response), "headers": (item.headers or {}) | told}


class _ProviderError(msgspec.Struct):
    type: object = None
    code: object = None
    param: object = None


class _Refusal(msgspec.Struct):
    error: _ProviderError | None = None


_decode_refusal = msgspec.json.Decoder(_Refusal).decode


def _error_details(item: Item) -> ErrorDetails:
    said: _ProviderError | None = None
    if item.response is not None:
        try:
            said = _decode_refusal(item.response).error
        except (msgspec.DecodeError, UnicodeError):
            said = None  # a provider with errors of a shape of its own
    return ErrorDetails(
        status_code=item.status_code,
        type=_short(said and said.type),
        code=_short(said and said.code),
        param=_short(said and said.param),
        retryable=item.ended_reason in _RETRYABLE,
    )


def _short(value: object) -> str | None:
    return str(value)[:200] if isinstance(value, str | int) else None


def attempt_body(attempt: Attempt) -> AttemptBody:
    """One call on the wire."""
    return AttemptBody(
        attempt=attempt.attempt,
        outcome=cast("WireOutcome", attempt.outcome.upper()),
        resource_id=attempt.resource_id,
        resource=attempt.resource,
        connection_id=attempt.connection_id,
        provider=attempt.provider,
        model=attempt.model,
        claimed_at=instant(attempt.claimed_at),
        started_at=instant_or_none(attempt.started_at),
        completed_at=instant_or_none(attempt.ended_at),
        duration_ms=attempt.latency_ms,
        status_code=attempt.status_code,
        provider_request_id=attempt.request_id,
        error_code=attempt.error_code,
        error_message=attempt.error_message,
        prompt_tokens=attempt.input_tokens,
        output_tokens=attempt.output_tokens,
        cached_tokens=attempt.cached_tokens,
        reasoning_tokens=attempt.reasoning_tokens,
    )


def batch_body(
    batch: Batch,
    *,
    items: Sequence[ItemBody] | None = None,
    items_next_cursor: str | None = None,
    creators: Creators | None = None,
    outlook: Outlook | None = None,
    minted_secret: str | None = None,
) -> BatchBody:
    """A batch on the wire; what is not given is absent there.

    ``minted_secret``: of its callback, to be shown in the answer to its creation.
    """
    callback_options = _masked_callback(batch.callback_options)
    if callback_options is not None and minted_secret is not None:
        callback_options["secret"] = minted_secret
    error = None
    if batch.status == "failed":
        error = f"{batch.failed} of {batch.total_items} items failed"
        if batch.expired_at is not None:
            error += "; its deadline passed before all were answered"
    elif batch.status == "cancelled":
        error = "Batch cancelled by user"
    seen = (batch.created_at, batch.started_at, batch.cancelled_at, batch.completed_at)
    return BatchBody(
        workspace_id=batch.workspace_id,
        environment_id=batch.environment_id,
        batch_id=batch.batch_id,
        timestamp=instant(batch.created_at),
        type=cast("WireType", batch.type.upper()),
        status=_status(batch.status),
        name=batch.name,
        metadata=batch.metadata,
        priority=batch.priority,
        weight=round(batch.weight, 3),
        is_paused=batch.is_paused,
        max_attempts=batch.max_attempts,
        timeout_ms=batch.timeout_ms,
        idempotency_key=batch.idempotency_key,
        pause_reason=_pause_reason(batch),
        max_tokens=batch.max_tokens,
        max_cost=None if batch.max_cost_nano is None else batch.max_cost_nano / NANO,
        total_cost=None if batch.currency is None else batch.cost_nano / NANO,
        currency=batch.currency,
        texts_erased=batch.texts_are_erased,
        expires_at=instant_or_none(batch.expires_at),
        expired_at=instant_or_none(batch.expired_at),
        waiting_for=UNSET if outlook is None else waiting_body(outlook.waiting),
        eta=UNSET if outlook is None else eta_body(outlook.eta),
        callback_options=callback_options,
        capacity=cast("list[Json]", batch.capacity) or None,
        total_items=batch.total_items,
        pending=batch.pending,
        running=batch.running,
        completed=batch.completed,
        failed=batch.failed,
        cancelled=batch.cancelled,
        completed_percentage=round(100 * batch.ended / batch.total_items, 2),
        total_estimated_prompt_tokens=batch.estimated_input_tokens,
        total_prompt_tokens=batch.input_tokens,
        total_output_tokens=batch.output_tokens,
        total_completion_tokens=batch.output_tokens,
        error_message=error,
        created_at=instant(batch.created_at),
        updated_at=instant(max(at for at in seen if at is not None)),
        started_at=instant_or_none(batch.started_at),
        completed_at=instant_or_none(batch.completed_at),
        created_by_user_id=batch.created_by_user_id,
        created_by_api_key_id=batch.created_by_api_key_id,
        created_by_user=UNSET if creators is None else creators.user,
        created_by_api_key=UNSET if creators is None else creators.api_key,
        items=UNSET if items is None else list(items),
        items_next_cursor=UNSET if items is None else items_next_cursor,
    )


def _pause_reason(batch: Batch) -> PauseReasonBody | None:
    match batch.pause_reason:
        case None:
            return None
        case "max-tokens":
            return PauseReasonBody(
                code="MAX_TOKENS_REACHED",
                message=f"the next item does not fit maxTokens of {batch.max_tokens:,}; raise it with"
                " PATCH to go on, or cancel the batch",
            )
        case "max-cost":
            return PauseReasonBody(
                code="MAX_COST_REACHED",
                message="the next item does not fit maxCost of"
                f" {(batch.max_cost_nano or 0) / NANO:g} {batch.currency}, of which"
                f" {batch.cost_nano / NANO:g} are spent; raise it with PATCH to go on, or cancel the batch",
            )


def _status(status: Status) -> WireStatus:
    return cast("WireStatus", status.upper())


def _masked_callback(options: Mapping[str, Any] | None) -> Json | None:
    """Callback options without their secrets: header values are often credentials."""
    if options is None:
        return None
    shown: Json = dict(options)
    headers = options.get("headers")
    if isinstance(headers, Mapping):
        shown["headers"] = dict.fromkeys(cast("Mapping[str, object]", headers), MASK)
    if "secret" in options:
        shown["secret"] = MASK
    return shown


class ImpossibleItem(Answer, kw_only=True, frozen=True):
    """An item that could never be sent."""

    index: int
    reason: str


class CostBody(Answer, kw_only=True, frozen=True):
    """Money."""

    amount: float
    currency: str


class EstimateBody(Answer, kw_only=True, frozen=True):
    """What a batch would ask for, and how long it would take. Nothing of it is stored.

    ``impossibleItems`` names the first hundred of ``impossibleCount``; the sums are of the others. ``cost``
    is null where ``unpricedModels`` have no price, or where models are paid for in several currencies.
    """

    items: int
    impossible_count: int
    impossible_items: list[ImpossibleItem]
    estimated_prompt_tokens: int
    expected_output_tokens: int
    total_tokens: int
    cost: CostBody | None
    unpriced_models: list[str]
    items_ahead: int
    eta: EtaBody | None
    expires_at: str | None
    is_feasible: bool | None
    infeasible_reason: str | None
    limit: LimitRef | None


def estimate_body(appraisal: Appraisal, plan: Plan, *, expires_at: datetime | None) -> EstimateBody:
    """A dry run on the wire."""
    is_feasible, why_not = plan.is_feasible, plan.why_not
    cost = plan.expected.cost
    if appraisal.impossible_items:
        is_feasible = False
        why_not = f"{appraisal.impossible_items:,} of its items could never be sent" + (
            f"; {why_not}" if why_not else ""
        )
    return EstimateBody(
        items=appraisal.items,
        impossible_count=appraisal.impossible_items,
        impossible_items=[
            ImpossibleItem(index=each.index, reason=each.reason) for each in appraisal.impossible
        ],
        estimated_prompt_tokens=plan.input_tokens,
        expected_output_tokens=plan.output_tokens,
        total_tokens=plan.input_tokens + plan.output_tokens,
        cost=None if cost is None else CostBody(amount=cost.nano / NANO, currency=cost.currency),
        unpriced_models=list(plan.expected.unpriced),
        items_ahead=plan.items_ahead,
        eta=eta_body(plan.eta),
        expires_at=instant_or_none(expires_at),
        is_feasible=is_feasible,
        infeasible_reason=why_not,
        limit=limit_ref(plan.limit),
    )


# Requests -----------------------------------------------------------------------------------------


_WINDOW: Final = re.compile(r"([1-9]\d{0,8})([smhd])")
_UNITS: Final = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}
_LEAST_WINDOW: Final = timedelta(minutes=1)
_MOST_WINDOW: Final = timedelta(days=90)


def duration(value: object) -> object:
    """A validator: a length of time such as 24h."""
    if value is None:
        return None
    found = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    length = int(found[1]) * _UNITS[found[2]] if found is not None else None
    if length is None or not _LEAST_WINDOW <= length <= _MOST_WINDOW:
        raise ValueError("must be from one minute to 90 days, such as 30m, 24h or 7d")
    return length


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic wants ValueError
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Priority = Annotated[Whole, Field(ge=-100, le=100)]
Weight = Annotated[float, BeforeValidator(_number), Field(ge=0.1, le=100)]
MaxTokens = Annotated[Whole, Field(ge=1, le=2**53)]
#: In the currency of the prices.
MaxCost = Annotated[float, BeforeValidator(_number), Field(ge=1e-9, le=1e9)]
Window = Annotated[timedelta | None, BeforeValidator(duration)]


class _Deadline(Sent):
    completion_window: Window = None
    expires_at: Moment = None

    @field_validator("expires_at")
    @classmethod
    def _one_of_both(cls, value: datetime | None, info: ValidationInfo) -> datetime | None:
        if value is not None and info.data.get("completion_window") is not None:
            raise ValueError("goes without completionWindow; send one of them")
        return value

    @property
    def sets_deadline(self) -> bool:
        """Whether it says anything of the deadline, be it that there is none."""
        return not self.model_fields_set.isdisjoint({"completion_window", "expires_at"})

    def deadline(self, now: datetime) -> datetime | None:
        """When nothing is begun any more; a window counts from now."""
        if self.completion_window is not None:
            return now + self.completion_window
        return self.expires_at


def problems_of_deadline(deadline: datetime | None, now: datetime) -> list[Problem]:
    """What is wrong with a deadline at this time."""
    if deadline is None:
        return []
    if deadline <= now:
        return [Problem(path="expiresAt", message="has already passed; it must be in the future")]
    return []


class BatchPatch(_Deadline):
    """Changes of a running batch. What is absent stays; null removes limits and deadline."""

    priority: Priority = 0
    weight: Weight = 1
    capacity: Capacity | None = None
    is_paused: Flag = False
    max_tokens: MaxTokens | None = None
    max_cost: MaxCost | None = None


class BatchHead(_Deadline):
    """A new batch but for its items, which are never held together."""

    type: Annotated[WireType, BeforeValidator(_upper)]
    name: Name | None = None
    metadata: Keyed = Field(default_factory=dict)
    priority: Priority = 0
    weight: Weight = 1
    max_attempts: Annotated[Whole, Field(ge=1, le=100)] | None = None
    timeout_ms: Annotated[Whole, Field(ge=100, le=600_000)] | None = None
    idempotency_key: Name | None = None
    capacity: Capacity | None = None
    max_tokens: MaxTokens | None = None
    max_cost: MaxCost | None = None
    callback_options: dict[str, Any] | None = None

    @field_validator("metadata", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("priority", "weight", mode="before")
    @classmethod
    def _null_is_usual(cls, value: object, info: ValidationInfo) -> object:
        return {"priority": 0, "weight": 1}[info.field_name or ""] if value is None else value


class BatchRetry(_Deadline):
    """Which items of a batch are to be tried again; absent: all that failed.

    ``EXPIRED`` are those failed ones that a deadline overtook. A deadline that has passed is
    replaced by the one given here (null: none).
    """

    item_ids: list[UUID] | None = None
    custom_ids: list[Text] | None = None
    indexes: list[Whole] | None = None
    error_codes: list[Text] | None = None
    statuses: list[
        Annotated[Literal["FAILED", "CANCELLED", "EXPIRED"], BeforeValidator(_upper)]
    ] = Field(default=["FAILED"], min_length=1)


class BatchCancel(Sent):
    """What becomes of calls in flight."""

    running: Annotated[Literal["ABORT", "FINISH"], BeforeValidator(_upper)] = "FINISH"
