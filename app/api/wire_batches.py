"""Batches and their items on the wire."""

import re
from collections.abc import Mapping, Sequence
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
    Whole,
    instant,
    instant_or_none,
)
from app.api.wire_capacity import (
    Capacity,
    EtaBody,
    LimitRef,
    WaitingBody,
    eta_body,
    limit_ref,
    waiting_body,
)
from app.api.wire_tenants import ApiKeyBody
from app.batches import Appraisal, Batch, Item, Status
from app.errors import Problem
from app.forecast import Outlook, Plan
from app.ids import item_id

WireStatus = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]
WireType = Literal["SYNC", "ASYNC", "CALLBACK"]


# Answers ------------------------------------------------------------------------------------------


class ItemResponse(Answer, kw_only=True, frozen=True):
    """The provider's reply: its body as it came, and its x- headers."""

    data: Json
    headers: dict[str, str]


class ItemBody(Answer, kw_only=True, frozen=True):
    """An item. ``outputTokens`` and ``completionTokens`` are the same number."""

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    item_id: UUID
    index: int
    custom_id: str | None
    resource_id: UUID
    status: WireStatus
    request: Json | UnsetType = UNSET
    response: ItemResponse | UnsetType | None = UNSET
    model: str | None
    estimated_prompt_tokens: int
    prompt_tokens: int
    output_tokens: int
    completion_tokens: int
    total_tokens: int
    error_code: str | None
    error_message: str | None
    error_details: dict[str, int] | None
    retry_count: int
    attempts: int
    next_attempt_at: str | None
    created_at: str
    started_at: str | None
    completed_at: str | None


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
    created_by_user: Json | UnsetType | None = UNSET
    created_by_api_key: ApiKeyBody | UnsetType | None = UNSET
    items: list[ItemBody] | UnsetType = UNSET
    items_next_cursor: str | UnsetType | None = UNSET


class ItemsPage(Answer, kw_only=True, frozen=True):
    """Items in the order of submission; ``nextCursor`` is null on the last page."""

    data: list[ItemBody]
    next_cursor: str | None


class BatchesPage(Answer, kw_only=True, frozen=True):
    """Batches, newest first; ``nextCursor`` is null on the last page."""

    data: list[BatchBody]
    next_cursor: str | None


def _verbatim(text: str) -> Json:
    """Stored JSON as a value that is encoded to the letter."""
    return cast("Json", cast("object", msgspec.Raw(text.encode())))


def item_body(
    batch: Batch, item: Item, *, status: Status | None = None, slim: bool = False
) -> ItemBody:
    """An item on the wire.

    ``status``: show it as it was in this state, for the event that brought it there. ``slim``:
    without request and response.
    """
    shown = status or item.status
    ended = shown in ("completed", "failed", "cancelled")
    answered = shown == "completed"
    prompt_tokens = (item.input_tokens or 0) if answered else 0
    output_tokens = (item.output_tokens or 0) if answered else 0
    response: ItemResponse | UnsetType | None = UNSET if slim else None
    if answered and not slim and item.response is not None:
        response = ItemResponse(data=_verbatim(item.response), headers=item.headers or {})
    failed = shown == "failed"
    return ItemBody(
        workspace_id=item.workspace_id,
        environment_id=batch.environment_id,
        batch_id=item.batch_id,
        item_id=item_id(item.batch_id, item.seq),
        index=item.seq,
        custom_id=item.custom_id,
        resource_id=item.resource_id,
        status=_status(shown),
        request=UNSET if slim else _verbatim(item.request),
        response=response,
        model=item.model if answered else None,
        estimated_prompt_tokens=item.estimated_input_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        completion_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
        error_code=item.error_code if failed else None,
        error_message=item.error_message if failed else None,
        error_details={"statusCode": item.status_code}
        if failed and item.status_code is not None
        else None,
        retry_count=item.failures,
        attempts=item.attempt,
        next_attempt_at=instant(item.visible_at)
        if shown == "pending" and item.status == "pending" and item.attempt
        else None,
        created_at=instant(item.created_at),
        started_at=instant_or_none(item.claimed_at),
        completed_at=instant_or_none(item.ended_at) if ended else None,
    )


def batch_body(
    batch: Batch,
    *,
    items: Sequence[ItemBody] | None = None,
    items_next_cursor: str | None = None,
    created_by: ApiKeyBody | UnsetType | None = UNSET,
    outlook: Outlook | None = None,
) -> BatchBody:
    """A batch on the wire; what is not given is absent there."""
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
        expires_at=instant_or_none(batch.expires_at),
        expired_at=instant_or_none(batch.expired_at),
        waiting_for=UNSET if outlook is None else waiting_body(outlook.waiting),
        eta=UNSET if outlook is None else eta_body(outlook.eta),
        callback_options=_masked_callback(batch.callback_options),
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
        created_by_user_id=None,
        created_by_api_key_id=batch.created_by_api_key_id,
        created_by_user=UNSET if created_by is UNSET else None,
        created_by_api_key=created_by,
        items=UNSET if items is None else list(items),
        items_next_cursor=UNSET if items is None else items_next_cursor,
    )


def _status(status: Status) -> WireStatus:
    return cast("WireStatus", status.upper())


def _masked_callback(options: Mapping[str, Any] | None) -> Json | None:
    """Callback options without their secrets: header values are often credentials."""
    if options is None:
        return None
    shown: Json = {k: v for k, v in options.items() if k != "secret"}
    headers = options.get("headers")
    if isinstance(headers, Mapping):
        shown["headers"] = dict.fromkeys(cast("Mapping[str, object]", headers), MASK)
    return shown


class ImpossibleItem(Answer, kw_only=True, frozen=True):
    """An item that could never be sent."""

    index: int
    reason: str


class EstimateBody(Answer, kw_only=True, frozen=True):
    """What a batch would ask for, and how long it would take. Nothing of it is stored.

    ``impossibleItems`` names the first hundred of ``impossibleCount``; the sums are of the others.
    """

    items: int
    impossible_count: int
    impossible_items: list[ImpossibleItem]
    estimated_prompt_tokens: int
    expected_output_tokens: int
    total_tokens: int
    items_ahead: int
    eta: EtaBody | None
    expires_at: str | None
    is_feasible: bool | None
    infeasible_reason: str | None
    limit: LimitRef | None


def estimate_body(appraisal: Appraisal, plan: Plan, *, expires_at: datetime | None) -> EstimateBody:
    """A dry run on the wire."""
    is_feasible, why_not = plan.is_feasible, plan.why_not
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

    @property
    def sets_deadline(self) -> bool:
        """Whether it says anything of the deadline, be it that there is none."""
        return not self.model_fields_set.isdisjoint({"completion_window", "expires_at"})


class BatchHead(_Deadline):
    """A new batch but for its items, which are never held together."""

    type: Annotated[WireType, BeforeValidator(_upper)]
    name: Name | None = None
    metadata: Keyed = Field(default_factory=dict)
    priority: Priority = 0
    weight: Weight = 1
    max_attempts: Annotated[Whole, Field(ge=1, le=100)] | None = None
    idempotency_key: Name | None = None
    capacity: Capacity | None = None
    callback_options: dict[str, Any] | None = None

    @field_validator("metadata", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("priority", "weight", mode="before")
    @classmethod
    def _null_is_usual(cls, value: object, info: ValidationInfo) -> object:
        return {"priority": 0, "weight": 1}[info.field_name or ""] if value is None else value
