"""The JSON of requests and answers, and how it is made from rows.

Answers are msgspec structs: one page may hold a thousand items. A request's body and a provider's
reply are embedded as they were stored, to the letter: key order, numbers and escapes stay. What
strangers send is pydantic's to validate. Names are camelCase, states upper case, times RFC 3339 in
UTC with milliseconds.
"""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic import ValidationError as PydanticError
from pydantic.alias_generators import to_camel

from app import capacity as limits
from app.batches import Appraisal, Batch, Item, Status
from app.capacity import Amount, Learned, NamedScope, Period, Usage
from app.errors import Problem
from app.forecast import Eta, LimitOf, Outlook, Plan, Waiting
from app.ids import item_id
from app.tenants import ApiKey, ApiKeyEntity, ProviderConnection, Resource

WireStatus = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]
WireType = Literal["SYNC", "ASYNC", "CALLBACK"]
Json = dict[str, object]

MASK = "********"

encode = msgspec.json.Encoder().encode


def verbatim(text: str) -> Json:
    """Stored JSON as a value that is encoded to the letter."""
    return cast("Json", cast("object", msgspec.Raw(text.encode())))


def instant(at: datetime) -> str:
    """A time as the wire shows it."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def instant_or_none(at: datetime | None) -> str | None:
    """The same for what may not have happened yet."""
    return None if at is None else instant(at)


# Answers: batches and items -----------------------------------------------------------------------


class _Answer(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    pass


class ItemResponse(_Answer, kw_only=True, frozen=True):
    """The provider's reply: its body as it came, and its x- headers."""

    data: Json
    headers: dict[str, str]


class ItemBody(_Answer, kw_only=True, frozen=True):
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


class ApiKeyBody(_Answer, kw_only=True, frozen=True):
    """An api key; ``apiKeyValue`` is shown once, by its creation."""

    api_key_id: UUID
    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    enabled: bool
    resources: list[str]
    labels: list[str]
    enforce_capacity: bool
    capacity: list[Json]
    masked_key: str
    expires_at: str | None
    last_used_at: str | None
    created_at: str
    updated_at: str
    created_by: UUID | None = None
    updated_by: UUID | None = None
    api_key_value: str | UnsetType = UNSET


class ScopeBody(_Answer, kw_only=True, frozen=True):
    """What a limit is set on. ``id`` is null for a model, and for one value of a dimension."""

    kind: str
    id: UUID | None
    name: str | None
    dimension: str | None
    dimension_field: str | None
    dimension_value: str | None


class LimitRef(_Answer, kw_only=True, frozen=True):
    """A limit, and which of its kinds: requests, tokens, inputTokens or outputTokens."""

    period: Period
    window: str
    source: str
    kind: str
    amount: int
    scope: ScopeBody


class WaitingBody(_Answer, kw_only=True, frozen=True):
    """Why nothing can be begun now; ``until`` is null where nobody can know."""

    reason: str
    scope: ScopeBody | None
    limit: LimitRef | None
    until: str | None
    items_ahead: int
    tokens_ahead: int


class EtaBody(_Answer, kw_only=True, frozen=True):
    """When the last item will be begun, how fast that is, and the limit that decides it."""

    at: str
    seconds_left: int
    requests_per_minute: float | None
    tokens_per_minute: float | None
    limit: LimitRef | None


class BatchBody(_Answer, kw_only=True, frozen=True):
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


class ItemsPage(_Answer, kw_only=True, frozen=True):
    """Items in the order of submission; ``nextCursor`` is null on the last page."""

    data: list[ItemBody]
    next_cursor: str | None


class BatchesPage(_Answer, kw_only=True, frozen=True):
    """Batches, newest first; ``nextCursor`` is null on the last page."""

    data: list[BatchBody]
    next_cursor: str | None


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
        response = ItemResponse(data=verbatim(item.response), headers=item.headers or {})
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
        request=UNSET if slim else verbatim(item.request),
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


# Answers: capacity --------------------------------------------------------------------------------


_SCOPE_KINDS: Final[Mapping[str, str]] = {"api_key": "api-key"}
_KINDS: Final[Mapping[str, str]] = {kind: to_camel(kind) for kind in limits.KINDS}


def _window(sliding: bool) -> str:  # noqa: FBT001 - the row's own flag
    return "sliding" if sliding else "calendar"


def scope_body(scope: NamedScope) -> ScopeBody:
    """A scope on the wire. Ids that name nothing outside are not shown."""
    dimension, field = _dimension(scope.dimension)
    return ScopeBody(
        kind=_SCOPE_KINDS.get(scope.kind, scope.kind),
        id=None if scope.kind in ("model", "value") else scope.scope_id,
        name=scope.name,
        dimension=dimension,
        dimension_field=field,
        dimension_value=scope.value,
    )


def _dimension(stored: str | None) -> tuple[str | None, str | None]:
    if stored is None or not stored.startswith(limits.METADATA):
        return stored, None
    return "metadata", stored.removeprefix(limits.METADATA)


def limit_ref(limit: LimitOf | None) -> LimitRef | None:
    """A limit on the wire."""
    if limit is None:
        return None
    return LimitRef(
        period=limit.period,
        window=_window(limit.is_sliding),
        source=limit.source,
        kind=_KINDS[limit.kind],
        amount=limit.most,
        scope=scope_body(limit.scope),
    )


def waiting_body(waiting: Waiting | None) -> WaitingBody | None:
    """What something waits for, on the wire."""
    if waiting is None:
        return None
    return WaitingBody(
        reason=waiting.reason.upper(),
        scope=None if waiting.scope is None else scope_body(waiting.scope),
        limit=limit_ref(waiting.limit),
        until=instant_or_none(waiting.until),
        items_ahead=waiting.items_ahead,
        tokens_ahead=waiting.tokens_ahead,
    )


def eta_body(eta: Eta | None) -> EtaBody | None:
    """An estimate on the wire."""
    if eta is None:
        return None
    return EtaBody(
        at=instant(eta.at),
        seconds_left=math.ceil(eta.seconds_left),
        requests_per_minute=_rounded(eta.requests_per_minute),
        tokens_per_minute=_rounded(eta.tokens_per_minute),
        limit=limit_ref(eta.limit),
    )


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


class KindUsage(_Answer, kw_only=True, frozen=True):
    """One kind of a limit: ``limit`` = ``used`` + ``reserved`` + ``remaining``, unless it is overdrawn.

    ``reserved`` is what calls in flight have taken. ``releasedNext``: what stops counting at the
    limit's ``nextReleaseAt``.
    """

    limit: int
    used: int
    reserved: int
    remaining: int
    released_next: int


class LimitUsage(_Answer, kw_only=True, frozen=True):
    """Where a limit stands; the kinds that it does not bound are null."""

    period: Period
    window: str
    source: str
    requests: KindUsage | None
    tokens: KindUsage | None
    input_tokens: KindUsage | None
    output_tokens: KindUsage | None
    next_release_at: str | None


class ScopeUsage(_Answer, kw_only=True, frozen=True):
    """A scope and its limits."""

    scope: ScopeBody
    limits: list[LimitUsage]


class CapacityUsage(_Answer, kw_only=True, frozen=True):
    """Every limit that binds; scopes without any are left out."""

    scopes: list[ScopeUsage]


def capacity_usage(scopes: Mapping[UUID, NamedScope], usage: Sequence[Usage]) -> CapacityUsage:
    """Where the limits of scopes stand, on the wire."""
    shown: list[ScopeUsage] = []
    for scope in scopes.values():
        own = [u for u in usage if u.scope_id == scope.scope_id and u.bounds]
        if own:
            shown.append(
                ScopeUsage(scope=scope_body(scope), limits=[_limit_usage(each) for each in own])
            )
    return CapacityUsage(scopes=shown)


def _limit_usage(usage: Usage) -> LimitUsage:
    used, reserved, released = usage.used, usage.reserved, usage.released
    kinds = {
        kind: KindUsage(
            limit=most,
            used=max(used[kind] - reserved[kind], 0),
            reserved=reserved[kind],
            remaining=max(most - used[kind], 0),
            released_next=released[kind],
        )
        for kind, most in usage.bounds.items()
    }
    return LimitUsage(
        period=usage.period,
        window=_window(usage.sliding),
        source=usage.source,
        requests=kinds.get("requests"),
        tokens=kinds.get("tokens"),
        input_tokens=kinds.get("input_tokens"),
        output_tokens=kinds.get("output_tokens"),
        next_release_at=instant_or_none(usage.release_at),
    )


class DiscoveredModel(_Answer, kw_only=True, frozen=True):
    """What a provider stated of a model's limits within the last week."""

    updated_at: str
    capacity: list[Json]


class Discovered(_Answer, kw_only=True, frozen=True):
    """The same by the model's name."""

    models: dict[str, DiscoveredModel]


class LearnedBody(_Answer, kw_only=True, frozen=True):
    """What refusals taught: requests per minute and calls at once that are borne, and a rest."""

    ceiling: int | None
    concurrency: int | None
    blocked_until: str | None
    blocked_reason: str | None


class LearnedModels(_Answer, kw_only=True, frozen=True):
    """The same by the model's name, and the rest of the whole account."""

    blocked_until: str | None
    blocked_reason: str | None
    models: dict[str, LearnedBody]


def discovered(rows: Sequence[Learned]) -> Discovered | None:
    """What a provider stated; null: nothing within the last week."""
    models: dict[str, DiscoveredModel] = {}
    for row in rows:
        if row.model is None or row.period is None or row.observed_at is None:
            continue
        entry: Json = {
            "period": row.period,
            "requests": row.requests,
            "tokens": row.tokens,
            "inputTokens": row.input_tokens,
            "outputTokens": row.output_tokens,
            "enabled": True,
        }
        known = models.get(row.model)
        seen = instant(row.observed_at)
        models[row.model] = DiscoveredModel(
            updated_at=seen if known is None else max(seen, known.updated_at),
            capacity=[entry] if known is None else [*known.capacity, entry],
        )
    return Discovered(models=models) if models else None


def learned(rows: Sequence[Learned]) -> LearnedModels:
    """What refusals taught."""
    account = next((row for row in rows if row.model is None), None)
    return LearnedModels(
        blocked_until=None if account is None else instant_or_none(account.blocked_until),
        blocked_reason=None if account is None else account.blocked_reason,
        models={
            row.model: LearnedBody(
                ceiling=row.ceiling,
                concurrency=row.concurrency,
                blocked_until=instant_or_none(row.blocked_until),
                blocked_reason=row.blocked_reason,
            )
            for row in rows
            if row.model is not None
        },
    )


class ImpossibleItem(_Answer, kw_only=True, frozen=True):
    """An item that could never be sent."""

    index: int
    reason: str


class EstimateBody(_Answer, kw_only=True, frozen=True):
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


# Answers: tenants ---------------------------------------------------------------------------------


class WhoAmI(_Answer, kw_only=True, frozen=True):
    """What the caller's key opens."""

    workspace_id: UUID
    environment_id: UUID
    api_key_id: UUID
    name: str
    masked_key: str
    resources: list[str]


class ConnectionBody(_Answer, kw_only=True, frozen=True):
    """An account at a provider. Secrets and header values are masked."""

    connection_id: UUID
    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    provider: str
    base_url: str
    headers: dict[str, str]
    config: dict[str, str]
    allowed_models: list[str] | None
    capacity: list[Json]
    discovered_capacity: Discovered | None
    learned: LearnedModels
    timeout_ms: int
    concurrency: int | None
    created_at: str
    updated_at: str


class ResourceModelBody(_Answer, kw_only=True, frozen=True):
    """Which model, on which connection."""

    provider: str
    model: str
    connection_id: UUID


class ResourceBody(_Answer, kw_only=True, frozen=True):
    """A named model that items may ask."""

    resource_id: UUID
    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    model: ResourceModelBody
    use_fallback: bool
    default_args: Json
    capacity: list[Json]
    enforce_capacity: bool
    discovered_capacity: Discovered | None
    learned: LearnedModels
    waiting_for: WaitingBody | None
    timeout_ms: int | None
    concurrency: int | None
    created_at: str
    updated_at: str


def who_am_i(key: ApiKey) -> WhoAmI:
    """The caller on the wire."""
    return WhoAmI(
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        api_key_id=key.api_key_id,
        name=key.name,
        masked_key=key.masked_key,
        resources=key.resources,
    )


def api_key_body(key: ApiKeyEntity, *, value: str | None = None) -> ApiKeyBody:
    """An api key on the wire; ``value`` only for its creator, once."""
    return ApiKeyBody(
        api_key_id=key.api_key_id,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        name=key.name,
        description=key.description,
        enabled=key.enabled,
        resources=key.resources,
        labels=key.labels,
        enforce_capacity=key.enforce_capacity,
        capacity=cast("list[Json]", key.capacity),
        masked_key=key.masked_key,
        expires_at=instant_or_none(key.expires_at),
        last_used_at=instant_or_none(key.last_used_at),
        created_at=instant(key.created_at),
        updated_at=instant(key.updated_at),
        api_key_value=UNSET if value is None else value,
    )


def connection_body(of: ProviderConnection, taught: Sequence[Learned]) -> ConnectionBody:
    """A connection on the wire."""
    return ConnectionBody(
        connection_id=of.connection_id,
        workspace_id=of.workspace_id,
        environment_id=of.environment_id,
        name=of.name,
        description=of.description,
        provider=of.provider,
        base_url=of.base_url,
        headers=dict.fromkeys(of.headers, MASK),
        config={"baseUrl": of.base_url} | ({} if of.secret is None else {"apiKey": MASK}),
        allowed_models=of.allowed_models,
        capacity=cast("list[Json]", of.capacity),
        discovered_capacity=discovered(taught),
        learned=learned(taught),
        timeout_ms=of.timeout_ms,
        concurrency=of.concurrency,
        created_at=instant(of.created_at),
        updated_at=instant(of.updated_at),
    )


def resource_body(of: Resource, taught: Sequence[Learned], waiting: Waiting | None) -> ResourceBody:
    """A resource on the wire."""
    return ResourceBody(
        resource_id=of.resource_id,
        workspace_id=of.workspace_id,
        environment_id=of.environment_id,
        name=of.name,
        description=of.description,
        model=ResourceModelBody(
            provider=of.provider, model=of.model, connection_id=of.connection_id
        ),
        use_fallback=False,
        default_args=of.default_args,
        capacity=cast("list[Json]", of.capacity),
        enforce_capacity=of.enforce_capacity,
        discovered_capacity=discovered(taught),
        learned=learned(taught),
        waiting_for=waiting_body(waiting),
        timeout_ms=of.timeout_ms,
        concurrency=of.concurrency,
        created_at=instant(of.created_at),
        updated_at=instant(of.updated_at),
    )


# Requests -----------------------------------------------------------------------------------------


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _check(value: object) -> None:
    """Refuse what Postgres cannot keep in text: NUL, and halves of surrogate pairs."""
    match value:
        case str():
            if "\0" in value:
                raise ValueError("must not contain the character \\u0000")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("must not contain half of a surrogate pair") from None
        case dict():
            for key, each in cast("dict[object, object]", value).items():
                _check(key)
                _check(each)
        case list():
            for each in cast("list[object]", value):
                _check(each)
        case _:
            pass


def _storable(value: object) -> object:
    _check(value)
    return value


# Not pydantic's strict mode: Litestar's plugin calls it in a way that overrides a field's own.
def _whole(value: object) -> object:
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004 - pydantic wants ValueError
    return value


Text = Annotated[str, BeforeValidator(_storable)]
Name = Annotated[str, BeforeValidator(_storable), Field(min_length=1, max_length=200)]
Keyed = Annotated[dict[str, Any], BeforeValidator(_storable)]


class _Sent(BaseModel):
    """What a client sends. Unknown keys are ignored, as the reference's clients expect."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=False, extra="ignore", strict=False
    )


Flag = Annotated[bool, BeforeValidator(_boolean)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**53)]


class CapacityEntry(_Sent):
    """So many requests and tokens per period; null, 0 and absent mean any number.

    ``tokens`` are input and output together. ``window``: sliding counts the last period up to now,
    calendar the present one in UTC; absent, minute and hour slide and the others do not.
    ``dimension``: count apart for every client address (source-ip), or for every value that batches
    have in their metadata under ``dimensionField`` (metadata).
    """

    period: Annotated[Period, BeforeValidator(_lower)]
    requests: Count | None = None
    tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    window: Annotated[Literal["sliding", "calendar"], BeforeValidator(_lower)] | None = None
    enabled: Flag | None = None
    dimension_field: Name | None = None
    # After dimension_field, which its validator looks at.
    dimension: Annotated[Literal["source-ip", "metadata"], BeforeValidator(_lower)] | None = Field(
        default=None, validate_default=True
    )

    @field_validator("window")
    @classmethod
    def _a_lifetime_never_slides(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == "sliding" and info.data.get("period") == "lifetime":
            raise ValueError("a lifetime never slides; leave it out")
        return value

    @field_validator("dimension")
    @classmethod
    def _metadata_names_its_field(cls, value: str | None, info: ValidationInfo) -> str | None:
        field = info.data.get("dimension_field")
        if value == "metadata" and field is None and "dimension_field" in info.data:
            raise ValueError("metadata needs dimensionField, the field to count by")
        if value != "metadata" and field is not None:
            raise ValueError("must be metadata where there is a dimensionField")
        return value

    @property
    def amount(self) -> Amount:
        """The same as it is enforced."""
        dimension = self.dimension
        if dimension == "metadata":
            dimension = f"{limits.METADATA}{self.dimension_field}"
        return Amount(
            period=self.period,
            requests=self.requests or None,
            tokens=self.tokens or None,
            input_tokens=self.input_tokens or None,
            output_tokens=self.output_tokens or None,
            sliding=None if self.window is None else self.window == "sliding",
            dimension=dimension,
        )


Capacity = Annotated[list[CapacityEntry], Field(max_length=50)]


def capacity_entries(capacity: Sequence[CapacityEntry] | None) -> list[Json]:
    """Limits as they are stored and shown."""
    return [
        {
            "period": entry.period,
            "requests": entry.requests,
            "tokens": entry.tokens,
            "inputTokens": entry.input_tokens,
            "outputTokens": entry.output_tokens,
            "window": entry.window,
            "dimension": entry.dimension,
            "dimensionField": entry.dimension_field,
            "enabled": entry.enabled is not False,
        }
        for entry in capacity or ()
    ]


def amounts(capacity: Sequence[CapacityEntry] | None) -> list[Amount]:
    """Those limits that are in force."""
    made = [entry.amount for entry in capacity or () if entry.enabled is not False]
    return [amount for amount in made if any(bound is not None for bound in amount.bounds)]


_WINDOW: Final = re.compile(r"([1-9]\d{0,8})([smhd])")
_UNITS: Final = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}
_LEAST_WINDOW: Final = timedelta(minutes=1)
_MOST_WINDOW: Final = timedelta(days=90)


def _duration(value: object) -> object:
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


def _moment(value: object) -> object:
    if value is None or isinstance(value, datetime):
        return value
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError("must be a time with its zone, such as 2030-01-31T00:00:00Z")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time that a calendar has") from None


Priority = Annotated[int, BeforeValidator(_whole), Field(ge=-100, le=100)]
Weight = Annotated[float, BeforeValidator(_number), Field(ge=0.1, le=100)]
Window = Annotated[timedelta | None, BeforeValidator(_duration)]
Moment = Annotated[datetime | None, BeforeValidator(_moment)]
Concurrency = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1_000_000)]


class _Deadline(_Sent):
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
    max_attempts: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=100)] | None = None
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


def problems_of(error: PydanticError) -> list[Problem]:
    """What pydantic found, in our words and with the wire's paths."""
    found: list[Problem] = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        path = ""
        for part in each["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "missing":
            message = "is required"
        found.append(Problem(path=path or "body", message=message))
    return found


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("must be an http or https address without a user, such as https://host/v1")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment")
    return value.rstrip("/")


class ConnectionConfig(_Sent):
    """The contract's nested form of the same fields."""

    api_key: Text | None = None
    base_url: Text | None = None


class ConnectionCreate(_Sent):
    """A new account at a provider. ``apiKey`` and ``baseUrl`` may also stand in ``config``."""

    name: Name
    description: Text | None = None
    provider: Name = "openai-compatible"
    base_url: Text | None = None
    api_key: Text | None = None
    config: ConnectionConfig | None = None
    headers: dict[Text, Text] | None = None
    allowed_models: list[Text] | None = None
    capacity: Capacity | None = None
    timeout_ms: Annotated[int, BeforeValidator(_whole), Field(ge=100, le=600_000)] | None = None
    concurrency: Concurrency | None = None

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value)

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, text in (value or {}).items():
            if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"'{name}' is not the name of a header")
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"the value of '{name}' must be printable ASCII")
        return value


class ResourceModel(_Sent):
    """Which model, on which connection."""

    model: Name
    connection_id: UUID
    provider: Text | None = None


class ResourceCreate(_Sent):
    """A new named model. Fallbacks, routing and secondary models are refused, not ignored."""

    name: Name
    description: Text | None = None
    model: ResourceModel
    default_args: Keyed | None = None
    capacity: Capacity | None = None
    enforce_capacity: Flag | None = None
    timeout_ms: Annotated[int, BeforeValidator(_whole), Field(ge=100, le=600_000)] | None = None
    concurrency: Concurrency | None = None
    assign_api_keys: Annotated[list[UUID], Field(max_length=1000)] | None = None
    use_fallback: Flag | None = None
    fallback_models: list[Any] | None = None
    secondary_models: list[Any] | None = None
    routing: dict[str, Any] | None = None

    @field_validator("use_fallback", "fallback_models", "secondary_models")
    @classmethod
    def _not_yet(cls, value: object) -> object:
        if value:
            raise ValueError("is not supported yet; leave it out")
        return value

    @field_validator("routing")
    @classmethod
    def _no_routing(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("enabled") is not False:
            raise ValueError("is not supported yet; leave it out")
        return value


class ApiKeyCreate(_Sent):
    """A new api key. ``resources``: ids of resources, or ``["*"]``."""

    name: Name
    description: Text | None = None
    enabled: Flag = True
    resources: Annotated[list[Text], Field(max_length=1000)]
    labels: Annotated[list[Text], Field(max_length=100)] | None = None
    enforce_capacity: Flag = True
    capacity: Capacity | None = None
    expires_at: datetime | None = None

    @field_validator("resources")
    @classmethod
    def _are_ids(cls, value: list[str]) -> list[str]:
        try:
            return [each if each == "*" else str(UUID(each)) for each in value]
        except ValueError:
            raise ValueError("must be ids of resources, or *") from None

    @field_validator("expires_at")
    @classmethod
    def _has_a_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("must carry a time zone, such as 2030-01-31T00:00:00Z")
        return value
