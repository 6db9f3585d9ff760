"""Callbacks, webhooks and deliveries on the wire, and the bodies that other programs are sent.

The bodies are made with the same functions as the answers of the GET routes. Callbacks speak the
completion-batch contract, webhooks OpenAI's: snake_case, times in Unix seconds.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Final, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic import ValidationError as PydanticError

from app import courier, signatures, webhooks
from app.addresses import Guard
from app.api import wire, wire_batches
from app.api.wire import (
    MASK,
    Answer,
    Flag,
    Json,
    Name,
    Sent,
    Text,
    instant,
    instant_or_none,
    problems_of,
)
from app.batches import Batch, Status
from app.errors import Problem, ValidationError
from app.events import Kind
from app.ids import item_id
from app.items import Item
from app.webhooks import ALL, EVENT_TYPES, TOPICS, Claimed, Delivery, Endpoint

# What a callback is sent --------------------------------------------------------------------------

_STATUS: Final[dict[Kind, Status]] = {
    "item-running": "running",
    "item-completed": "completed",
    "item-failed": "failed",
    "item-cancelled": "cancelled",
    "batch-completed": "completed",
    "batch-failed": "failed",
    "batch-cancelled": "cancelled",
}


def callback_body(batch: Batch, delivery: Claimed, item: Item | None) -> bytes:
    """``ITEM_UPDATE`` of an item, or ``BATCH_UPDATE``: as it was when it happened."""
    status = _STATUS[delivery.kind]
    if item is not None:
        payload: Answer = wire_batches.item_body(batch, item, status=status)
        return wire.encode({"event": "ITEM_UPDATE", "payload": payload})
    payload = wire_batches.batch_body(replace(batch, status=status))
    return wire.encode({"event": "BATCH_UPDATE", "payload": payload})


# What a webhook is sent ---------------------------------------------------------------------------


class RequestCounts(msgspec.Struct, kw_only=True, frozen=True):
    """How many items of a batch there are, and what became of them."""

    total: int
    completed: int
    failed: int
    cancelled: int


class EventData(msgspec.Struct, kw_only=True, frozen=True):
    """The batch that an event is about: its id for either API, and how it ended."""

    id: str
    batch_id: UUID | UnsetType = UNSET
    workspace_id: UUID | UnsetType = UNSET
    environment_id: UUID | UnsetType = UNSET
    name: str | UnsetType | None = UNSET
    status: str | UnsetType = UNSET
    metadata: Json | UnsetType = UNSET
    request_counts: RequestCounts | UnsetType = UNSET


class EventBody(msgspec.Struct, kw_only=True, frozen=True):
    """An event as OpenAI's SDK and Standard Webhooks read it."""

    id: str
    object: Literal["event"] = "event"
    type: str
    created_at: int
    timestamp: str
    data: EventData


def openai_batch_id(batch_id: UUID) -> str:
    """A batch's id as the OpenAI routes show it."""
    return f"batch_{batch_id.hex}"


def webhook_body(batch: Batch | None, delivery: Claimed) -> bytes:
    """The event of a batch's end. Of one that never came to be there is only the id."""
    data = EventData(id=openai_batch_id(delivery.batch_id))
    if batch is not None:
        data = EventData(
            id=openai_batch_id(batch.batch_id),
            batch_id=batch.batch_id,
            workspace_id=batch.workspace_id,
            environment_id=batch.environment_id,
            name=batch.name,
            status=_STATUS[delivery.kind].upper(),
            metadata=batch.metadata,
            request_counts=RequestCounts(
                total=batch.total_items,
                completed=batch.completed,
                failed=batch.failed,
                cancelled=batch.cancelled,
            ),
        )
    return _event(delivery.message_id, delivery.topic, delivery.created_at, data)


def sample_body(event_id: str, event_type: str, at: datetime) -> bytes:
    """An event of a batch that there never was, to try an endpoint with."""
    return _event(event_id, event_type, at, EventData(id=openai_batch_id(UUID(int=0))))


def _event(event_id: str, event_type: str, at: datetime, data: EventData) -> bytes:
    return wire.encode(
        EventBody(
            id=event_id,
            type=event_type,
            created_at=int(at.timestamp()),
            timestamp=at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            data=data,
        )
    )


# Callback options ---------------------------------------------------------------------------------


def _topics(value: object) -> object:
    if value is None:
        return list(ALL)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of item_update, batch_update, item_running or all")
    found: list[str] = []
    for each in value:  # pyright: ignore[reportUnknownVariableType] - checked in the next line
        if not isinstance(each, str) or each.lower() not in (*TOPICS, "all"):
            raise ValueError(
                "has an entry that is none of item_update, batch_update, item_running, all"
            )
        found += ALL if each.lower() == "all" else [each.lower()]
    return list(dict.fromkeys(found))


class CallbackOptions(Sent):
    """Where a CALLBACK batch tells of itself, and of what."""

    url: Text
    headers: dict[Text, Text] | None = None
    events: Annotated[list[str], BeforeValidator(_topics)] = Field(
        default_factory=lambda: list(ALL)
    )
    secret: Annotated[Text, AfterValidator(signatures.checked_secret)] | None = None

    @field_validator("headers")
    @classmethod
    def _are_ours_left(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, message in courier.problems_of_headers(value or {}):
            raise ValueError(f"'{name[:100]}' {message}" if name else message)
        return value

    def shown(self) -> Json:
        """As it is stored with the batch and shown: without what is secret."""
        return {
            "url": self.url,
            "headers": None if self.headers is None else dict.fromkeys(self.headers, MASK),
            "events": self.events,
            "secret": MASK,
        }


def callback_options(given: Mapping[str, object] | None, guard: Guard) -> CallbackOptions:
    """The options of a CALLBACK batch. Raises ValidationError."""
    at = "callbackOptions"
    if given is None:
        raise ValidationError([Problem(path=at, message="is required by type CALLBACK")])
    try:
        options = CallbackOptions.model_validate(given)
    except PydanticError as error:
        problems = problems_of(error)
        raise ValidationError(
            [Problem(path=f"{at}.{p.path}", message=p.message) for p in problems]
        ) from None
    if (problem := guard.problem(options.url)) is not None:
        raise ValidationError([Problem(path=f"{at}.url", message=problem)])
    return options


# Deliveries ---------------------------------------------------------------------------------------


class TryBody(Answer, kw_only=True, frozen=True):
    """One try of a delivery. ``errorCode`` is null when it was taken."""

    attempt: int
    started_at: str
    latency_ms: int
    status_code: int | None
    error_code: str | None
    error_message: str | None


class DeliveryBody(Answer, kw_only=True, frozen=True):
    """An event on its way to an endpoint. ``webhookId`` is the message's id, at every try.

    A number that is missing among the attempts belongs to a process that vanished during it.
    """

    delivery_id: str
    webhook_id: str
    endpoint_id: UUID
    url: str | None
    batch_id: UUID
    item_id: UUID | None
    index: int | None
    event_no: int
    action: Kind
    status: Literal["PENDING", "DELIVERED", "DEAD"]
    reason: str | None
    attempts: list[TryBody]
    next_attempt_at: str | None
    created_at: str
    ended_at: str | None


class DeliveriesPage(Answer, kw_only=True, frozen=True):
    """Deliveries in the order of their events; ``nextCursor`` is null on the last page."""

    data: list[DeliveryBody]
    next_cursor: str | None


class Redelivered(Answer, kw_only=True, frozen=True):
    """How many deliveries are tried again."""

    redelivered: int


def delivery_id(delivery: Delivery) -> str:
    """A delivery's id: its endpoint's and its event's."""
    return f"dlv_{delivery.endpoint_id.hex}_{delivery.event_no}"


def parsed_delivery_id(text: str) -> tuple[UUID, int] | None:
    """The endpoint and the number in a delivery's id; None: it is no such id."""
    prefix, _, rest = text.partition("_")
    endpoint, _, number = rest.partition("_")
    sane = number.isascii() and number.isdecimal() and len(number) <= 18  # noqa: PLR2004 - fits bigint
    if prefix != "dlv" or not sane:
        return None
    try:
        return UUID(endpoint), int(number)
    except ValueError:
        return None


def delivery_body(delivery: Delivery) -> DeliveryBody:
    """A delivery on the wire."""
    return DeliveryBody(
        delivery_id=delivery_id(delivery),
        webhook_id=webhooks.message_id(delivery.batch_id, delivery.event_no),
        endpoint_id=delivery.endpoint_id,
        url=delivery.url,
        batch_id=delivery.batch_id,
        item_id=None if delivery.seq is None else item_id(delivery.batch_id, delivery.seq),
        index=delivery.seq,
        event_no=delivery.event_no,
        action=delivery.kind,
        status=_DELIVERY_STATUS[delivery.status],
        reason=delivery.reason,
        attempts=[
            TryBody(
                attempt=each["attempt"],
                started_at=instant(datetime.fromisoformat(each["started_at"])),
                latency_ms=each["latency_ms"],
                status_code=each["status_code"],
                error_code=each["error_code"],
                error_message=each["error_message"],
            )
            for each in delivery.tries
        ],
        next_attempt_at=instant(delivery.visible_at) if delivery.status == "pending" else None,
        created_at=instant(delivery.created_at),
        ended_at=instant_or_none(delivery.ended_at),
    )


_DELIVERY_STATUS: Final[dict[webhooks.Status, Literal["PENDING", "DELIVERED", "DEAD"]]] = {
    "pending": "PENDING",
    "delivered": "DELIVERED",
    "dead": "DEAD",
}


# Standing endpoints, as OpenAI's SDK reads them ---------------------------------------------------


class EndpointBody(msgspec.Struct, kw_only=True, frozen=True):
    """A webhook endpoint. ``disabled_reason``: nothing is sent to it, and why; null: it is."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    signing_secret: str | UnsetType = UNSET
    disabled_reason: str | None


class EndpointsPage(msgspec.Struct, kw_only=True, frozen=True):
    """Webhook endpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[EndpointBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EndpointDeleted(msgspec.Struct, kw_only=True, frozen=True):
    """That an endpoint is gone."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class EndpointTested(msgspec.Struct, kw_only=True, frozen=True):
    """What a receiver answered to a sample event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int
    success: bool = True
    webhook_endpoint_id: str


class EventTypes(msgspec.Struct, kw_only=True, frozen=True):
    """The types of events that there are."""

    object: Literal["list"] = "list"
    data: list[str]


def wire_endpoint_id(endpoint_id: UUID) -> str:
    """An endpoint's id as the OpenAI routes show it."""
    return f"whe_{endpoint_id.hex}"


def parsed_endpoint_id(text: str) -> UUID | None:
    """The id behind it; None: it is no such id."""
    try:
        return UUID(text.removeprefix("whe_")) if text.startswith("whe_") else None
    except ValueError:
        return None


def endpoint_body(endpoint: Endpoint, *, secret: str | None = None) -> EndpointBody:
    """An endpoint on the wire, with its secret where that is to be shown."""
    return EndpointBody(
        id=wire_endpoint_id(endpoint.endpoint_id),
        name=endpoint.name or "",
        url=endpoint.url,
        event_types=endpoint.event_types,
        created_at=int(endpoint.created_at.timestamp()),
        updated_at=int(endpoint.updated_at.timestamp()),
        signing_secret_hint=endpoint.secret_hint,
        signing_secret=UNSET if secret is None else secret,
        disabled_reason=endpoint.disabled_reason,
    )


def _event_types(value: list[str]) -> list[str]:
    for each in value:
        if each not in EVENT_TYPES:
            raise ValueError(f"has an entry that is none of {', '.join(EVENT_TYPES)}")
    return list(dict.fromkeys(value))


WireEventTypes = Annotated[
    list[Text], Field(min_length=1, max_length=100), AfterValidator(_event_types)
]


class _Snake(Sent, alias_generator=None, populate_by_name=True):
    """What a client of the OpenAI routes sends."""


class EndpointCreate(_Snake):
    """A new webhook endpoint."""

    name: Name
    url: Text
    event_types: WireEventTypes


class EndpointPatch(_Snake):
    """Changes of a webhook endpoint. What is absent stays."""

    name: Name = ""
    url: Text = ""
    event_types: WireEventTypes = Field(default_factory=list)


class SecretRotation(_Snake):
    """Whether the old secret signs too for a day."""

    keep_old_secret_active_for_24_hours: Flag = False


def rotation(given: Json) -> SecretRotation:
    """What is said of a rotation. Raises ValidationError."""
    try:
        return SecretRotation.model_validate(given)
    except PydanticError as error:
        raise ValidationError(problems_of(error)) from None


class EndpointTest(_Snake):
    """Which event to send as a sample."""

    event_type: Literal["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]
