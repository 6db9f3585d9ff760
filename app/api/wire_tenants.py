"""Api keys on the wire, and who is calling."""

from dataclasses import replace
from typing import Annotated, ClassVar, cast
from uuid import UUID

from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, Field

from app.api.wire import (
    Answer,
    Flag,
    Json,
    Moment,
    Name,
    Sent,
    Text,
    instant,
    instant_or_none,
)
from app.api.wire_capacity import Capacity, said
from app.tenants import ApiKey, ApiKeyEntity

# Answers ------------------------------------------------------------------------------------------


class ApiKeyBody(Answer, kw_only=True, frozen=True):
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


class WhoAmI(Answer, kw_only=True, frozen=True):
    """What the caller's key opens."""

    workspace_id: UUID
    environment_id: UUID
    api_key_id: UUID
    name: str
    masked_key: str
    resources: list[str]


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


# Requests -----------------------------------------------------------------------------------------


def _ids(value: list[str]) -> list[str]:
    try:
        return [each if each == "*" else str(UUID(each)) for each in value]
    except ValueError:
        raise ValueError("must be ids of resources, or *") from None


ResourceIds = Annotated[list[Text], Field(max_length=1000), AfterValidator(_ids)]


class _KeySettings(Sent):
    description: Text | None = None
    enabled: Flag = True
    labels: Annotated[list[Text], Field(max_length=100)] | None = None
    enforce_capacity: Flag = True
    capacity: Capacity | None = None
    expires_at: Moment = None


class ApiKeyPatch(_KeySettings):
    """Changes of an api key. Null is as if it was never said."""

    #: Cannot be changed yet.
    FIXED: ClassVar = ("name",)

    resources: ResourceIds = Field(default_factory=list)

    def applied(self, held: ApiKeyEntity) -> ApiKeyEntity:
        """The key as it is from now on."""
        changed = said(self, self.capacity)
        if "labels" in changed:
            changed["labels"] = self.labels or []
        return replace(held, **changed)


class ApiKeyCreate(_KeySettings):
    """A new api key. ``resources``: ids of resources, or ``["*"]``."""

    name: Name
    resources: ResourceIds
