"""Limits on the wire: as people set them, where they stand, what is waited for, and for how long."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel

from app import capacity as limits
from app.api.wire import Answer, Flag, Json, Name, Sent, Whole, instant, instant_or_none
from app.capacity import Amount, Learned, NamedScope, Period, Usage
from app.forecast import Eta, LimitOf, Waiting


class ScopeBody(Answer, kw_only=True, frozen=True):
    """What a limit is set on. ``id`` is null for a model, and for one value of a dimension."""

    kind: str
    id: UUID | None
    name: str | None
    dimension: str | None
    dimension_field: str | None
    dimension_value: str | None


class LimitRef(Answer, kw_only=True, frozen=True):
    """A limit, and which of its kinds: requests, tokens, inputTokens or outputTokens."""

    period: Period
    window: str
    source: str
    kind: str
    amount: int
    scope: ScopeBody


class WaitingBody(Answer, kw_only=True, frozen=True):
    """Why nothing can be begun now; ``until`` is null where nobody can know."""

    reason: str
    scope: ScopeBody | None
    limit: LimitRef | None
    until: str | None
    items_ahead: int
    tokens_ahead: int


class EtaBody(Answer, kw_only=True, frozen=True):
    """When the last item will be begun, how fast that is, and the limit that decides it."""

    at: str
    seconds_left: int
    requests_per_minute: float | None
    tokens_per_minute: float | None
    limit: LimitRef | None


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


class KindUsage(Answer, kw_only=True, frozen=True):
    """One kind of a limit: ``limit`` = ``used`` + ``reserved`` + ``remaining``, unless it is overdrawn.

    ``reserved`` is what calls in flight have taken. ``releasedNext``: what stops counting at the
    limit's ``nextReleaseAt``.
    """

    limit: int
    used: int
    reserved: int
    remaining: int
    released_next: int


class LimitUsage(Answer, kw_only=True, frozen=True):
    """Where a limit stands; the kinds that it does not bound are null."""

    period: Period
    window: str
    source: str
    requests: KindUsage | None
    tokens: KindUsage | None
    input_tokens: KindUsage | None
    output_tokens: KindUsage | None
    next_release_at: str | None


class ScopeUsage(Answer, kw_only=True, frozen=True):
    """A scope and its limits."""

    scope: ScopeBody
    limits: list[LimitUsage]


class CapacityUsage(Answer, kw_only=True, frozen=True):
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


class DiscoveredModel(Answer, kw_only=True, frozen=True):
    """What a provider stated of a model's limits within the last week."""

    updated_at: str
    capacity: list[Json]


class Discovered(Answer, kw_only=True, frozen=True):
    """The same by the model's name."""

    models: dict[str, DiscoveredModel]


class LearnedBody(Answer, kw_only=True, frozen=True):
    """What refusals taught: requests per minute and calls at once that are borne, and a rest."""

    ceiling: int | None
    concurrency: int | None
    blocked_until: str | None
    blocked_reason: str | None


class LearnedModels(Answer, kw_only=True, frozen=True):
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


# Requests -----------------------------------------------------------------------------------------


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Count = Annotated[Whole, Field(ge=0, le=2**53)]


class CapacityEntry(Sent):
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


def said(change: Sent, capacity: Sequence[CapacityEntry] | None) -> dict[str, Any]:
    """What a change says, by the names of its row; limits as they are stored."""
    fields = {name: getattr(change, name) for name in change.model_fields_set}
    if "capacity" in fields:
        fields["capacity"] = capacity_entries(capacity)
    return fields


def amounts(capacity: Sequence[CapacityEntry] | None) -> list[Amount]:
    """Those limits that are in force."""
    made = [entry.amount for entry in capacity or () if entry.enabled is not False]
    return [amount for amount in made if any(bound is not None for bound in amount.bounds)]


def stored_amounts(entries: Sequence[Mapping[str, object]]) -> list[Amount]:
    """The same of limits as they are stored."""
    return amounts([CapacityEntry.model_validate(entry) for entry in entries])
