"""Connections on the wire, the providers they can be of, and what a test call found."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, cast
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, Field, field_validator

from app.api.wire import (
    MASK,
    Answer,
    Json,
    Name,
    Sent,
    Text,
    Whole,
    instant,
    is_masked,
)
from app.api.wire_capacity import Capacity, Discovered, LearnedModels, discovered, learned, said
from app.capacity import Learned
from app.connections import ProviderConnection
from app.errors import Problem, RequestError, ValidationError
from app.presets import COMPATIBLE, PROVIDERS, Preset

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
    created_by: UUID | None
    updated_by: UUID | None


class ConnectionsBody(Answer, kw_only=True, frozen=True):
    """Some connections; ``nextCursor`` is null where there are no more."""

    data: list[ConnectionBody]
    next_cursor: str | None


class ConfigBody(Answer, kw_only=True, frozen=True):
    """How the connections of a provider are configured."""

    connection: Json


class ProviderBody(Answer, kw_only=True, frozen=True):
    """A provider. ``config.connection`` is the form of its connections' config, as JSON Schema."""

    id: str
    name: str
    description: str
    protocol: str
    base_url: str | None
    config: ConfigBody


class ProvidersBody(Answer, kw_only=True, frozen=True):
    """The providers that are known by name."""

    data: list[ProviderBody]


class TestBody(Answer, kw_only=True, frozen=True):
    """What one real call found. ``message`` says what is wrong, ``remedy`` what to do about it."""

    ok: bool
    code: str
    message: str
    remedy: str | None
    model: str
    base_url: str
    status_code: int | None
    latency_ms: int
    request_id: str | None
    prompt_tokens: int | None
    output_tokens: int | None


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
        created_by=of.created_by,
        updated_by=of.updated_by,
    )


def provider_body(of: Preset) -> ProviderBody:
    """A provider on the wire."""
    speaks = "Anthropic's Messages" if of.protocol == "anthropic" else "OpenAI's protocol"
    return ProviderBody(
        id=of.id,
        name=of.name,
        description=f"{of.name}; speaks {speaks}.",
        protocol=of.protocol,
        base_url=of.base_url,
        config=ConfigBody(connection=of.schema()),
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
BaseUrl = Annotated[Text, AfterValidator(_base_url)]
Models = Annotated[list[Name], Field(max_length=1000)]
Timeout = Annotated[Whole, Field(ge=100, le=600_000)]
Concurrency = Annotated[Whole, Field(ge=1, le=1_000_000)]


class ConnectionConfig(Sent):
    """The contract's nested form of the same fields."""

    api_key: Text | None = None
    base_url: BaseUrl | None = None


class ConnectionPatch(Sent):
    """What may be said of an account at its creation and later. Null is as if it was never said.

    ``apiKey`` and ``baseUrl`` may also stand in ``config``. A secret that is absent, or is sent as
    it is shown, stays.
    """

    #: Other than the address, it says how requests are written.
    FIXED: ClassVar = ("provider",)

    name: Name = Field(default="")
    base_url: BaseUrl | None = None
    api_key: Text | None = None
    config: ConnectionConfig | None = None
    description: Text | None = None
    headers: Headers = None
    allowed_models: Models | None = None
    capacity: Capacity | None = None
    timeout_ms: Timeout | None = None
    concurrency: Concurrency | None = None

    def applied(self, held: ProviderConnection, *, default_timeout_ms: int) -> ProviderConnection:
        """The connection as it is from now on, but for its secret."""
        changed = said(self, self.capacity)
        for name in ("api_key", "config", "base_url"):
            changed.pop(name, None)
        changed["base_url"] = self._base_url_over(held)
        if "headers" in changed:
            changed["headers"] = self._headers_over(held.headers)
        if "timeout_ms" in changed:
            changed["timeout_ms"] = self.timeout_ms or default_timeout_ms
        return replace(held, **changed)

    @property
    def says_secret(self) -> bool:
        """Whether there is a new secret, or none any more: ``secret``."""
        return any(not is_masked(each) for each in self._secrets())

    @property
    def secret(self) -> str | None:
        """The secret that is said; None: there is none."""
        return next((each for each in self._secrets() if each and not is_masked(each)), None)

    def _secrets(self) -> list[str | None]:
        found: list[str | None] = []
        if "api_key" in self.model_fields_set:
            found.append(self.api_key)
        if self.config is not None and "api_key" in self.config.model_fields_set:
            found.append(self.config.api_key)
        return found

    def _base_url_over(self, held: ProviderConnection) -> str:
        """What differs from what is shown is meant: both places hold it in what was read."""
        given = [
            patch.base_url
            for patch in (self, self.config)
            if patch is not None and "base_url" in patch.model_fields_set
        ]
        new = [each for each in given if each != held.base_url]
        if not new:
            return held.base_url
        return new[0] or base_url_of(held.provider, None)

    def _headers_over(self, held: dict[str, str]) -> dict[str, str]:
        """A masked value stays as it is."""
        found: dict[str, str] = {}
        for name, text in (self.headers or {}).items():
            if is_masked(text) and name not in held:
                raise ValidationError(
                    [Problem(path="headers", message=f"'{name}' has no value that could stay")]
                )
            found[name] = held[name] if is_masked(text) else text
        return found


class ConnectionCreate(ConnectionPatch):
    """A new account at a provider."""

    name: Name  # pyright: ignore[reportGeneralTypeIssues] - required only here
    provider: Name = COMPATIBLE

    @field_validator("api_key")
    @classmethod
    def _is_new(cls, value: str | None) -> str | None:
        if is_masked(value):
            raise ValueError("is masked; there is no secret yet that could stay")
        return value

    @property
    def address(self) -> str:
        """Its base URL. Raises RequestError when it has none, or lacks a key that it needs."""
        given = self.base_url or (self.config.base_url if self.config else None)
        found = base_url_of(self.provider, given)
        preset = PROVIDERS.get(self.provider)
        if (
            preset is not None
            and preset.needs_key
            and found == preset.base_url
            and self.secret is None
        ):
            what = f"{preset.name} needs a key"
            raise RequestError(
                f"{what}: give config.apiKey.",
                code="AI_CONNECTION_CONFIG_INVALID",
                details={"errors": [{"path": "config.apiKey", "message": what}]},
            )
        return found


def base_url_of(provider: str, given: str | None) -> str:
    """Where a provider is, unless a connection says otherwise. Raises ValidationError."""
    if given is not None:
        return given
    preset = PROVIDERS.get(provider)
    if preset is not None and preset.base_url is not None:
        return preset.base_url
    if preset is not None:
        message = f"is required for the provider {provider}"
        raise ValidationError([Problem(path="baseUrl", message=message)])
    known = ", ".join(sorted(PROVIDERS))
    raise ValidationError(
        [
            Problem(
                path="provider",
                message=f"is none of {known}; give its baseUrl, with provider {COMPATIBLE}",
            )
        ]
    )


class ConnectionTest(Sent):
    """Which model to ask; absent, one that is known of the connection."""

    model: Name | None = None
