"""Tenants: workspaces, environments, and what they own: connections and resources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from app import capacity
from app.capacity import Amount
from app.db import Connection, NoRow, Query
from app.errors import SecretError
from app.ids import uuid7
from app.secrets import Keyring, Sealed

#: Base URLs of providers that speak OpenAI's protocol, by the contract's ``provider``.
PROVIDERS: Mapping[str, str] = {
    "openai": "https://api.openai.com/v1",
    "groq": "https://api.groq.com/openai/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/openai",
    "perplexity": "https://api.perplexity.ai",
    "openrouter": "https://openrouter.ai/api/v1",
    "mistral": "https://api.mistral.ai/v1",
    "together": "https://api.together.xyz/v1",
    "deepseek": "https://api.deepseek.com/v1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A stage of a workspace."""

    workspace_id: UUID
    environment_id: UUID
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderConnection:
    """An account at a provider. The secret is sealed; ``open_secret`` opens it."""

    workspace_id: UUID
    connection_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    provider: str
    base_url: str
    secret_key_id: str | None
    secret: bytes | None = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    allowed_models: list[str] | None
    capacity: list[dict[str, Any]]
    timeout_ms: int
    concurrency: int | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A named model on a connection.

    ``most_tokens``: the smallest limit of input tokens above it; a longer prompt can never be sent.
    """

    workspace_id: UUID
    resource_id: UUID
    environment_id: UUID
    connection_id: UUID
    name: str
    description: str | None
    model: str
    default_args: dict[str, Any]
    capacity: list[dict[str, Any]]
    enforce_capacity: bool
    timeout_ms: int | None
    concurrency: int | None
    created_at: datetime
    updated_at: datetime
    provider: str
    most_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the calls of a resource go, and how."""

    resource_id: UUID
    connection_id: UUID
    model: str
    default_args: dict[str, Any]
    base_url: str
    secret_key_id: str | None
    secret: bytes | None = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    timeout_ms: int
    config_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyId:
    api_key_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    locked: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowLocked:
    locked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelScope:
    model_scope_id: UUID


_setup_lock = Query("tenants", "setup_lock", _Locked)
_resource_set_timeout = Query("tenants", "resource_set_timeout", NoRow)
_workspace_insert = Query("tenants", "workspace_insert", NoRow)
_environment_insert = Query("tenants", "environment_insert", NoRow)
_environment_get = Query("tenants", "environment_get", Environment)
_environment_named = Query("tenants", "environment_named", Environment)
_api_key_allow = Query("tenants", "api_key_allow", _KeyId)
_connection_insert = Query("tenants", "connection_insert", NoRow)
_connection_get = Query("tenants", "connection_get", ProviderConnection)
_connection_named = Query("tenants", "connection_named", ProviderConnection)
_connection_set_secret = Query("tenants", "connection_set_secret", NoRow)
_connection_change = Query("tenants", "connection_change", NoRow)
_resource_lock = Query("tenants", "resource_lock", _RowLocked)
_resource_change = Query("tenants", "resource_change", NoRow)
_resource_insert = Query("tenants", "resource_insert", NoRow)
_resource_state_insert = Query("tenants", "resource_state_insert", NoRow)
_connection_lock = Query("tenants", "connection_lock", _RowLocked)
_model_scope = Query("tenants", "model_scope", _ModelScope)
_resource_get = Query("tenants", "resource_get", Resource)
_resource_named = Query("tenants", "resource_named", Resource)
_resource_route = Query("tenants", "resource_route", Route)


async def lock_setup(conn: Connection) -> None:
    """Wait for other processes that make the command line's own tenants, until the commit."""
    await _setup_lock.run(conn)


async def create_workspace(
    conn: Connection, *, name: str, environment: str, description: str | None = None
) -> Environment:
    """A new tenant with its first environment."""
    made = Environment(workspace_id=uuid7(), environment_id=uuid7(), name=environment)
    await _workspace_insert.run(
        conn, workspace_id=made.workspace_id, name=name, description=description
    )
    await _environment_insert.run(
        conn,
        workspace_id=made.workspace_id,
        environment_id=made.environment_id,
        name=environment,
        description=None,
    )
    return made


async def create_environment(
    conn: Connection, *, workspace_id: UUID, name: str, description: str | None = None
) -> UUID:
    """Another stage of a workspace; its id."""
    environment_id = uuid7()
    await _environment_insert.run(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        name=name,
        description=description,
    )
    return environment_id


async def environment(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID
) -> Environment | None:
    """An environment, or None."""
    return await _environment_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id
    )


async def environment_named(
    conn: Connection, *, workspace: str, environment: str
) -> Environment | None:
    """The oldest environment with these names: the command line's own."""
    return await _environment_named.one_or_none(conn, workspace=workspace, environment=environment)


async def allow_api_keys(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    resource_id: UUID,
    api_key_ids: Sequence[UUID],
) -> list[UUID]:
    """Let keys use a resource; the keys of this environment among those given."""
    rows = await _api_key_allow.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        resource=str(resource_id),
        api_key_ids=list(api_key_ids),
    )
    return [row.api_key_id for row in rows]


async def create_connection(
    conn: Connection,
    *,
    keyring: Keyring,
    workspace_id: UUID,
    environment_id: UUID,
    name: str,
    provider: str,
    base_url: str,
    secret: str | None,
    timeout_ms: int,
    description: str | None = None,
    headers: Mapping[str, str] | None = None,
    allowed_models: Sequence[str] | None = None,
    capacity_entries: Sequence[Mapping[str, object]] = (),
    amounts: Sequence[Amount] = (),
    concurrency: int | None = None,
) -> UUID:
    """A new account at a provider; its id. The secret is sealed with the connection's id."""
    connection_id = uuid7()
    sealed = keyring.seal(secret, context=str(connection_id)) if secret is not None else None
    await _connection_insert.run(
        conn,
        workspace_id=workspace_id,
        connection_id=connection_id,
        environment_id=environment_id,
        name=name,
        description=description,
        provider=provider,
        base_url=base_url,
        secret_key_id=sealed.key_id if sealed else None,
        secret=sealed.ciphertext if sealed else None,
        headers=Jsonb(dict(headers or {})),
        allowed_models=list(allowed_models) if allowed_models is not None else None,
        capacity=Jsonb(list(capacity_entries)),
        timeout_ms=timeout_ms,
        concurrency=concurrency,
    )
    await capacity.open_scope(
        conn, workspace_id=workspace_id, scope_id=connection_id, kind="connection", amounts=amounts
    )
    return connection_id


async def connection(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, connection_id: UUID
) -> ProviderConnection | None:
    """A connection, or None."""
    return await _connection_get.one_or_none(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        connection_id=connection_id,
    )


async def connection_named(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, name: str
) -> ProviderConnection | None:
    """A connection by its name, or None."""
    return await _connection_named.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, name=name
    )


async def lock_connection(conn: Connection, *, workspace_id: UUID, connection_id: UUID) -> None:
    """Keep claims from a connection's limits, and others from changing it, until the commit."""
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=connection_id)
    await _connection_lock.one(conn, workspace_id=workspace_id, connection_id=connection_id)


async def change_connection(
    conn: Connection,
    *,
    held: ProviderConnection,
    to: ProviderConnection,
    amounts: Sequence[Amount] | None = None,
) -> list[UUID]:
    """Change a connection that is locked, effective at the next claim; the resources to ring for.

    Its address, provider and secret stay. ``amounts``: its limits from now on. None: as they are.
    """
    await _connection_change.run(
        conn,
        workspace_id=to.workspace_id,
        connection_id=to.connection_id,
        description=to.description,
        headers=Jsonb(to.headers),
        allowed_models=to.allowed_models,
        capacity=Jsonb(to.capacity),
        timeout_ms=to.timeout_ms,
        concurrency=to.concurrency,
    )
    if amounts is not None:
        return await capacity.set_limits(
            conn, workspace_id=to.workspace_id, scope_id=to.connection_id, amounts=amounts
        )
    if to.concurrency != held.concurrency:
        return await capacity.wake(conn, workspace_id=to.workspace_id, scope_id=to.connection_id)
    return []


async def set_secret(
    conn: Connection,
    *,
    keyring: Keyring,
    workspace_id: UUID,
    connection_id: UUID,
    secret: str | None,
) -> None:
    """Replace a connection's secret."""
    sealed = keyring.seal(secret, context=str(connection_id)) if secret is not None else None
    await _connection_set_secret.run(
        conn,
        workspace_id=workspace_id,
        connection_id=connection_id,
        secret_key_id=sealed.key_id if sealed else None,
        secret=sealed.ciphertext if sealed else None,
    )


def open_secret(keyring: Keyring, of: ProviderConnection | Route) -> str | None:
    """The provider's key in the clear, or None when the connection has none. Raises SecretError."""
    if of.secret is None:
        return None
    if of.secret_key_id is None:
        raise SecretError(f"The secret of connection {of.connection_id} does not name its key.")
    sealed = Sealed(key_id=of.secret_key_id, ciphertext=of.secret)
    return keyring.open(sealed, context=str(of.connection_id))


async def create_resource(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    connection_id: UUID,
    name: str,
    model: str,
    description: str | None = None,
    default_args: Mapping[str, object] | None = None,
    capacity_entries: Sequence[Mapping[str, object]] = (),
    amounts: Sequence[Amount] = (),
    enforce_capacity: bool = True,
    timeout_ms: int | None = None,
    concurrency: int | None = None,
) -> UUID:
    """A new model on a connection; its id.

    What is learned about the provider belongs to the model on the connection, so resources of the
    same model share it.
    """
    resource_id = uuid7()
    await _connection_lock.one(conn, workspace_id=workspace_id, connection_id=connection_id)
    known = await _model_scope.one_or_none(
        conn, workspace_id=workspace_id, connection_id=connection_id, model=model
    )
    model_scope_id = known.model_scope_id if known else uuid7()
    if known is None:
        await capacity.open_scope(
            conn, workspace_id=workspace_id, scope_id=model_scope_id, kind="model"
        )
    await _resource_insert.run(
        conn,
        workspace_id=workspace_id,
        resource_id=resource_id,
        environment_id=environment_id,
        connection_id=connection_id,
        name=name,
        description=description,
        model=model,
        default_args=Jsonb(dict(default_args or {})),
        capacity=Jsonb(list(capacity_entries)),
        enforce_capacity=enforce_capacity,
        timeout_ms=timeout_ms,
        concurrency=concurrency,
        model_scope_id=model_scope_id,
    )
    await _resource_state_insert.run(conn, workspace_id=workspace_id, resource_id=resource_id)
    await capacity.open_scope(
        conn,
        workspace_id=workspace_id,
        scope_id=resource_id,
        kind="resource",
        amounts=amounts if enforce_capacity else (),
    )
    return resource_id


async def resource(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, resource_id: UUID
) -> Resource | None:
    """A resource, or None."""
    return await _resource_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, resource_id=resource_id
    )


async def resource_named(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, name: str
) -> Resource | None:
    """A resource by its name, or None."""
    return await _resource_named.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, name=name
    )


async def lock_resource(conn: Connection, *, workspace_id: UUID, resource_id: UUID) -> None:
    """Keep claims from a resource, and others from changing it, until the commit."""
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=resource_id)
    await _resource_lock.one(conn, workspace_id=workspace_id, resource_id=resource_id)


async def change_resource(
    conn: Connection, *, held: Resource, to: Resource, amounts: Sequence[Amount] | None = None
) -> list[UUID]:
    """Change a resource that is locked, effective at the next claim; the resources to ring for.

    Its model and connection stay. ``amounts``: its limits from now on, unless it does not enforce
    them. None: as they are.
    """
    await _resource_change.run(
        conn,
        workspace_id=to.workspace_id,
        resource_id=to.resource_id,
        description=to.description,
        default_args=Jsonb(to.default_args),
        capacity=Jsonb(to.capacity),
        enforce_capacity=to.enforce_capacity,
        timeout_ms=to.timeout_ms,
        concurrency=to.concurrency,
    )
    if amounts is not None:
        return await capacity.set_limits(
            conn,
            workspace_id=to.workspace_id,
            scope_id=to.resource_id,
            amounts=amounts if to.enforce_capacity else (),
        )
    if to.concurrency != held.concurrency:
        return await capacity.wake(conn, workspace_id=to.workspace_id, scope_id=to.resource_id)
    return []


async def set_timeout(
    conn: Connection, *, workspace_id: UUID, resource_id: UUID, timeout_ms: int | None
) -> None:
    """Bound a resource's calls; None: as its connection says."""
    await _resource_set_timeout.run(
        conn, workspace_id=workspace_id, resource_id=resource_id, timeout_ms=timeout_ms
    )


async def route(conn: Connection, *, workspace_id: UUID, resource_id: UUID) -> Route | None:
    """Where a resource's calls go, or None when it is gone."""
    return await _resource_route.one_or_none(
        conn, workspace_id=workspace_id, resource_id=resource_id
    )
