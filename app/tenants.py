"""Tenants: workspaces, environments, and the api keys that open them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from app import capacity
from app.capacity import Amount
from app.db import Connection, NoRow, Query
from app.ids import uuid7
from app.secrets import hash_api_key, mint_api_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A stage of a workspace."""

    workspace_id: UUID
    environment_id: UUID
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """Who is calling: a usable key. ``resources``: ids it may use, or ``*``."""

    workspace_id: UUID
    api_key_id: UUID
    environment_id: UUID
    name: str
    resources: list[str]
    masked_key: str

    def may_use(self, resource_id: UUID) -> bool:
        """Whether the key's allowlist has the resource."""
        return "*" in self.resources or str(resource_id) in self.resources


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeyEntity:
    """A key as people see it, usable or not; never its value."""

    workspace_id: UUID
    api_key_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    masked_key: str
    enabled: bool
    resources: list[str]
    labels: list[str]
    enforce_capacity: bool
    capacity: list[dict[str, Any]]
    expires_at: datetime | None
    last_used_at: datetime | None
    created_at: datetime
    updated_at: datetime


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
class _Found:
    found: bool


_setup_lock = Query("tenants", "setup_lock", _Locked)
_api_key_any = Query("tenants", "api_key_any", _Found)
_workspace_insert = Query("tenants", "workspace_insert", NoRow)
_environment_insert = Query("tenants", "environment_insert", NoRow)
_environment_get = Query("tenants", "environment_get", Environment)
_environment_named = Query("tenants", "environment_named", Environment)
_api_key_insert = Query("tenants", "api_key_insert", NoRow)
_api_key_by_hash = Query("tenants", "api_key_by_hash", ApiKey)
_api_key_get = Query("tenants", "api_key_get", ApiKeyEntity)
_api_key_lock = Query("tenants", "api_key_lock", _RowLocked)
_api_key_change = Query("tenants", "api_key_change", NoRow)
_api_key_used = Query("tenants", "api_key_used", NoRow)
_api_key_allow = Query("tenants", "api_key_allow", _KeyId)
_api_keys_disallow = Query("tenants", "api_keys_disallow", NoRow)


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


async def create_api_key(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    name: str,
    description: str | None = None,
    enabled: bool = True,
    resources: Sequence[str] = ("*",),
    labels: Sequence[str] = (),
    enforce_capacity: bool = True,
    capacity_entries: Sequence[Mapping[str, object]] = (),
    amounts: Sequence[Amount] = (),
    expires_at: datetime | None = None,
) -> tuple[UUID, str]:
    """A new key: its id and its value, which is nowhere stored."""
    minted = mint_api_key()
    api_key_id = uuid7()
    await _api_key_insert.run(
        conn,
        workspace_id=workspace_id,
        api_key_id=api_key_id,
        environment_id=environment_id,
        name=name,
        description=description,
        hash=minted.hash,
        masked_key=minted.masked,
        enabled=enabled,
        resources=list(resources),
        labels=list(labels),
        enforce_capacity=enforce_capacity,
        capacity=Jsonb(list(capacity_entries)),
        expires_at=expires_at,
    )
    await capacity.open_scope(
        conn,
        workspace_id=workspace_id,
        scope_id=api_key_id,
        kind="api_key",
        amounts=amounts if enforce_capacity else (),
    )
    return api_key_id, minted.value


async def api_key(conn: Connection, *, value: str) -> ApiKey | None:
    """The usable key with this value; unknown, disabled and expired look the same."""
    return await _api_key_by_hash.one_or_none(conn, hash=hash_api_key(value))


async def has_api_key(conn: Connection, *, workspace_id: UUID, environment_id: UUID) -> bool:
    """Whether an environment has a usable key."""
    row = await _api_key_any.one(conn, workspace_id=workspace_id, environment_id=environment_id)
    return row.found


async def api_key_entity(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, api_key_id: UUID
) -> ApiKeyEntity | None:
    """A key by its id, or None."""
    return await _api_key_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, api_key_id=api_key_id
    )


async def lock_api_key(conn: Connection, *, workspace_id: UUID, api_key_id: UUID) -> None:
    """Keep claims from a key's limits, and others from changing it, until the commit."""
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=api_key_id)
    await _api_key_lock.one(conn, workspace_id=workspace_id, api_key_id=api_key_id)


async def change_api_key(
    conn: Connection, *, to: ApiKeyEntity, amounts: Sequence[Amount] | None = None
) -> list[UUID]:
    """Change a key that is locked, effective at once; the resources to ring for.

    ``amounts``: its limits from now on, unless it does not enforce them. None: as they are.
    """
    await _api_key_change.run(
        conn,
        workspace_id=to.workspace_id,
        api_key_id=to.api_key_id,
        description=to.description,
        enabled=to.enabled,
        resources=to.resources,
        labels=to.labels,
        enforce_capacity=to.enforce_capacity,
        capacity=Jsonb(to.capacity),
        expires_at=to.expires_at,
    )
    if amounts is None:
        return []
    return await capacity.set_limits(
        conn,
        workspace_id=to.workspace_id,
        scope_id=to.api_key_id,
        amounts=amounts if to.enforce_capacity else (),
    )


async def note_api_key_used(conn: Connection, *, key: ApiKey) -> None:
    """Keep a key's last use, to the minute."""
    await _api_key_used.run(conn, workspace_id=key.workspace_id, api_key_id=key.api_key_id)


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


async def disallow_resources(
    conn: Connection, *, workspace_id: UUID, resource_ids: Sequence[UUID]
) -> None:
    """Strip resources that are being deleted from the allowlists of keys."""
    await _api_keys_disallow.run(
        conn, workspace_id=workspace_id, resources=[str(each) for each in resource_ids]
    )
