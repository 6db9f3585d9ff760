"""API keys: how programs enter. Only the hash of a key's value is stored; the value is shown once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from app import capacity
from app.access import EVERYTHING, Principal
from app.capacity import Amount
from app.db import Connection, NoRow, Query
from app.ids import uuid7
from app.secrets import hash_api_key, mint_api_key


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as people see it, usable or not; never its value.

    ``previous_until``: its value before the last rotation opens until then. ``created_by`` and
    ``updated_by``: a user or a key; None: the operator, or nobody.
    """

    workspace_id: UUID
    api_key_id: UUID
    environment_id: UUID
    name: str
    description: str | None
    masked_key: str
    enabled: bool
    resources: list[str]
    permissions: list[str]
    labels: list[str]
    enforce_capacity: bool
    capacity: list[dict[str, Any]]
    expires_at: datetime | None
    last_used_at: datetime | None
    previous_until: datetime | None
    rotated_at: datetime | None
    created_by: UUID | None
    updated_by: UUID | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    workspace_id: UUID
    api_key_id: UUID
    environment_id: UUID
    name: str
    resources: list[str]
    permissions: list[str]
    masked_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    locked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    found: bool


_any = Query("api_keys", "api_key_any", _Found)
_insert = Query("api_keys", "api_key_insert", NoRow)
_by_hash = Query("api_keys", "api_key_by_hash", _Opened)
_get = Query("api_keys", "api_key_get", ApiKey)
_page = Query("api_keys", "api_keys_page", ApiKey)
_lock = Query("api_keys", "api_key_lock", _Locked)
_change = Query("api_keys", "api_key_change", NoRow)
_rotate = Query("api_keys", "api_key_rotate", NoRow)
_delete = Query("api_keys", "api_key_delete", NoRow)
_used = Query("api_keys", "api_key_used", NoRow)


async def create(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    name: str,
    description: str | None = None,
    enabled: bool = True,
    resources: Sequence[str] = ("*",),
    permissions: Sequence[str] = EVERYTHING,
    labels: Sequence[str] = (),
    enforce_capacity: bool = True,
    capacity_entries: Sequence[Mapping[str, object]] = (),
    amounts: Sequence[Amount] = (),
    expires_at: datetime | None = None,
    created_by: UUID | None = None,
) -> tuple[UUID, str]:
    """A new key: its id and its value, which is nowhere stored."""
    minted = mint_api_key()
    api_key_id = uuid7()
    await _insert.run(
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
        permissions=list(permissions),
        labels=list(labels),
        enforce_capacity=enforce_capacity,
        capacity=Jsonb(list(capacity_entries)),
        expires_at=expires_at,
        created_by=created_by,
    )
    await capacity.open_scope(
        conn,
        workspace_id=workspace_id,
        scope_id=api_key_id,
        kind="api_key",
        amounts=amounts if enforce_capacity else (),
    )
    return api_key_id, minted.value


async def opened_by(conn: Connection, *, value: str) -> Principal | None:
    """Who calls with this value; None when it is unknown, disabled, expired or deleted."""
    found = await _by_hash.one_or_none(conn, hash=hash_api_key(value))
    if found is None:
        return None
    return Principal(
        workspace_id=found.workspace_id,
        environment_id=found.environment_id,
        name=found.name,
        resources=found.resources,
        permissions=found.permissions,
        api_key_id=found.api_key_id,
        masked_key=found.masked_key,
    )


async def exist(conn: Connection, *, workspace_id: UUID, environment_id: UUID) -> bool:
    """Whether an environment has a usable key."""
    row = await _any.one(conn, workspace_id=workspace_id, environment_id=environment_id)
    return row.found


async def get(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    api_key_id: UUID,
    with_deleted: bool = False,
) -> ApiKey | None:
    """A key by its id, or None."""
    return await _get.one_or_none(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        api_key_id=api_key_id,
        with_deleted=with_deleted,
    )


async def page(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, before: UUID | None, most: int
) -> list[ApiKey]:
    """Keys of an environment, newest first, below an id."""
    return await _page.all(
        conn, workspace_id=workspace_id, environment_id=environment_id, before=before, most=most
    )


async def lock(conn: Connection, *, workspace_id: UUID, api_key_id: UUID) -> None:
    """Keep claims from a key's limits, and others from changing it, until the commit."""
    await capacity.lock_scope(conn, workspace_id=workspace_id, scope_id=api_key_id)
    await _lock.one(conn, workspace_id=workspace_id, api_key_id=api_key_id)


async def change(
    conn: Connection, *, to: ApiKey, by: UUID | None, amounts: Sequence[Amount] | None = None
) -> list[UUID]:
    """Change a key that is locked, effective at once; the resources to ring for.

    ``amounts``: its limits from now on, unless it does not enforce them. None: as they are.
    """
    await _change.run(
        conn,
        workspace_id=to.workspace_id,
        api_key_id=to.api_key_id,
        name=to.name,
        description=to.description,
        enabled=to.enabled,
        resources=to.resources,
        permissions=to.permissions,
        labels=to.labels,
        enforce_capacity=to.enforce_capacity,
        capacity=Jsonb(to.capacity),
        expires_at=to.expires_at,
        updated_by=by,
    )
    if amounts is None:
        return []
    return await capacity.set_limits(
        conn,
        workspace_id=to.workspace_id,
        scope_id=to.api_key_id,
        amounts=amounts if to.enforce_capacity else (),
    )


async def rotate(
    conn: Connection, *, workspace_id: UUID, api_key_id: UUID, overlap_s: int, by: UUID | None
) -> str:
    """Give a key that is locked a new value, which is returned and nowhere stored.

    The value that it had opens for ``overlap_s`` seconds more; with 0 it opens nothing from now on.
    """
    minted = mint_api_key()
    await _rotate.run(
        conn,
        workspace_id=workspace_id,
        api_key_id=api_key_id,
        hash=minted.hash,
        masked_key=minted.masked,
        overlap_s=overlap_s,
        updated_by=by,
    )
    return minted.value


async def delete(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    api_key_id: UUID,
    by: UUID | None,
) -> bool:
    """Let a key open nothing any more; False when there is no such key.

    Its row and its limits stay: batches that it made go on within them and keep their creator.
    """
    return bool(
        await _delete.run(
            conn,
            workspace_id=workspace_id,
            environment_id=environment_id,
            api_key_id=api_key_id,
            updated_by=by,
        )
    )


async def note_used(conn: Connection, *, workspace_id: UUID, api_key_id: UUID) -> None:
    """Keep a key's last use, to the minute."""
    await _used.run(conn, workspace_id=workspace_id, api_key_id=api_key_id)
