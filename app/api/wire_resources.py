"""Resources on the wire: their models, fallbacks and rules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, cast
from uuid import UUID

from pydantic import Field

from app.api.wire import Answer, Flag, Json, Keyed, Name, Sent, Text, Whole, instant
from app.api.wire_capacity import (
    Capacity,
    Discovered,
    LearnedModels,
    WaitingBody,
    discovered,
    learned,
    said,
    waiting_body,
)
from app.api.wire_connections import Concurrency, Timeout
from app.capacity import Learned
from app.errors import Problem
from app.forecast import Waiting
from app.resources import FALLBACK_ON, Choices, ModelAt, Resource
from app.routing import Rules, parse

_MOST_ALTERNATES: Final = 20

# Answers ------------------------------------------------------------------------------------------


class ResourceModelBody(Answer, kw_only=True, frozen=True):
    """Which model, on which connection."""

    provider: str
    model: str
    connection_id: UUID


class ResourceBody(Answer, kw_only=True, frozen=True):
    """A named model that items may ask, and those that may answer in its place."""

    resource_id: UUID
    workspace_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    model: ResourceModelBody
    use_fallback: bool
    fallback_models: list[ResourceModelBody]
    fallback_on: Json
    secondary_models: list[ResourceModelBody]
    routing: Json | None
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
    created_by: UUID | None
    updated_by: UUID | None


class ResourcesBody(Answer, kw_only=True, frozen=True):
    """Some resources; ``nextCursor`` is null where there are no more."""

    data: list[ResourceBody]
    next_cursor: str | None


def _model_body(of: Resource) -> ResourceModelBody:
    return ResourceModelBody(provider=of.provider, model=of.model, connection_id=of.connection_id)


def resource_body(
    of: Resource,
    alternates: Mapping[UUID, Resource],
    taught: Sequence[Learned],
    waiting: Waiting | None,
) -> ResourceBody:
    """A resource on the wire. ``alternates``: at least its own, by id."""
    return ResourceBody(
        resource_id=of.resource_id,
        workspace_id=of.workspace_id,
        environment_id=of.environment_id,
        name=of.name,
        description=of.description,
        model=_model_body(of),
        use_fallback=of.use_fallback,
        fallback_models=[_model_body(alternates[each]) for each in of.fallback_ids],
        fallback_on=FallbackOn.model_validate(of.fallback_on).stored(),
        secondary_models=[_model_body(alternates[each]) for each in of.secondary_ids],
        routing=of.routing,
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
        created_by=of.created_by,
        updated_by=of.updated_by,
    )


# Requests -----------------------------------------------------------------------------------------


class ResourceModel(Sent):
    """Which model, on which connection."""

    model: Name
    connection_id: UUID
    provider: Text | None = None

    @property
    def at(self) -> ModelAt:
        """The same without the provider, which is the connection's."""
        return ModelAt(model=self.model, connection_id=self.connection_id)


StatusCode = Annotated[Whole, Field(ge=300, le=599)]


class FallbackOn(Sent):
    """After which outcomes the next model is asked. What a caller did wrong is not among them.

    ``exhausted``: all tries failed (the provider's 5xx, no connection, no answer in time).
    ``statusCodes``, ``errorCodes``: replies, and our codes of failures, after which no further try of
    the same model is made. ``throttledMs``: the provider asked to wait longer than this; null: that is
    waited for.
    """

    exhausted: Flag = cast("bool", FALLBACK_ON["exhausted"])
    status_codes: Annotated[list[StatusCode], Field(max_length=100)] = cast(
        "list[int]", FALLBACK_ON["statusCodes"]
    )
    error_codes: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=60)]], Field(max_length=100)
    ] = cast("list[str]", FALLBACK_ON["errorCodes"])
    throttled_ms: Annotated[Whole, Field(ge=0, le=86_400_000)] | None = None

    def stored(self) -> Json:
        """All of it, as it is stored and shown."""
        return self.model_dump(mode="json", by_alias=True)


ModelList = Annotated[list[ResourceModel], Field(max_length=_MOST_ALTERNATES)]


class ResourcePatch(Sent):
    """What may be said of a model at its creation and later. Null is as if it was never said."""

    name: Name = Field(default="")
    model: ResourceModel = Field(default=cast("ResourceModel", None))
    description: Text | None = None
    default_args: Keyed | None = None
    capacity: Capacity | None = None
    enforce_capacity: Flag | None = None
    timeout_ms: Timeout | None = None
    concurrency: Concurrency | None = None
    use_fallback: Flag | None = None
    fallback_models: ModelList | None = None
    fallback_on: FallbackOn | None = None
    secondary_models: ModelList | None = None
    routing: Keyed | None = None
    assign_api_keys: Annotated[list[UUID], Field(max_length=1000)] | None = None

    def rules(self) -> tuple[Rules, list[Problem]]:
        """The rules that are said, and what is wrong with them."""
        return parse(self.routing)

    def applied(self, held: Resource) -> Resource:
        """The resource as it is from now on, but for its alternates: ``choices``."""
        changed = said(self, self.capacity)
        for name in (
            *("model", "use_fallback", "fallback_models", "fallback_on"),
            *("secondary_models", "routing", "assign_api_keys"),
        ):
            changed.pop(name, None)
        if "model" in self.model_fields_set:
            changed["model"] = self.model.model
            changed["connection_id"] = self.model.connection_id
        if "default_args" in changed:
            changed["default_args"] = self.default_args or {}
        if "enforce_capacity" in changed:
            changed["enforce_capacity"] = self.enforce_capacity is not False
        return replace(held, **changed)

    def choices(
        self, held: Resource | None = None, alternates: Mapping[UUID, Resource] | None = None
    ) -> Choices | None:
        """The alternates from now on: what is said, over what is held. None: all stay."""
        fields = {
            *("use_fallback", "fallback_models", "fallback_on", "secondary_models", "routing"),
        }
        if self.model_fields_set.isdisjoint(fields):
            return None
        known = alternates or {}
        kept = Choices()
        if held is not None:
            rules, _ = parse(held.routing)
            kept = Choices(
                use_fallback=held.use_fallback,
                fallbacks=[known[each].at for each in held.fallback_ids],
                fallback_on=held.fallback_on or FALLBACK_ON,
                secondary=[known[each].at for each in held.secondary_ids],
                routing=held.routing,
                targets=_targets(rules),
            )
        changed: dict[str, Any] = {}
        if "use_fallback" in self.model_fields_set:
            changed["use_fallback"] = self.use_fallback is not False
        if "fallback_models" in self.model_fields_set:
            changed["fallbacks"] = [each.at for each in self.fallback_models or ()]
        if "fallback_on" in self.model_fields_set:
            changed["fallback_on"] = (self.fallback_on or FallbackOn()).stored()
        if "secondary_models" in self.model_fields_set:
            changed["secondary"] = [each.at for each in self.secondary_models or ()]
        if "routing" in self.model_fields_set:
            rules, _ = self.rules()
            changed |= {"routing": self.routing, "targets": _targets(rules)}
        return replace(kept, **changed)

    def models(self) -> list[tuple[str, ResourceModel]]:
        """Every model that is said, with its path."""
        found: list[tuple[str, ResourceModel]] = []
        if "model" in self.model_fields_set:
            found.append(("model", self.model))
        for name, several in (
            ("fallbackModels", self.fallback_models),
            ("secondaryModels", self.secondary_models),
        ):
            found += [(f"{name}[{n}]", each) for n, each in enumerate(several or ())]
        return found


def _targets(rules: Rules) -> list[ModelAt]:
    return [ModelAt(model=each.model, connection_id=each.connection_id) for each in rules.targets]


class ResourceCreate(ResourcePatch):
    """A new named model."""

    name: Name  # pyright: ignore[reportGeneralTypeIssues] - required only here
    model: ResourceModel  # pyright: ignore[reportGeneralTypeIssues] - required only here
