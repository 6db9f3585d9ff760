"""Connections and resources on the wire."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, cast
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
from pydantic import AfterValidator, Field, field_validator

from app.api.wire import (
    MASK,
    Answer,
    Flag,
    Json,
    Keyed,
    Name,
    Sent,
    Text,
    Whole,
    instant,
)
from app.api.wire_capacity import (
    Capacity,
    CapacityEntry,
    Discovered,
    LearnedModels,
    WaitingBody,
    capacity_entries,
    discovered,
    learned,
    waiting_body,
)
from app.capacity import Learned
from app.errors import Problem, ValidationError
from app.forecast import Waiting
from app.tenants import ProviderConnection, Resource

# Answers ------------------------------------------------------------------------------------------


class ConnectionBody(Answer, kw_only=True, frozen=True):
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


class ResourceModelBody(Answer, kw_only=True, frozen=True):
    """Which model, on which connection."""

    provider: str
    model: str
    connection_id: UUID


class ResourceBody(Answer, kw_only=True, frozen=True):
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


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("must be an http or https address without a user, such as https://host/v1")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment")
    return value.rstrip("/")


def _header_values(value: dict[str, str] | None) -> dict[str, str] | None:
    for name, text in (value or {}).items():
        if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"'{name}' is not the name of a header")
        if not (text.isascii() and text.isprintable()):
            raise ValueError(f"the value of '{name}' must be printable ASCII")
    return value


Headers = Annotated[dict[Text, Text] | None, AfterValidator(_header_values)]
Timeout = Annotated[Whole, Field(ge=100, le=600_000)]
Concurrency = Annotated[Whole, Field(ge=1, le=1_000_000)]


def _is_same(given: object, shown: object) -> bool:
    match given, shown:
        case dict(), dict():
            known = cast("Json", shown)
            return all(_is_same(v, known.get(k)) for k, v in cast("Json", given).items())
        case str(), _ if _is_masked(given):
            return shown in (None, MASK)
        case _:
            return given == shown or (not given and not shown)


def _is_masked(value: object) -> bool:
    return isinstance(value, str) and value.startswith(MASK[:4])


def require_fixed(names: Sequence[str], given: Json, shown: Answer) -> None:
    """Refuse a change of what cannot be changed; sent as it is shown, it is no change."""
    known = cast("Json", msgspec.to_builtins(shown))
    problems = [
        Problem(path=name, message="cannot be changed; leave it out")
        for name in names
        if name in given and not _is_same(given[name], known.get(name))
    ]
    if problems:
        raise ValidationError(problems)


def _said(patch: Sent, capacity: Sequence[CapacityEntry] | None) -> dict[str, Any]:
    """What a change says, by the names of its row; limits as they are stored."""
    said = {name: getattr(patch, name) for name in patch.model_fields_set}
    if "capacity" in said:
        said["capacity"] = capacity_entries(capacity)
    return said


class ConnectionPatch(Sent):
    """What may be said of an account at its creation and later. Null is as if it was never said."""

    #: Cannot be changed yet.
    FIXED: ClassVar = ("name", "provider", "baseUrl", "apiKey", "config")

    description: Text | None = None
    headers: Headers = None
    allowed_models: list[Text] | None = None
    capacity: Capacity | None = None
    timeout_ms: Timeout | None = None
    concurrency: Concurrency | None = None

    def applied(self, held: ProviderConnection, *, default_timeout_ms: int) -> ProviderConnection:
        """The connection as it is from now on."""
        said = _said(self, self.capacity)
        if "headers" in said:
            said["headers"] = self._headers_over(held.headers)
        if "timeout_ms" in said:
            said["timeout_ms"] = self.timeout_ms or default_timeout_ms
        return replace(held, **said)

    def _headers_over(self, held: dict[str, str]) -> dict[str, str]:
        """A masked value stays as it is."""
        found: dict[str, str] = {}
        for name, text in (self.headers or {}).items():
            if _is_masked(text) and name not in held:
                raise ValidationError(
                    [Problem(path="headers", message=f"'{name}' has no value that could stay")]
                )
            found[name] = held[name] if _is_masked(text) else text
        return found


class ConnectionConfig(Sent):
    """The contract's nested form of the same fields."""

    api_key: Text | None = None
    base_url: Text | None = None


class ConnectionCreate(ConnectionPatch):
    """A new account at a provider. ``apiKey`` and ``baseUrl`` may also stand in ``config``."""

    name: Name
    provider: Name = "openai-compatible"
    base_url: Text | None = None
    api_key: Text | None = None
    config: ConnectionConfig | None = None

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value)


class ResourcePatch(Sent):
    """What may be said of a model at its creation and later. Null is as if it was never said."""

    #: Cannot be changed yet.
    FIXED: ClassVar = (
        *("name", "model", "useFallback", "fallbackModels", "secondaryModels", "routing"),
        "assignApiKeys",
    )

    description: Text | None = None
    default_args: Keyed | None = None
    capacity: Capacity | None = None
    enforce_capacity: Flag | None = None
    timeout_ms: Timeout | None = None
    concurrency: Concurrency | None = None

    def applied(self, held: Resource) -> Resource:
        """The resource as it is from now on."""
        said = _said(self, self.capacity)
        if "default_args" in said:
            said["default_args"] = self.default_args or {}
        if "enforce_capacity" in said:
            said["enforce_capacity"] = self.enforce_capacity is not False
        return replace(held, **said)


class ResourceModel(Sent):
    """Which model, on which connection."""

    model: Name
    connection_id: UUID
    provider: Text | None = None


class ResourceCreate(ResourcePatch):
    """A new named model. Fallbacks, routing and secondary models are refused, not ignored."""

    name: Name
    model: ResourceModel
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
