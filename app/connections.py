"""Connections: accounts at providers, where the calls of resources go, and their sealed secrets."""

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
    created_by: UUID | None
    updated_by: UUID | None

    def allows(self, model: str) -> bool:
        """Whether resources may name a model."""
        return self.allowed_models is None or model in self.allowed_models


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the calls of a resource go, and how."""

    resource_id: UUID
    connection_id: UUID
    model: str
    default_args: dict[str, Any]
    provider: str
    base_url: str
    secret_key_id: str | None
    secret: bytes | None = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    allowed_models: list[str] | None
    timeout_ms: int
    config_at: datetime

    @property
    def is_allowed(self) -> bool:
        """Whether its connection still allows its model."""
        return self.allowed_models is None or self.model in self.allowed_models


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model that a resource names, itself or (``is_alternate``) as one of its alternates."""

    model: str
    resource_id: UUID
    name: str
    is_alternate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    connection_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelScope:
    model_scope_id: UUID


_connection_insert = Query("connections", "connection_insert", NoRow)
_connection_get = Query("connections", "connection_get", ProviderConnection)
_connection_named = Query("connections", "connection_named", ProviderConnection)
_connections_page = Query("connections", "connections_page", ProviderConnection)
_connection_set_secret = Query("connections", "connection_set_secret", NoRow)
_connection_change = Query("connections", "connection_change", NoRow)
_connections_lock = Query("connections", "connections_lock", _Locked)
_connection_delete = Query("connections", "connection_delete", NoRow)
_connection_models = Query("connections", "connection_models", NamedModel)
_model_scope = Query("connections", "model_scope", _ModelScope)
_resource_route = Query("connections", "resource_route", Route)


async def create(
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
    created_by: UUID | None = None,
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
        created_by=created_by,
    )
    await capacity.open_scope(
        conn, workspace_id=workspace_id, scope_id=connection_id, kind="connection", amounts=amounts
    )
    return connection_id


async def get(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, connection_id: UUID
) -> ProviderConnection | None:
    """A connection, or None."""
    return await _connection_get.one_or_none(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        connection_id=connection_id,
    )


async def named(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, name: str
) -> ProviderConnection | None:
    """A connection by its name, or None."""
    return await _connection_named.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, name=name
    )


async def page(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    after: UUID | None,
    name: str | None,
    most: int,
) -> list[ProviderConnection]:
    """Connections of an environment, oldest first, those after a given one."""
    return await _connections_page.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        after=after,
        name=name,
        most=most,
    )


async def models(conn: Connection, *, workspace_id: UUID, connection_id: UUID) -> list[NamedModel]:
    """The models that resources name on a connection, in the order of their creation."""
    return await _connection_models.all(
        conn, workspace_id=workspace_id, connection_id=connection_id
    )


async def model_scope(
    conn: Connection, *, workspace_id: UUID, connection_id: UUID, model: str
) -> UUID:
    """The scope of a model on a connection that is locked; a new one for the first to name it."""
    known = await _model_scope.one_or_none(
        conn, workspace_id=workspace_id, connection_id=connection_id, model=model
    )
    if known is not None:
        return known.model_scope_id
    scope_id = uuid7()
    await capacity.open_scope(conn, workspace_id=workspace_id, scope_id=scope_id, kind="model")
    return scope_id


async def lock_rows(
    conn: Connection, *, workspace_id: UUID, connection_ids: Sequence[UUID]
) -> set[UUID]:
    """Keep others from changing connections, and from naming models on them; those there are."""
    rows = await _connections_lock.all(
        conn, workspace_id=workspace_id, connection_ids=list(connection_ids)
    )
    return {row.connection_id for row in rows}


async def lock(conn: Connection, *, workspace_id: UUID, connection_id: UUID) -> None:
    """Keep claims from a connection's limits, and others from changing it, until the commit."""
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=connection_id)
    await lock_rows(conn, workspace_id=workspace_id, connection_ids=[connection_id])


async def change(
    conn: Connection,
    *,
    held: ProviderConnection,
    to: ProviderConnection,
    amounts: Sequence[Amount] | None = None,
    updated_by: UUID | None = None,
) -> list[UUID]:
    """Change a connection that is locked, effective at the next claim; the resources to ring for.

    Its secret stays, see ``set_secret``. ``amounts``: its limits from now on. None: as they are.
    """
    await _connection_change.run(
        conn,
        workspace_id=to.workspace_id,
        connection_id=to.connection_id,
        name=to.name,
        description=to.description,
        provider=to.provider,
        base_url=to.base_url,
        headers=Jsonb(to.headers),
        allowed_models=to.allowed_models,
        capacity=Jsonb(to.capacity),
        timeout_ms=to.timeout_ms,
        concurrency=to.concurrency,
        updated_by=updated_by,
    )
    if amounts is not None:
        return await capacity.set_limits(
            conn, workspace_id=to.workspace_id, scope_id=to.connection_id, amounts=amounts
        )
    if to.concurrency != held.concurrency:
        return await capacity.wake(conn, workspace_id=to.workspace_id, scope_id=to.connection_id)
    return []


async def delete(conn: Connection, *, workspace_id: UUID, connection_id: UUID) -> None:
    """Remove a connection that has no resources any more (``resources.delete``)."""
    await _connection_delete.run(conn, workspace_id=workspace_id, connection_id=connection_id)


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


async def route(conn: Connection, *, workspace_id: UUID, resource_id: UUID) -> Route | None:
    """Where a resource's calls go, or None when it is gone."""
    return await _resource_route.one_or_none(
        conn, workspace_id=workspace_id, resource_id=resource_id
    )
